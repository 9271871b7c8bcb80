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


def combine(rounds: Sequence[Measurement | Worked]) -> Measurement | Worked:
    """Return the median of each number over `rounds`; counts and faults are added up."""
    added: Measurement | Worked = _add_up(rounds)
    return replace(added, **_medians(rounds))


def _add_up(rounds: Sequence[Any]) -> Any:
    faults = [fault for one in rounds for fault in one.faults]
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
