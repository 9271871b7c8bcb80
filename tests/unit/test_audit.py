"""`make audit` fails for what is known, and says so where nobody can be asked."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN = (
    '{"name": "h11", "version": "0.15.0", "vulns": [{"id": "CVE-1", "fix_versions": ["0.16.0"]}]}'
)
FINE = '{"name": "idna", "version": "3.20", "vulns": []}'
UNKNOWN = '{"name": "uvloop", "skip_reason": "not found"}'


def audit(folder: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run it with another program in place of the tool that asks."""
    (folder / "pip_audit.py").write_text(program)
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py")],
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answering(*dependencies: str) -> str:
    return f"print('''{{\"dependencies\": [{', '.join(dependencies)}]}}''')"


class TestAudit:
    def test_fails_for_what_is_known(self, tmp_path: Path) -> None:
        said = audit(tmp_path, answering(KNOWN, FINE, UNKNOWN) + "\nraise SystemExit(1)")

        assert 1 == said.returncode
        assert "VULNERABLE: h11 0.15.0 (run.txt): CVE-1, fixed in 0.16.0" in said.stdout
        assert "test.txt: 2 distributions looked up" in said.stdout
        assert "test.txt: nothing is known of uvloop" in said.stdout

    def test_is_content_where_nothing_is_known(self, tmp_path: Path) -> None:
        said = audit(tmp_path, answering(FINE))

        assert 0 == said.returncode
        assert "NOT DONE" not in said.stdout

    @pytest.mark.parametrize(
        "program, reason",
        [
            pytest.param(answering(UNKNOWN), "no advisory data here", id="no-data"),
            pytest.param("raise SystemExit('no route to host')", "no route to host", id="no-net"),
            pytest.param("", "no answer", id="silence"),
        ],
    )
    def test_says_where_nobody_can_be_asked(
        self, tmp_path: Path, program: str, reason: str
    ) -> None:
        said = audit(tmp_path, program)

        assert 0 == said.returncode
        assert f"NOT DONE for run.txt and the rest: {reason}" in said.stdout.replace(
            "there is ", ""
        )
