"""What happened in intake and dispatch, counted once for each batch: as metrics and tallies."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from app.dispatch.attempt import Outcome
from app.events.lifecycle import IMPLIED_STATUS, MILESTONES
from app.intake import Fact
from app.metrics import OTHER, Metrics
from app.store.deliveries import PENDING
from app.store.tallies import NOBODY
from app.store.verdicts import Settlement
from app.upkeep.tallying import Counted, Tallies

WEBHOOKS, EVENTS, ATTEMPTS, DELIVERIES = "webhooks", "events", "attempts", "deliveries"
# A type comes from outside: those that nobody has heard of are one.
KNOWN_TYPES = frozenset(IMPLIED_STATUS) | frozenset(MILESTONES)


class Counting:
    """Tells both; each of its methods is called from one thread only."""

    def __init__(self, metrics: Metrics, tallies: Tallies) -> None:
        self._metrics = metrics
        self._tallies = tallies

    def recorded(self, facts: Sequence[Fact], waits: Sequence[float]) -> None:
        """Count the events of one transaction, and how long each of them waited for it."""
        outcomes: Counter[tuple[str, str]] = Counter()
        counted: Counter[Counted] = Counter()
        # Most of a batch is alike, so what each event costs is one tuple.
        for (account, outcome, reason, kind), count in Counter(map(_kind_of, facts)).items():
            outcomes[outcome, reason] += count
            counted[account, WEBHOOKS, outcome] += count
            counted[account, EVENTS, kind if kind in KNOWN_TYPES else OTHER] += count
        self._metrics.count_batch(outcomes, waits=waits)
        self._tallies.count(counted)

    def rejected(self, reason: str, status: int) -> None:
        """Count one request that was refused: nothing is stored, or nobody knows."""
        outcome = "refused" if status == 503 else "rejected"  # noqa: PLR2004  # not yet durable
        self._metrics.count_refusal(outcome, reason)
        self._tallies.count({(NOBODY, WEBHOOKS, outcome): 1})

    def attempted(self, settled: Sequence[tuple[Outcome, Settlement]]) -> None:
        """Count calls whose verdicts are on disk."""
        verdicts: Counter[tuple[str, str]] = Counter()
        counted: Counter[Counted] = Counter()
        took: defaultdict[str, list[float]] = defaultdict(list)
        for outcome, row in settled:
            callback, account = outcome.call.callback.name, outcome.call.account
            verdicts[callback, row.verdict] += 1
            counted[account, ATTEMPTS, row.verdict] += 1
            if row.state != PENDING:
                counted[account, DELIVERIES, row.state] += 1
            if outcome.began_at is not None:
                seconds = (outcome.finished_at - outcome.began_at).total_seconds()
                took[callback].append(max(0.0, seconds))
        self._metrics.count_attempts(verdicts, took=took)
        self._tallies.count(counted)


def _kind_of(fact: Fact) -> tuple[str, str, str, str]:
    """Say all that is counted of an event."""
    submission, event = fact.submission, fact.submission.event
    kind = "" if event is None else event.type
    return submission.account, fact.receipt.outcome.value, submission.reason or "", kind
