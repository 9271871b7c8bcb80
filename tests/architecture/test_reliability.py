"""What docs/reliability.md and docs/security.md name exists: tests, and the code itself."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"

# The catalogue: a number is never given twice, and one that was left out never comes back.
CASES = {
    "A": [*range(1, 18)],
    "B": [18, 20, 21, 23, 24, *range(26, 30), *range(31, 39)],
    "C": [*range(39, 56)],
    "D": [56, *range(58, 62), *range(63, 66), 67, 68],
    "E": [69, *range(71, 78)],
    "F": [78, *range(81, 87)],
    "G": [87, 88, 89, *range(92, 95), *range(96, 100), *range(101, 106)],
    "H": [106, 107, 109, 110, 112, 113, *range(115, 129), 130],
    "I": [132, 133, 134, *range(136, 139)],
    "J": [*range(139, 147)],
    "K": [*range(148, 152), *range(153, 156)],
    "L": [*range(157, 161)],
    "M": [*range(162, 170)],
    "N": [*range(170, 177), *range(178, 183)],
    "O": [*range(183, 188)],
}
# What else may show that a case holds: a command, with what it is told.
COMMAND = re.compile(r"make (?:soak|bench|bench-large|audit)\b.*|\.ci/\w+")


@dataclass(frozen=True)
class Case:
    """One row of the document."""

    number: int
    what: str
    evidence: list[str]
    result: str


def cases(group: str) -> list[Case]:
    """Read the table of one group."""
    text = DOCUMENT.read_text()
    found = re.search(rf"^### {group}\. .*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section about group {group}"
    rows = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", found[0], re.MULTILINE)
    return [
        Case(int(number), what.strip(), re.findall(r"`([^`]+)`", tests), result.strip())
        for number, what, tests, result in rows
    ]


ALL = [case for group in CASES for case in cases(group)]


@cache
def names_in(file: str) -> frozenset[str]:
    """Give the tests of a file: functions, classes, and methods behind their class."""
    names = set()
    for node in ast.parse((ROOT / "tests" / file).read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if _is_test(node.name):
                names.add(node.name)
            case ast.ClassDef() if _is_test(node.name):
                names.add(node.name)
                names |= {
                    f"{node.name}::{member.name}"
                    for member in node.body
                    if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
                }
    return frozenset(names)


def _is_test(name: str) -> bool:
    return name.lower().startswith("test")


class TestCatalogue:
    @pytest.mark.parametrize("group", CASES)
    def test_has_a_row_for_every_case_in_its_order(self, group: str) -> None:
        assert CASES[group] == [case.number for case in cases(group)]

    @pytest.mark.parametrize("case", ALL, ids=lambda case: str(case.number))
    def test_says_how_each_was_tried(self, case: Case) -> None:
        assert case.what
        assert case.result
        assert case.evidence or case.result.startswith(("not yet: ", "open"))

    @pytest.mark.parametrize("case", ALL, ids=lambda case: str(case.number))
    def test_names_only_what_exists(self, case: Case) -> None:
        for name in case.evidence:
            if COMMAND.fullmatch(name):
                continue
            file, _, test = name.partition("::")

            assert (ROOT / "tests" / file).is_file(), name
            assert not test or test in names_in(file), name


THREATS = ROOT / "docs" / "security.md"


class TestThreatModel:
    def test_names_only_what_exists(self) -> None:
        names = re.findall(r"`([\w/]+\.py)(?:::([\w:]+))?`", THREATS.read_text())

        assert names
        for file, test in names:
            assert (ROOT / "app" / file).is_file() or (ROOT / "tests" / file).is_file(), file
            assert not test or test in names_in(file), test
