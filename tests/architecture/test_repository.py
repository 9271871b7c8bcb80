"""The repository keeps the promises that its files make to each other."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
MODULES = sorted(
    path
    for folder in ("app", "migrations", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path.stat().st_size > 0
)
VERBS = ["run", "test", "check", "audit", "openapi", "fix", "bench", "mutants", "soak"]
VERBS += ["migration", "lock"]


def read(name: str) -> str:
    return (ROOT / name).read_text()


class TestLocks:
    def test_there_is_one_for_each_purpose(self) -> None:
        extras = sorted(f"extra-{name}.txt" for name in PROJECT["optional-dependencies"])

        assert ["audit.txt", "bench.txt", *extras, "run.txt", "test.txt", "tools.txt"] == [
            path.name for path in LOCKS
        ]

    @pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
    def test_name_no_address(self, lock: Path) -> None:
        """An address would tie every checkout to the network of whoever made the lock."""
        text = lock.read_text()

        assert "://" not in text
        assert " @ " not in text
        assert not re.search(r"^\s*-(?!-hash=)", text, re.MULTILINE)

    @pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
    def test_pin_every_distribution_by_version_and_hash(self, lock: Path) -> None:
        entries = re.split(r"\n(?=\S)", lock.read_text().strip())

        assert entries
        for entry in entries:
            assert re.match(r"[a-z0-9][a-z0-9._-]*==\S+", entry), entry
            assert "--hash=sha256:" in entry, entry

    def test_agree_where_they_overlap(self) -> None:
        """All of them may be installed into one environment."""
        pins: dict[str, set[str]] = {}
        for lock in LOCKS:
            found = re.findall(r"^([a-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
            for name, version in found:
                pins.setdefault(name, set()).add(version)

        assert not {name: versions for name, versions in pins.items() if len(versions) > 1}


class TestMakefile:
    def test_help_lists_every_verb(self) -> None:
        said = subprocess.run(
            ["make", "--no-print-directory"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

        assert set(VERBS) <= set(re.findall(r"^  ?make (\w+)", said, re.MULTILINE))

    @pytest.mark.parametrize("verb", VERBS)
    def test_verbs_are_never_taken_for_files(self, verb: str) -> None:
        phony = re.search(r"^\.PHONY:(.*)$", read("Makefile"), re.MULTILINE)

        assert phony
        assert verb in phony[1].split()


class TestModules:
    @pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
    def test_say_what_they_are_for(self, path: Path) -> None:
        docstring = ast.get_docstring(ast.parse(path.read_text()))

        assert docstring, "has no docstring"
        assert docstring.splitlines()[0].endswith((".", "?", ":")), "starts with no sentence"


def test_a_verb_does_not_wait_for_what_it_does_not_use() -> None:
    """Operators call them in loops, and every start of the service pays for every import."""
    heavy = {"alembic", "fastapi", "httpx2", "starlette", "uvicorn"}
    program = "import sys, app.cli; print(*sys.modules)"

    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()

    assert not heavy & set(loaded)


class TestSettings:
    @pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields])
    def test_are_all_in_the_example(self, name: str) -> None:
        assert re.search(rf"^#? ?{name}=", read(".env.example"), re.MULTILINE)

    def test_of_the_example_all_exist(self) -> None:
        named = re.findall(r"^#? ?([A-Z][A-Z_]+)=", read(".env.example"), re.MULTILINE)

        known = {name.upper() for name in Settings.model_fields}
        assert not {name.removesuffix("_FILE") for name in named} - known - {"SECRETS_DIR"}


class TestContainers:
    FILES = ("Dockerfile", "docker-compose.yml")

    @pytest.mark.parametrize("name", FILES)
    def test_every_image_has_a_version(self, name: str) -> None:
        images = re.findall(r"(?:image:|PYTHON_IMAGE=)\s*(\S+)", read(name))

        assert images
        assert all(":" in image and not image.endswith(":latest") for image in images)

    def test_the_service_is_no_root(self) -> None:
        assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", read("Dockerfile"), re.MULTILINE)

    def test_the_image_runs_the_python_it_was_locked_for(self) -> None:
        image = re.search(r"PYTHON_IMAGE=python:3\.(\d+)", read("Dockerfile"))

        assert image
        assert int(image[1]) >= 11

    def test_no_secret_has_a_default(self) -> None:
        compose = read("docker-compose.yml")

        for name in ("POSTGRES_PASSWORD", "ATLAS_API_KEY", "API_TOKENS"):
            uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", compose)
            assert uses
            assert all(use.startswith(":?") for use in uses)

    def test_the_image_takes_what_it_needs_and_nothing_else(self) -> None:
        """A list of exceptions cannot forget a secret, as a list of exclusions could."""
        lines = read(".dockerignore").splitlines()
        rules = [line for line in lines if line and not line.startswith("#")]
        copied = [
            source
            for sources in re.findall(
                r"^COPY (?!--from)(.+) \S+$", read("Dockerfile"), re.MULTILINE
            )
            for source in sources.split()
        ]

        assert "*" == rules[0]
        taken = {rule.strip("!/") for rule in rules if rule.startswith("!")}
        assert set(copied) == taken
