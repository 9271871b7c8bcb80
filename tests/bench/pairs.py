"""The same asked and sent on a small database and on a large one, in turns."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from tests.bench.api import Api
from tests.bench.asking import AskerProcess
from tests.bench.filling import SCHEMA, Filling
from tests.bench.measurement import Asked, Measurement, combine_asked
from tests.bench.receivers import Service
from tests.bench.report import Goal, crowd_warning, number
from tests.bench.routes import (
    FEED_PAGE,
    Route,
    deliveries,
    envelope_lists,
    feed,
    one_envelope,
    overviews,
)
from tests.postgres import Postgres

# The two databases take turns this often.
SLICE = 0.5
WARM_UP = 0.2
SLOWER, FEWER = 1.5, 0.8
# A title, headings and rows.
Sheet = tuple[str, Sequence[str], Sequence[Sequence[str]]]
ASKED_HEADINGS = (
    "route",
    "connections",
    "p50 ms, small",
    "large",
    "p99 ms, small",
    "large",
    "large / small",
    f"≤ {SLOWER:g} asked",
)
TAKEN_HEADINGS = (
    "sent",
    "connections",
    "events/s, small",
    "large",
    "p99 ms, small",
    "large",
    "large / small",
    f"≥ {FEWER:g} asked",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same on both databases."""

    # The small one first.
    both: tuple[Asked, Asked]

    @property
    def goal(self) -> Goal:
        small, large = self.both
        return Goal(small.route, large.p50 / small.p50, "≤", SLOWER, None)

    @property
    def is_slow(self) -> bool:
        return not self.goal.value <= SLOWER


@dataclass(frozen=True, slots=True)
class Intake:
    """Events taken, on both databases."""

    both: tuple[Measurement, Measurement]

    @property
    def goal(self) -> Goal:
        small, large = self.both
        return Goal("ingest", large.rate / small.rate, "≥", FEWER, None)


class Beside(Service):
    """The service that takes events, on a database that is there already."""

    # What was there before is older, and none of what is looked for.
    digests = Service.digests + " WHERE e.received_at > now() - interval '60 minutes'"

    def __init__(self, postgres: Postgres, scratch: Path, name: str) -> None:
        super().__init__(postgres, scratch)
        self.name = name
        self._promised = b""

    def create_database(self) -> str:
        return self._postgres.url(self.name)

    async def _audit(self, url: str, measured: Measurement, digests: bytes) -> Measurement:
        """Look for what was acknowledged in any of the windows: they share a database."""
        self._promised += digests
        return await super()._audit(url, measured, self._promised)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was measured on both."""

    pairs: Sequence[Pair]
    intakes: Sequence[Intake]

    @property
    def tables(self) -> list[Sheet]:
        sheets: list[Sheet] = [
            ("Each route, on both databases", ASKED_HEADINGS, [*map(_asked_cells, self.pairs)]),
            ("Events taken, on both databases", TAKEN_HEADINGS, [*map(_taken_cells, self.intakes)]),
        ]
        return [sheet for sheet in sheets if sheet[2]]

    @property
    def faults(self) -> list[str]:
        return list(dict.fromkeys(fault for one in self._all() for fault in one.faults))

    def notes(self) -> list[str]:
        """Say how many goals were met, what the audit found, and whether the machine was busy."""
        return [
            note
            for note in (self._met(), self._kept(), crowd_warning(o.crowd for o in self._all()))
            if note
        ]

    def _all(self) -> list[Asked | Measurement]:
        asked: list[Asked | Measurement] = [a for pair in self.pairs for a in pair.both]
        return asked + [taken for intake in self.intakes for taken in intake.both]

    def _met(self) -> str | None:
        if not self.pairs:
            return None
        slower = [f"{p.both[0].route} at {p.both[0].connections}" for p in self.pairs if p.is_slow]
        return (
            f"{len(self.pairs) - len(slower)} of {len(self.pairs)} medians are within "
            f"{SLOWER:g} times those of the small database"
            + (f"; not: {', '.join(slower)}." if slower else ".")
        )

    def _kept(self) -> str:
        if faults := self.faults:
            return f"Not everything was right ({len(faults)}): " + "; ".join(faults[:20])
        answered = sum(asked.answered for pair in self.pairs for asked in pair.both)
        acknowledged = sum(taken.acknowledged for each in self.intakes for taken in each.both)
        return (
            f"{answered:,} questions answered, {acknowledged:,} events acknowledged; what was "
            "looked at agrees with the database."
        )


def routes_of(service: Api, filling: Filling) -> Iterator[Route]:
    """Give every route that is measured, in the order of the table."""
    yield from one_envelope(filling.envelopes)
    yield from envelope_lists(filling, service.caller)
    yield from feed(filling, asyncio.run(_places(service.url, filling)))
    yield from deliveries(filling)
    yield from overviews()


async def _places(url: str, filling: Filling) -> dict[str, str]:
    """Give cursors of the feed by name."""
    # The service's own code is not needed for anything else here.
    from app.store.feed import Place
    from app.web.api.feed import write_cursor

    ends = {"the middle": filling.events // 2, "the end": filling.events - 2 * FEED_PAGE}
    connection = await asyncpg.connect(url, server_settings={"search_path": SCHEMA})
    try:
        rows = {
            name: await connection.fetchrow(_PLACE, position) for name, position in ends.items()
        }
    finally:
        await connection.close()
    cursors = {name: write_cursor(Place(*row)) for name, row in rows.items() if row is not None}
    return {"the start": "", **cursors}


_PLACE = "SELECT position, at FROM feed WHERE position = $1"


@dataclass(frozen=True, slots=True)
class Both:
    """The API on both databases, and somebody who asks them in turns."""

    services: Sequence[Api]
    asker: AskerProcess

    def ask(self, routes: tuple[Route, Route], connections: int, seconds: float) -> Pair:
        """Ask both for the same, again and again."""
        turns = list(zip(self.services, routes, strict=True))
        for service, route in turns:
            service.ask(self.asker, route, connections, WARM_UP)
        slices = [
            [service.ask(self.asker, route, connections, SLICE) for service, route in turns]
            for _ in range(max(1, round(seconds / SLICE)))
        ]
        small, large = (combine_asked(each) for each in zip(*slices, strict=True))
        return Pair((small, large))


def _asked_cells(pair: Pair) -> Sequence[str]:
    return [
        pair.both[0].route,
        str(pair.both[0].connections),
        *(number(one.p50, 2) for one in pair.both),
        *(number(one.p99, 2) for one in pair.both),
        *_judged(pair.goal),
    ]


def _taken_cells(intake: Intake) -> Sequence[str]:
    return [
        "events",
        str(intake.both[0].connections),
        *(number(one.rate, 0) for one in intake.both),
        *(number(one.p99, 1) for one in intake.both),
        *_judged(intake.goal),
    ]


def _judged(goal: Goal) -> Sequence[str]:
    return [f"{goal.value:.2f}", goal.verdict(goal.asked).rpartition(": ")[2]]
