"""Which station of a webhook's path a sample belongs to."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from tests.bench.processes import ROOT
from tests.bench.sampler import Frame, Stack

_LIBRARY = re.compile(r".*/(?:site-packages|dist-packages|python3\.\d+)/")


@dataclass(frozen=True, slots=True)
class Station:
    """A part of the work, and where its code is.

    A place is a folder (`asyncpg/`), a file, or a file and what is in it (`file.py::Class.name`);
    of several that fit, the narrowest counts.
    """

    name: str
    places: tuple[str, ...]
    # What runs in loops of its own, whatever it calls.
    is_beside: bool = False


LOOP = Station(
    "event loop, and the system",
    # They only started the loop, so what has nothing else around it is the loop's.
    ("app/__main__.py", "app/cli/", "app/wiring.py::Services._survive"),
)
STATIONS = (
    Station(
        "HTTP: request and answer",
        (
            "uvicorn/protocols/",
            "app/web/protocol.py",
            "app/web/webhooks.py",
            "app/web/headers.py",
        ),
    ),
    Station("signature", ("app/web/webhooks.py::Door._verify", "app/events/signature.py")),
    Station("parsing", ("app/events/", "app/intake/submission.py")),
    Station(
        "identity",
        (
            "app/events/identity.py",
            "app/intake/ledger.py",
            "app/intake/submission.py::Submission.claims",
            "app/intake/submission.py::Submission.content",
            "app/store/ids.py",
        ),
    ),
    Station(
        "queue",
        (
            "app/intake/queue.py",
            "app/wiring.py::Services.submit",
            "app/wiring.py::Services._tell_workers",
            "app/wiring.py::Services._tell_others",
        ),
    ),
    Station(
        "projection",
        (
            "app/events/lifecycle.py",
            "app/intake/projection.py",
            "app/intake/record.py",
            "app/intake/subscriptions.py::Subscriptions.names_for",
        ),
    ),
    Station(
        "making rows",
        (
            "app/store/batches.py",
            "app/store/bulk.py",
            "app/store/deliveries.py",
            "app/store/envelopes.py",
            "app/store/events.py",
        ),
    ),
    Station("driver of PostgreSQL", ("app/store/session.py", "asyncpg/", "sqlalchemy/")),
    Station("log", ("app/telemetry.py", "structlog/", "app/intake/queue.py::_told")),
    Station(
        "counting",
        (
            "app/metrics.py",
            "app/upkeep/counting.py",
            "app/upkeep/tallying.py::Tallies.count",
            "app/wiring.py::KeyUsage.note",
        ),
    ),
    Station(
        "beside the path: feed, followers, other loops",
        (
            "app/upkeep/",
            "app/intake/announcement.py",
            "app/intake/subscriptions.py",
            "app/wiring.py::KeyUsage.flush",
            "app/wiring.py::Services._flush_for_ever",
        ),
        is_beside=True,
    ),
    LOOP,
    # What nobody has put on the map yet.
    Station("elsewhere in the service", ("app/",)),
)

_BY_PLACE = {place: station for station in STATIONS for place in station.places}


def by_station(samples: Mapping[Stack, int]) -> Counter[Station]:
    """Count the samples of every station."""
    counts: Counter[Station] = Counter(dict.fromkeys(STATIONS, 0))
    for stack, count in samples.items():
        counts[station_of(stack)] += count
    return counts


def by_function(samples: Mapping[Stack, int]) -> Counter[str]:
    """Count the samples of every function itself, without what it calls."""
    counts: Counter[str] = Counter()
    for stack, count in samples.items():
        counts[_title(stack[0])] += count
    return counts


def station_of(stack: Stack) -> Station:
    """Give the station of the innermost frame that is on the map; loops keep what is theirs."""
    known = [station for frame in stack if (station := _station(frame)) is not None]
    beside = [station for station in known if station.is_beside]
    return [*beside, *known, LOOP][0]


@cache
def _station(frame: Frame) -> Station | None:
    return next((_BY_PLACE[place] for place in _places(frame) if place in _BY_PLACE), None)


def _places(frame: Frame) -> Iterator[str]:
    """Give every place in which `frame` is, the narrowest first."""
    file, name = _short(frame[0]), frame[1]
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        yield f"{file}::{'.'.join(parts[:length])}"
    yield file
    folders = file.split("/")[:-1]
    for length in range(len(folders), 0, -1):
        yield "/".join(folders[:length]) + "/"


def _title(frame: Frame) -> str:
    return f"{frame[1]} ({_short(frame[0])})"


def _short(file: str) -> str:
    """Name a file as the code that imports it does."""
    return _LIBRARY.sub("", file).removeprefix(f"{ROOT}/")
