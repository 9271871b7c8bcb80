"""What is locked: all that is imported, and nothing of which a vulnerability is known."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))

# The first release that has none of the advisories beside it; docs/security.md links here.
FLOORS = {
    "h11": "0.16.0",  # CVE-2025-43859: smuggling by lax chunk terminators
    # CVE-2026-48710, PYSEC-2026-248, PYSEC-2026-249: host and path of a request, form limits
    "starlette": "1.3.1",
    "fastapi": "0.109.1",  # CVE-2024-24762, CVE-2021-32677: content types
    "python-multipart": "0.0.18",  # CVE-2024-53981: a flood of boundaries
    "uvicorn": "0.11.7",  # CVE-2020-7694, CVE-2020-7695: log injection, split headers
    "orjson": "3.9.15",  # CVE-2024-27454: recursion without end
    "pydantic": "1.8.2",  # CVE-2021-29510: dates without end
    "asyncpg": "0.21.0",  # CVE-2020-17446: a hostile server
    "idna": "3.7",  # CVE-2024-3651: quadratic time
    "requests": "2.31.0",  # CVE-2023-32681: credentials that are forwarded to a proxy
}
# Without these the service would not start, or its parts would not be the audited ones.
NEEDED = {"h11", "starlette", "fastapi", "uvicorn", "pydantic", "asyncpg", "idna", "greenlet"}


def pins(lock: Path) -> dict[str, str]:
    """Give the versions that a lock names."""
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", lock.read_text(), re.MULTILINE))


def order(version: str) -> tuple[int, ...]:
    """Order plain versions; one that is none (a preview, say) is below all."""
    return tuple(map(int, version.split("."))) if re.fullmatch(r"\d+(\.\d+)*", version) else ()


class TestFloors:
    @pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
    def test_hold_in_every_lock(self, lock: Path) -> None:
        locked = pins(lock)

        below = {
            name: locked[name]
            for name, floor in FLOORS.items()
            if name in locked and order(locked[name]) < order(floor)
        }

        assert not below

    def test_are_of_what_is_there(self) -> None:
        """One that is misspelt would hold for ever."""
        assert set(pins(ROOT / "requirements" / "run.txt")) >= NEEDED

    @pytest.mark.parametrize(
        "below, above", [("0.9.9", "0.10.0"), ("1.3.1rc1", "1.3.1"), ("1.3", "1.3.1")]
    )
    def test_are_compared_as_versions(self, below: str, above: str) -> None:
        assert order(below) < order(above)


def imported() -> set[str]:
    """Give the names of everything that the service imports, of whatever is not its own."""
    names = set()
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "migrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import():
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                case ast.ImportFrom(module=str(module), level=0):
                    names.add(module.partition(".")[0])
    return names - sys.stdlib_module_names - {"app", "migrations", "__future__"}


def distributions(names: set[str]) -> dict[str, set[str]]:
    """Give, for each name, which distributions bring it along."""
    installed = packages_distributions()
    return {
        name: {each.lower().replace("_", "-") for each in installed[name]}
        for name in names
        if name in installed
    }


class TestWhatIsImported:
    def test_is_in_the_lock_of_the_service_or_of_an_extra(self) -> None:
        """Who installs only what is declared must be able to start it."""
        locked = set().union(*(pins(lock) for lock in LOCKS if lock.name.startswith("extra-")))
        locked |= set(pins(ROOT / "requirements" / "run.txt"))

        found = distributions(imported())

        assert {"fastapi", "sqlalchemy", "uvicorn"} <= set(found)
        assert not {name: made_by for name, made_by in found.items() if not made_by & locked}

    def test_of_the_databases_is_declared(self) -> None:
        """SQLAlchemy brings greenlet only to those who ask for its `asyncio`."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

        assert any(name.startswith("sqlalchemy[asyncio]") for name in project["dependencies"])
        assert "greenlet" in pins(ROOT / "requirements" / "run.txt")
