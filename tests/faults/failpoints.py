"""Moments at which a process can be made to die, to fail or to wait: only in tests.

    python -m tests.faults.failpoints --at after-insert:kill@3 -- serve --port 8000

runs the command line of the service, with functions of `app` wrapped from outside: nothing
in `app` knows that there are such moments. A point is a name of `POINTS`; after it stands
what happens there, and when:

    NAME:kill       the process dies of SIGKILL, the first time it comes there
    NAME:raise      an error that nobody expects is raised
    NAME:pause=2    everything that runs on this thread waits for 2 seconds
    NAME:stop       the process stops until somebody sends it SIGCONT
    …@3             not the first, but the third time; once
    …~0.1           each time with this probability; `--seed` makes the dice repeatable

A point whose function is not there any more is an error, and so is an unknown name: a test
that breaks nothing must not pass.
"""

import argparse
import functools
import importlib
import inspect
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from threading import Lock
from typing import Any, Self


class FailpointError(Exception):
    """A point that cannot be set; the text says why."""


class Planted(RuntimeError):
    """What a point raises: an error that no part of the service expects."""


class Edge(Enum):
    """On which side of the wrapped function a point lies."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a point is: a function of `app`, an edge, and which of its calls count."""

    function: str
    edge: Edge
    counts: Callable[..., bool] = lambda *_, **__: True


def _verdict(wanted: str) -> Callable[..., bool]:
    """Count the calls that write a certain verdict down."""

    def counts(_: Any, settlements: Sequence[Any], **__: Any) -> bool:
        return any(each.verdict == wanted for each in settlements)

    return counts


# Named as the catalogue of faults names them, in the order in which an event passes them.
POINTS = {
    "after-read": Place("app.web.webhooks:Door.take", Edge.BEFORE),
    "after-verify": Place("app.web.webhooks:Door._verify", Edge.AFTER),
    # One statement inserts and commits; under locks, and on SQLite, these are two things.
    "before-write": Place("app.store.batches:write", Edge.BEFORE),
    "after-insert": Place("app.intake.queue:record", Edge.AFTER),
    "after-commit-before-reply": Place("app.intake.queue:Intake._announce", Edge.BEFORE),
    "after-reply-before-dispatch": Place("app.web.protocol:Protocol._reply", Edge.AFTER),
    "after-claim-before-callback": Place("app.dispatch.engine:Engine._start", Edge.BEFORE),
    "inside-callback": Place("tests.faults.victims:work", Edge.BEFORE),
    "after-callback-before-marking": Place("app.dispatch.settling:Settler._settle", Edge.BEFORE),
    "while-scheduling-a-retry": Place("app.store.verdicts:settle", Edge.AFTER, _verdict("failed")),
    "while-moving-to-dead-letters": Place(
        "app.store.verdicts:settle", Edge.AFTER, _verdict("dead")
    ),
    "while-replaying": Place("app.dispatch.replay:_owe_again", Edge.AFTER),
    "while-retrying-a-dead-letter": Place("app.dispatch.control:_Act._write_down", Edge.BEFORE),
    # No crashes, but what must not become one: the work of an event that is on disk.
    "while-waking": Place("app.wiring:Services._tell_workers", Edge.BEFORE),
    "while-counting": Place("app.upkeep.counting:Counting.recorded", Edge.BEFORE),
    "while-logging": Place("app.intake.queue:_told", Edge.BEFORE),
}


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"
    RAISE = "raise"
    PAUSE = "pause"
    STOP = "stop"


@dataclass
class Failpoint:
    """One point that is set."""

    name: str
    action: Action
    seconds: float = 1.0
    # The one time that counts, or the probability of each.
    time: int = 1
    chance: float | None = None
    dice: random.Random = field(default_factory=random.Random)
    passed: int = 0
    _lock: Any = field(default_factory=Lock)

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> Self:
        """Read `NAME:ACTION[=SECONDS][@TIME|~CHANCE]`."""
        name, _, rest = text.partition(":")
        if name not in POINTS:
            raise FailpointError(f"there is no point {name!r}; there are {', '.join(POINTS)}")
        rest, _, chance = rest.partition("~")
        rest, _, nth = rest.partition("@")
        action, _, seconds = rest.partition("=")
        try:
            return cls(
                name,
                Action(action),
                seconds=float(seconds or 1),
                time=int(nth or 1),
                chance=float(chance) if chance else None,
                dice=random.Random(f"{seed} {name}"),
            )
        except ValueError as error:
            raise FailpointError(f"{text!r}: {error}") from None

    def reach(self) -> None:
        """Be at the point; whatever is to happen, happens now."""
        if self._is_time():
            self._act()

    def _is_time(self) -> bool:
        with self._lock:
            self.passed += 1
            if self.chance is not None:
                return self.dice.random() < self.chance
            return self.passed == self.time

    def _act(self) -> None:
        match self.action:
            case Action.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            case Action.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
            case Action.PAUSE:
                time.sleep(self.seconds)
            case Action.RAISE:
                raise Planted(f"planted at {self.name}")


def install(failpoint: Failpoint) -> Callable[[], None]:
    """Set a point; give a function that takes it away again."""
    place = POINTS[failpoint.name]
    owner, name = _find(place.function)
    original = inspect.getattr_static(owner, name)
    setattr(owner, name, _wrapped(original, place, failpoint))
    return lambda: setattr(owner, name, original)


def _find(path: str) -> tuple[Any, str]:
    """Give the module or class that has a function, and the function's name in it."""
    module, _, qualified = path.partition(":")
    *owners, name = qualified.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        function = inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        raise FailpointError(f"a point lies at {path}, which is not there: {error}") from None
    if not inspect.isfunction(function):
        raise FailpointError(f"a point lies at {path}, which is no plain function any more")
    return owner, name


def _wrapped(original: Callable[..., Any], place: Place, failpoint: Failpoint) -> Any:
    def reach(edge: Edge, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if edge is place.edge and place.counts(*arguments, **options):
            failpoint.reach()

    @functools.wraps(original)
    async def awaited(*arguments: Any, **options: Any) -> Any:
        reach(Edge.BEFORE, arguments, options)
        result = await original(*arguments, **options)
        reach(Edge.AFTER, arguments, options)
        return result

    @functools.wraps(original)
    def called(*arguments: Any, **options: Any) -> Any:
        reach(Edge.BEFORE, arguments, options)
        result = original(*arguments, **options)
        reach(Edge.AFTER, arguments, options)
        return result

    return awaited if inspect.iscoroutinefunction(original) else called


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the service with points where it breaks.")
    parser.add_argument("--at", action="append", default=[], metavar="NAME:ACTION", dest="points")
    parser.add_argument("--seed", type=int, default=0, help="of the dice of points with ~")
    parser.add_argument("command", nargs="+", help="-- and a verb of the service, as for `app`")
    arguments = parser.parse_args()
    try:
        for text in arguments.points:
            install(Failpoint.parse(text, seed=arguments.seed))
    except FailpointError as error:
        sys.exit(f"failpoints: {error}")
    sys.argv = ["app", *arguments.command]
    from app.cli import main as run

    run()


if __name__ == "__main__":
    main()
