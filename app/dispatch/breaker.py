"""When to leave a callback alone for a while: what its calls did lately decides.

    closed ── too many calls fail ──▶ open ── its pause is over ──▶ half open
      ▲                                 ▲                              │
      └──── a probe succeeds ───────────┴──────── a probe fails ───────┘

The counts are those of all processes together; `app.store.breakers` keeps them. While it is
open nothing is claimed, so deliveries gather and use up no attempts; half open, one worker
at a time tries a few.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

# Beyond that power of two every pause is the longest.
_MOST_TRIPS = 20


@dataclass(frozen=True, slots=True)
class Breaker:
    """When to open, and for how long.

    It opens once at least `calls` calls ended within `window` and the share `failure_rate`
    of them failed: for `pause`, twice as long each further time, `longest` at most. Then
    `probes` calls at a time show whether it is over.
    """

    failure_rate: float = 0.5
    calls: int = 20
    window: timedelta = timedelta(minutes=1)
    pause: timedelta = timedelta(seconds=10)
    longest: timedelta = timedelta(minutes=5)
    probes: int = 3


@dataclass(frozen=True, slots=True)
class Tally:
    """How many calls ended well, and how many badly."""

    succeeded: int = 0
    failed: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.succeeded + other.succeeded, self.failed + other.failed)

    @property
    def total(self) -> int:
        """All calls together."""
        return self.succeeded + self.failed


@dataclass(frozen=True, slots=True)
class Condition:
    """What is remembered of one callback."""

    since: datetime
    tally: Tally = Tally()
    # How often it opened without a healthy window between.
    trips: int = 0
    open_until: datetime | None = None

    @property
    def is_clean(self) -> bool:
        """True if nothing but success would have to be counted."""
        return self.open_until is None and self.tally.failed == 0 and self.trips == 0


def advance(condition: Condition, tally: Tally, *, breaker: Breaker, now: datetime) -> Condition:
    """Count what has just ended, and decide."""
    if condition.open_until is None:
        return _watch(condition, tally, breaker=breaker, now=now)
    if now < condition.open_until:
        # Calls that were under way when it opened say nothing about what is now.
        return condition
    if tally.failed:
        return _open(condition, breaker=breaker, now=now)
    if tally.succeeded:
        return Condition(since=now, trips=condition.trips)
    return condition


def _watch(condition: Condition, tally: Tally, *, breaker: Breaker, now: datetime) -> Condition:
    if now - condition.since >= breaker.window:
        condition = Condition(since=now)
    counted = condition.tally + tally
    is_judged = counted.total >= breaker.calls and counted.failed > 0
    if is_judged and counted.failed >= breaker.failure_rate * counted.total:
        return _open(condition, breaker=breaker, now=now)
    return replace(condition, tally=counted)


def _open(condition: Condition, *, breaker: Breaker, now: datetime) -> Condition:
    trips = min(condition.trips + 1, _MOST_TRIPS)
    pause = min(breaker.pause * 2 ** (trips - 1), breaker.longest)
    return Condition(since=now, trips=trips, open_until=now + pause)
