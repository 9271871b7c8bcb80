"""How much is owed and waiting, asked for once for all who look, and not too often."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from app.metrics import MOST_KEYS, Level, Metrics
from app.store import levels
from app.store.levels import Levels, Queue
from app.store.session import Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("levels")

LIMIT = timedelta(seconds=2)
MAX_AGE = timedelta(seconds=10)
# The lag of a loop is the worst of the last minute or so.
LAG_EVERY, LAG_SAMPLES = timedelta(milliseconds=500), 120
CLOSED, HALF_OPEN, OPEN, PAUSED = range(4)

_NEVER: Final = float("-inf")


class Gauges:
    """The levels as they were a moment ago; nobody looks while nobody asks."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._asking: asyncio.Task[None] | None = None
        self._read_at = _NEVER
        self.levels: Levels | None = None

    async def refresh(self, *, max_age: timedelta = MAX_AGE) -> Levels | None:
        """Give levels that are not old, or else the last known; all who ask share one look."""
        now = asyncio.get_running_loop().time()
        if now - self._read_at >= max_age.total_seconds():
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._read())
            # One who stops waiting must not take the answer from the others.
            await asyncio.shield(self._asking)
        return self.levels

    async def _read(self) -> None:
        try:
            async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
                self.levels = await levels.read(connection)
            self._read_at = asyncio.get_running_loop().time()
        except DatabaseError as error:
            log.warning("levels.delayed", error=type(error).__name__)

    @property
    def age(self) -> float | None:
        """How old the levels are, in seconds."""
        if self.levels is None:
            return None
        return asyncio.get_running_loop().time() - self._read_at


class Lag:
    """How late a loop comes to what is due."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=LAG_SAMPLES)

    @property
    def worst(self) -> float:
        """The longest of the last minute, in seconds."""
        return max(self._samples, default=0.0)

    async def run(self) -> None:
        """Look for ever."""
        loop, pause = asyncio.get_running_loop(), LAG_EVERY.total_seconds()
        while True:
            before = loop.time()
            await asyncio.sleep(pause)
            self._samples.append(max(0.0, loop.time() - before - pause))


def oldest(queues: Iterable[Queue], seen: Levels) -> float:
    """Say for how long the first of these has been due, in seconds; 0 if none is.

    What is running is due when its lease is over: its worker may be dead.
    """
    return max((seconds_since(seen, queue.due_at) for queue in queues), default=0.0)


def seconds_since(seen: Levels, moment: datetime | None) -> float:
    """Say how long ago a moment was when the levels were read, if it was."""
    if moment is None:
        return 0.0
    return max(0.0, (seen.at - moment).total_seconds())


def state_of(gate: levels.Gate, at: datetime) -> int:
    """Say as a number what keeps deliveries from a callback."""
    if gate.paused_at is not None:
        return PAUSED
    if gate.open_until is None:
        return CLOSED
    return HALF_OPEN if gate.open_until <= at else OPEN


def show(metrics: Metrics, gauges: Gauges) -> None:
    """Show what the database says, as it was when somebody last asked for it."""
    shown = _Shown(metrics, gauges)
    for name, documentation, labels, read in (
        ("atlas_deliveries", "What is owed or set aside", ["callback", "state"], shown.deliveries),
        ("atlas_delivery_oldest_due_seconds", "For how long one is due", [], shown.oldest_due),
        (
            "atlas_breaker_state",
            "0: closed, 1: half open, 2: open, 3: paused by a person",
            ["callback"],
            shown.gates,
        ),
        ("atlas_feed_position", "The newest place of the feed", [], shown.position),
        ("atlas_feed_lag_seconds", "For how long a change has no place", [], shown.feed_lag),
        (
            "atlas_key_last_match_timestamp_seconds",
            "When a key last proved a request genuine",
            ["account", "key"],
            shown.matches,
        ),
        ("atlas_levels_age_seconds", "How old all of these are", [], shown.age),
    ):
        metrics.gauge(name, documentation, labels, read)


class _Shown:
    """Levels as gauges; without levels there are none."""

    def __init__(self, metrics: Metrics, gauges: Gauges) -> None:
        self._metrics, self._gauges = metrics, gauges

    def deliveries(self) -> Level:
        counts: Counter[tuple[str, ...]] = Counter()
        for queue in self._seen.queues if self._seen else ():
            counts[self._metrics.shown_callback(queue.callback), queue.state] += queue.count
        return counts

    def oldest_due(self) -> Level:
        return {(): oldest(self._seen.queues, self._seen)} if self._seen else {}

    def gates(self) -> Level:
        worst: dict[tuple[str, ...], float] = {}
        if (seen := self._seen) is None:
            return worst
        for gate in seen.gates:
            label = (self._metrics.shown_callback(gate.callback),)
            worst[label] = max(worst.get(label, CLOSED), state_of(gate, seen.at))
        return worst

    def position(self) -> Level:
        return {(): self._seen.position} if self._seen else {}

    def feed_lag(self) -> Level:
        return {(): seconds_since(self._seen, self._seen.waiting_since)} if self._seen else {}

    def matches(self) -> Level:
        uses = sorted(self._seen.uses, key=lambda use: use.last_match_at) if self._seen else []
        return {
            (use.account, use.label): use.last_match_at.timestamp() for use in uses[-MOST_KEYS:]
        }

    def age(self) -> Level:
        return {(): self._gauges.age} if self._gauges.age is not None else {}

    @property
    def _seen(self) -> Levels | None:
        return self._gauges.levels
