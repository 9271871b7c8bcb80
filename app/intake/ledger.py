"""Which events of a batch are new: decided in memory, between two statements.

The database says who owns the keys that were claimed before this batch; several events
of one batch may claim one key, too. Both are judged by `app.events.identity`, in the
order of arrival.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from app.events.frozen import frozen
from app.events.identity import Core, Known, Relation, core_of, needs_content, relate
from app.intake.submission import Submission
from app.store.events import Claim


@frozen
class Judged:
    """A submission, how it relates to what is known, and to which event."""

    submission: Submission
    relation: Relation
    original: UUID | None = None
    # A try whose answer was lost had committed already: nothing is left to write.
    is_settled: bool = False


def claims_of_news(batch: Iterable[Submission]) -> dict[Claim, UUID] | None:
    """Give what a batch claims if all of it may be news; None if some of it share a key."""
    wanted: dict[Claim, UUID] = {}
    count = 0
    for submission in batch:
        for claim in submission.claims:
            wanted[claim] = submission.event_id
            count += 1
    return wanted if len(wanted) == count else None


class Ledger:
    """Who owns each key, while the events of one batch are judged one after the other."""

    def __init__(self, batch: Sequence[Submission]) -> None:
        self._batch = {submission.event_id: submission for submission in batch}
        self._owners: dict[Claim, Known] = {}
        self._assigned: dict[Claim, UUID] = {}
        self.wanted: dict[Claim, UUID] = {}
        for submission in batch:
            for claim in submission.claims:
                self.wanted.setdefault(claim, submission.event_id)

    def learn(self, known: Mapping[Claim, Known]) -> None:
        """Take over who owned keys before this batch."""
        self._owners.update(known)

    def lacks_content_of(self, submission: Submission) -> UUID | None:
        """Name the stored event whose bytes must be read before `submission` is judged."""
        if submission.keys is None:
            return None
        known = needs_content(submission.keys, self._owners_of(submission))
        if known is None or known.content is not None:
            return None
        if (earlier := self._batch.get(known.event_id)) is not None:
            self.learn_content(known.event_id, earlier.content)
            return None
        return known.event_id

    def learn_content(self, event_id: UUID, content: str | None) -> None:
        """Take over the content digest of an event; None if its bytes are gone."""
        # Bytes that are gone cannot be equal to any: then the sender's word counts, that
        # an event with another id is another event.
        digest = content or "pruned"
        for claim, known in self._owners.items():
            if known.event_id == event_id:
                self._owners[claim] = replace(known, content=digest)

    def judge(self, submission: Submission) -> Judged:
        """Decide what `submission` is, and who owns its keys from now on."""
        owners = self._owners_of(submission)
        if any(known.event_id == submission.event_id for known in owners.values()):
            return Judged(submission, Relation.NEW, is_settled=True)
        relation, known = self._relate(submission, owners)
        if relation is not Relation.CONFLICT:
            self._assign(submission, known or _known(submission))
        else:
            assert known is not None  # a contradiction contradicts something
            # It may name another envelope; what it casts doubt on is that of the first.
            submission.change(known.core.envelope_id)
        return Judged(submission, relation, known.event_id if known is not None else None)

    def _owners_of(self, submission: Submission) -> dict[str, Known]:
        owners = self._owners
        return {claim[1]: owners[claim] for claim in submission.claims if claim in owners}

    def _relate(
        self, submission: Submission, owners: Mapping[str, Known]
    ) -> tuple[Relation, Known | None]:
        if not owners:
            return Relation.NEW, None
        if submission.event is None or submission.keys is None:
            return Relation.DUPLICATE, next(iter(owners.values()))
        compared = needs_content(submission.keys, owners)
        content = submission.content if compared is not None else None
        return relate(submission.event, submission.keys, owners, content=content)

    def _assign(self, submission: Submission, owner: Known) -> None:
        for claim in submission.claims:
            if claim not in self._owners:
                self._owners[claim] = owner
                self._assigned[claim] = owner.event_id

    def misassigned(self, known: Iterable[Claim]) -> dict[Claim, UUID]:
        """Give the keys claimed for one event of the batch that belong to another."""
        assigned = self._assigned
        return {
            claim: assigned[claim]
            for claim, claimant in self.wanted.items()
            if claim in assigned and assigned[claim] != claimant and claim not in known
        }

    def unassigned(self, known: Iterable[Claim]) -> list[Claim]:
        """Give the keys claimed by events that had no right to them."""
        return [
            claim for claim in self.wanted if claim not in self._assigned and claim not in known
        ]


def _known(submission: Submission) -> Known:
    # Nothing is ever compared with the core of a body that was not understood: its one key
    # is that of its bytes.
    core = core_of(submission.event) if submission.event else Core("", None, None, None)
    return Known(event_id=submission.event_id, core=core, content=None)
