"""Where the samples of a profile are counted."""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.bench.processes import ROOT
from tests.bench.sampler import Stack, stack_of
from tests.bench.stations import LOOP, STATIONS, by_function, by_station, station_of

SITE = "/usr/lib/python3.12/site-packages"
PLACES = [place for station in STATIONS for place in station.places]

# What is around everything: the command, and the event loop.
STARTED = (
    ("/usr/lib/python3.12/asyncio/runners.py", "Runner.run"),
    (f"{ROOT}/app/cli/listening.py", "serve"),
    (f"{ROOT}/app/__main__.py", "<module>"),
    ("<frozen runpy>", "run_module"),
)
DATA = (f"{ROOT}/app/web/protocol.py", "Protocol.data_received")
TAKE = (f"{ROOT}/app/web/webhooks.py", "Door.take")
FETCH = (f"{ROOT}/app/store/session.py", "fetch")
EXECUTE = (f"{SITE}/asyncpg/connection.py", "Connection._execute")
NEWS = (f"{ROOT}/app/intake/queue.py", "Intake._news")
WRITE = (f"{ROOT}/app/store/batches.py", "write")


class TestMap:
    @pytest.mark.parametrize("place", PLACES)
    def test_every_place_exists(self, place: str) -> None:
        """Code that moves would leave its time to whoever calls it."""
        path, _, name = place.partition("::")
        file = _found(path)

        assert file.is_dir() if path.endswith("/") else file.is_file()
        assert not name or name in set(_names(ast.parse(file.read_text())))

    def test_no_place_belongs_to_two_stations(self) -> None:
        assert len(set(PLACES)) == len(PLACES)


class TestStationOf:
    @pytest.mark.parametrize(
        "stack, station",
        [
            pytest.param((DATA,), "HTTP: request and answer", id="its-own-file"),
            pytest.param(
                (("/usr/lib/python3.12/hmac.py", "digest"), (TAKE[0], "Door._verify"), TAKE, DATA),
                "signature",
                id="what-it-calls-in-a-library",
            ),
            pytest.param(
                ((f"{ROOT}/app/events/heading.py", "places_of"), TAKE, DATA),
                "parsing",
                id="a-file-of-its-folder",
            ),
            pytest.param(
                ((f"{ROOT}/app/events/identity.py", "claims_of.<locals>.<genexpr>"), TAKE, DATA),
                "identity",
                id="a-file-rather-than-its-folder",
            ),
            pytest.param(
                (("<frozen abc>", "ABCMeta.__instancecheck__"), EXECUTE, FETCH, WRITE, NEWS),
                "driver of PostgreSQL",
                id="a-package",
            ),
            pytest.param((WRITE, NEWS), "making rows", id="the-innermost"),
            pytest.param(
                ((f"{ROOT}/app/intake/queue.py", "_told"), NEWS), "log", id="one-function"
            ),
            pytest.param(
                ((TAKE[0], "Door.take.<locals>.<lambda>"),),
                "HTTP: request and answer",
                id="a-lambda",
            ),
            pytest.param(
                (EXECUTE, FETCH, (f"{ROOT}/app/upkeep/sequencer.py", "Sequencer.step")),
                "beside the path: feed, followers, other loops",
                id="a-loop-keeps-what-it-calls",
            ),
            pytest.param((), "event loop, and the system", id="nothing-but-the-loop"),
            pytest.param(
                ((f"{ROOT}/app/errors.py", "AppError"),),
                "elsewhere in the service",
                id="not-on-the-map",
            ),
        ],
    )
    def test_a_sample_is_counted_where_its_time_is_spent(self, stack: Stack, station: str) -> None:
        assert station == station_of((*stack, *STARTED)).name


class TestCounts:
    def test_no_sample_is_lost(self) -> None:
        samples = {(DATA, *STARTED): 3, (WRITE, NEWS, *STARTED): 4, STARTED: 5}

        counts = by_station(samples)

        assert 12 == counts.total()
        assert 5 == counts[LOOP]

    def test_functions_have_their_own_time_only(self) -> None:
        samples = {(WRITE, NEWS): 4, (NEWS,): 2, (EXECUTE, WRITE, NEWS): 1}

        counts = by_function(samples)

        expected = {
            "write (app/store/batches.py)": 4,
            "Intake._news (app/intake/queue.py)": 2,
            "Connection._execute (asyncpg/connection.py)": 1,
        }
        assert expected == counts


class TestStack:
    def test_it_begins_with_the_innermost_function(self) -> None:
        def inner() -> Stack:
            return stack_of(sys._getframe())

        stack = inner()

        here = "TestStack.test_it_begins_with_the_innermost_function"
        assert [f"{here}.<locals>.inner", here] == [name for _, name in stack[:2]]
        assert {__file__} == {file for file, _ in stack[:2]}

    def test_the_first_step_of_a_function_belongs_to_its_caller(self) -> None:
        """A signal that came while compiled code was running is noticed only there."""
        seen: list[Stack] = []

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_name == "called":
                seen.append(stack_of(frame))

        def called() -> None:
            """Do nothing."""

        sys.setprofile(note)
        called()
        sys.setprofile(None)

        here = "TestStack.test_the_first_step_of_a_function_belongs_to_its_caller"
        assert [here] == [stack[0][1] for stack in seen]


def _found(path: str) -> Path:
    top, _, rest = path.partition("/")
    if top == "app":
        return ROOT / path
    spec = find_spec(top)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / rest


def _names(tree: ast.AST, around: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield around + node.name
            yield from _names(node, f"{around}{node.name}.")
