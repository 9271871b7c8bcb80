"""Look for known vulnerabilities in everything that is locked (`make audit`).

Where nobody can be asked, it says so and succeeds: a network that is away is no reason to
stop work. What is known already is refused without asking, by tests/architecture/test_locks.py.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What the service runs with comes first: if nobody answers for that, nobody else is asked.
LOCKS = ("run.txt", "test.txt", "tools.txt", "bench.txt", "audit.txt", "extra-*.txt")
# For one lock; each distribution in it is one question.
TIME = 300.0

Dependency = dict[str, Any]


def main() -> int:
    """Ask about each lock; give 1 if anything is known."""
    found: list[str] = []
    for lock in locks():
        answer = ask(lock)
        if isinstance(answer, str):
            print(f"audit: NOT DONE for {lock.name} and the rest: {answer}")
            break
        unknown = [each["name"] for each in answer if "skip_reason" in each]
        if unknown and len(unknown) == len(answer):
            print(f"audit: NOT DONE for {lock.name} and the rest: there is no advisory data here")
            break
        found += vulnerable(answer, lock.name)
        print(f"audit: {lock.name}: {len(answer) - len(unknown)} distributions looked up")
        if unknown:
            print(f"audit: {lock.name}: nothing is known of {', '.join(unknown)}")
    for line in sorted(set(found)):
        print(f"audit: VULNERABLE: {line}")
    return 1 if found else 0


def locks() -> Iterator[Path]:
    """Give the locks, the most important one first."""
    for pattern in LOCKS:
        yield from sorted((ROOT / "requirements").glob(pattern))


def ask(lock: Path) -> Sequence[Dependency] | str:
    """Ask about everything in a lock; give what is known of each, or why nobody answers."""
    options = ("--disable-pip", "--no-deps", "--format", "json", "--progress-spinner", "off")
    try:
        said = subprocess.run(  # noqa: S603  # our own arguments
            [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIME,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIME:g} s"
    try:
        dependencies: list[Dependency] = json.loads(said.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (said.stderr.strip().splitlines() or ["no answer"])[-1]
    return dependencies


def vulnerable(answer: Sequence[Dependency], lock: str) -> Iterator[str]:
    """Say of each known vulnerability where it is, and which release has it no more."""
    for each in answer:
        for known in each.get("vulns", ()):
            fixed = ", ".join(known["fix_versions"]) or "no release yet"
            yield f"{each['name']} {each['version']} ({lock}): {known['id']}, fixed in {fixed}"


if __name__ == "__main__":
    sys.exit(main())
