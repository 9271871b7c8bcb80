"""One figure for each question, and the median of several rounds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Any

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender at one number of connections; times in milliseconds and microseconds."""

    contender: str
    connections: int
    rate: float
    p50: float = NAN
    p99: float = NAN
    p999: float = NAN
    # Processor time per event: of the receiver, of PostgreSQL, of the load generator.
    cpu: float = NAN
    database_cpu: float = NAN
    load_cpu: float = NAN
    memory: float = NAN
    # The share of all processors that programs took which have no part in this.
    crowd: float = NAN
    # The time of day at which the window opened.
    began: float = NAN
    acknowledged: int = 0
    # Sent at a fixed rate, whatever the answers did.
    is_paced: bool = False
    # Callbacks were at work, and events came at a leisurely pace.
    is_scene: bool = False
    # Of each event, the milliseconds from its commit to the start of the callback.
    lags: list[float] = field(default_factory=list)
    # What was still owed when the window closed.
    left: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    # What was promised and is not there, or is there otherwise; in sentences.
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Worked:
    """One queue, worked off by one process; processor times in microseconds for each job."""

    contender: str
    waiting: int
    finished: int
    rate: float
    cpu: float
    database_cpu: float
    memory: float
    crowd: float
    done: int
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Asked:
    """One route, asked on some connections; processor times in microseconds for each answer."""

    route: str
    connections: int
    rate: float
    # In milliseconds.
    p50: float
    p99: float
    cpu: float
    database_cpu: float
    load_cpu: float
    crowd: float
    answered: int
    failures: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reads:
    """Several routes that took turns in one process."""

    asked: list[Asked]


@dataclass(frozen=True, slots=True)
class Told:
    """Many who wait: what they cost, and how long an event takes to reach all of them."""

    streams: int
    polls: int
    # Events taken per second while they waited, and after they had left; and the processor
    # time of each event, of the service and of the database, in microseconds.
    rate: float
    rate_alone: float
    cpu: float
    cpu_alone: float
    # Of the process, for each who waits, in KB.
    stream_memory: float
    poll_memory: float
    crowd: float
    acknowledged: int
    # In milliseconds: from the 200 of an event to each who is told, to the last of them, and
    # to whoever waits for that one envelope.
    reach: list[float] = field(default_factory=list)
    reach_last: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Started:
    """One process, from its start to its first 200."""

    contender: str
    seconds: float
    crowd: float
    faults: list[str] = field(default_factory=list)


Result = Measurement | Worked | Reads | Told | Started


def combine(rounds: Sequence[Result]) -> Result:
    """Return the median of each number over `rounds`; counts and faults are added up."""
    if isinstance(rounds[0], Reads):
        turns = [one.asked for one in rounds if isinstance(one, Reads)]
        return Reads([combine_asked(each) for each in zip(*turns, strict=True)])
    added: Result = _add_up(rounds)
    return replace(added, **_medians(rounds))


def combine_measured(rounds: Sequence[Measurement]) -> Measurement:
    """Do the same for windows of one kind."""
    added: Measurement = _add_up(rounds)
    return replace(added, **_medians(rounds))


def combine_asked(rounds: Sequence[Asked]) -> Asked:
    """Do the same for one route."""
    added: Asked = _add_up(rounds)
    return replace(added, **_medians(rounds))


def _add_up(rounds: Sequence[Any]) -> Any:
    faults = [fault for one in rounds for fault in one.faults]
    if isinstance(rounds[0], Asked):
        failures = _add(one.failures for one in rounds)
        answered = sum(one.answered for one in rounds)
        return replace(rounds[0], answered=answered, failures=failures, faults=faults)
    if isinstance(rounds[0], Told):
        names = ("reach", "reach_last", "answer")
        times: Any = {n: sorted(t for one in rounds for t in getattr(one, n)) for n in names}
        acknowledged = sum(one.acknowledged for one in rounds)
        return replace(rounds[0], acknowledged=acknowledged, faults=faults, **times)
    if isinstance(rounds[0], Started):
        return rounds[0]
    if isinstance(rounds[0], Worked):
        return replace(rounds[0], done=sum(one.done for one in rounds), faults=faults)
    return replace(
        rounds[0],
        acknowledged=sum(one.acknowledged for one in rounds),
        lags=sorted(lag for one in rounds for lag in one.lags),
        left=min(one.left for one in rounds),
        rows=_add(one.rows for one in rounds),
        failures=_add(one.failures for one in rounds),
        faults=faults,
    )


def _medians(rounds: Sequence[Any]) -> dict[str, Any]:
    numbers = [f.name for f in fields(rounds[0]) if f.type is float]
    return {name: median(getattr(one, name) for one in rounds) for name in numbers}


def _add(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
