"""One figure for each question, and the median of several rounds."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median

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
    acknowledged: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    # What was promised and is not there, or is there otherwise; in sentences.
    faults: list[str] = field(default_factory=list)


_NUMBERS = [f.name for f in fields(Measurement) if f.type is float]


def combine(rounds: Sequence[Measurement]) -> Measurement:
    """Return the median of each number over `rounds`; counts and faults are added up."""
    numbers = {name: median(getattr(one, name) for one in rounds) for name in _NUMBERS}
    return Measurement(
        contender=rounds[0].contender,
        connections=rounds[0].connections,
        acknowledged=sum(one.acknowledged for one in rounds),
        rows=_add(one.rows for one in rounds),
        failures=_add(one.failures for one in rounds),
        faults=[fault for one in rounds for fault in one.faults],
        **numbers,
    )


def _add(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
