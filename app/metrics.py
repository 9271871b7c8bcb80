"""What one process counts, in memory and for whoever scrapes it.

Nothing here waits or fails. Labels that come from outside are bounded, so that a stranger
can make no series; whoever counts on the path of a webhook does so once for each batch.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OTHER = "other"
# All series together stay below 500: what has a callback as a label is the larger part.
MOST_CALLBACKS = 28
MOST_REASONS = 48
MOST_KEYS = 24

_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SIZES = (1, 2, 5, 10, 25, 50, 100, 256)
_CALLS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# What a level is just now, by the values of its labels.
Level = Mapping[tuple[str, ...], float]


def one(level: float) -> Level:
    """Give a level that has no labels."""
    return {(): level}


def labelled(levels: Mapping[str, float]) -> Level:
    """Give levels with one label each."""
    return {(name,): level for name, level in levels.items()}


class Names:
    """The first so many values of a label; all others are one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Give the name itself, or `other` if there are too many already."""
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name


class Counts:
    """A counter with labels. One thread counts; any thread may read."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str] = ()) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: Counter[tuple[str, ...]] = Counter()

    def add(self, *values: str, by: float = 1) -> None:
        """Count `by` more."""
        self._values[values] += by  # type: ignore[assignment]  # seconds are counted, too

    def collect(self) -> Iterator[Metric]:
        """Give what was counted."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in sorted(self._values.items()):
            family.add_metric(values, count)
        yield family


class Buckets:
    """A histogram. Many values at once cost little more than one."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        """Count each value in the bucket where it belongs."""
        counts, bounds, total = self._counts, self._bounds, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self._sum += total

    def collect(self) -> Iterator[Metric]:
        """Give the buckets as Prometheus has them: each holds those before it, too."""
        family = HistogramMetricFamily(self._name, self._documentation)
        buckets, below = [], 0
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for bound, count in zip(bounds, tuple(self._counts), strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric([], buckets, sum_value=self._sum)
        yield family


class Gauge:
    """A level that is asked for when somebody looks."""

    family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], read: Callable[[], Level]
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Ask for the level; one that is not known has no series."""
        family = self.family(self._name, self._documentation, labels=self._labels)
        for values, level in sorted(self._read().items()):
            family.add_metric(values, level)
        yield family


class Total(Gauge):
    """What somebody else counts, and what is asked for when somebody looks."""

    family = CounterMetricFamily


class Metrics:
    """Every metric of one process, in a registry of its own."""

    def __init__(self, *, version: str) -> None:
        self._registry = CollectorRegistry()
        self._reasons, self._callbacks = Names(MOST_REASONS), Names(MOST_CALLBACKS)
        self._webhooks = Counts(
            "atlas_webhooks", "Requests at the door, by what became of them", ["outcome", "reason"]
        )
        self._acknowledgement = Buckets(
            "atlas_webhook_acknowledgement_seconds",
            "From the last byte of a body until its event was on disk",
            _WAITS,
        )
        self._batches = Buckets("atlas_webhook_batch_events", "Events in one transaction", _SIZES)
        self._attempts = Counts(
            "atlas_attempts", "Calls of callbacks, by how they ended", ["callback", "verdict"]
        )
        self._seconds = Counts(
            "atlas_attempt_seconds", "Time that callbacks took, all together", ["callback"]
        )
        self._calls = Buckets("atlas_attempt_duration_seconds", "How long one call took", _CALLS)
        self._answers = Counts("atlas_api_requests", "Requests that the API answered", ["status"])
        for each in (
            self._webhooks,
            self._acknowledgement,
            self._batches,
            self._attempts,
            self._seconds,
            self._calls,
            self._answers,
        ):
            self._registry.register(each)
        ProcessCollector(registry=self._registry)
        self.gauge("atlas_build", "The release that runs", ["version"], lambda: {(version,): 1})

    def gauge(
        self, name: str, documentation: str, labels: Sequence[str], read: Callable[[], Level]
    ) -> None:
        """Show one more level; `read` is called at each scrape, and must not wait."""
        self._registry.register(Gauge(name, documentation, labels, read))

    def total(
        self, name: str, documentation: str, labels: Sequence[str], read: Callable[[], Level]
    ) -> None:
        """Show one more counter, which somebody else counts."""
        self._registry.register(Total(name, documentation, labels, read))

    def count_batch(
        self, outcomes: Mapping[tuple[str, str], int], *, waits: Sequence[float]
    ) -> None:
        """Count one transaction: its events by outcome and reason, and how long each waited."""
        for (outcome, reason), count in outcomes.items():
            self._webhooks.add(outcome, self._reasons(reason), by=count)
        self._acknowledgement.observe(waits)
        self._batches.observe((len(waits),))

    def count_refusal(self, outcome: str, reason: str) -> None:
        """Count one request of which nothing is known to be stored."""
        self._webhooks.add(outcome, self._reasons(reason))

    def count_attempts(
        self, verdicts: Mapping[tuple[str, str], int], *, took: Mapping[str, Sequence[float]]
    ) -> None:
        """Count calls by callback and verdict, and what those took that were begun."""
        for (callback, verdict), count in verdicts.items():
            self._attempts.add(self._callbacks(callback), verdict, by=count)
        for callback, seconds in took.items():
            self._seconds.add(self._callbacks(callback), by=sum(seconds))
            self._calls.observe(seconds)

    def count_answer(self, status: int) -> None:
        """Count one answer of the API."""
        self._answers.add(str(status))

    def shown_callback(self, name: str) -> str:
        """Give the label under which a callback is shown."""
        return self._callbacks(name)

    def write(self) -> bytes:
        """Write everything in the text format of Prometheus."""
        return generate_latest(self._registry)
