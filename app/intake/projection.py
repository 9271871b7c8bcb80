"""What a batch changes: the rows that one transaction will write, made in memory."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from app.events.erasure import completed
from app.events.frozen import frozen
from app.events.identity import Relation, core_of
from app.events.lifecycle import BLANK, Effect, project, refresh
from app.events.payload import Event
from app.intake.ledger import Judged
from app.intake.submission import Outcome, Receipt, Submission
from app.store.envelopes import EnvelopeKey, Held
from app.store.ids import new_id

# Given an event type and an account: the names of the callbacks that are owed it.
Interested = Callable[[str, str], Sequence[str]]

CONFLICT = "receiver.conflict"
DISPUTED = "receiver.disputed"
QUARANTINED = "receiver.quarantined"


@frozen
class Fact:
    """What the log says of one submission, once it is committed."""

    submission: Submission
    receipt: Receipt
    effect: Effect | None
    fields_status: str | None


@dataclass(slots=True)
class Projection:
    """Rows to be written, and the answer to each submission."""

    held: dict[EnvelopeKey, Held]
    interested: Interested
    now: datetime
    events: list[tuple[Any, ...]] = field(default_factory=list)
    bodies: list[tuple[UUID, bytes]] = field(default_factory=list)
    deliveries: list[tuple[Any, ...]] = field(default_factory=list)
    copies: dict[UUID, int] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    # Events that have a row already: it is written anew whatever becomes of them.
    stored: frozenset[UUID] = frozenset()

    def take(self, judged: Judged, *, conflicts: Mapping[UUID, UUID]) -> None:
        """Add what one judged submission changes; `conflicts` names those known already."""
        submission = judged.submission
        if judged.is_settled:
            # Of an earlier try nobody knows the effect any more; the row does.
            self._answer(submission, _settled(submission), submission.event_id, effect=None)
        elif judged.relation is Relation.CONFLICT:
            self._contradict(judged, known=conflicts.get(submission.event_id))
        elif judged.original is not None:
            self._copy(submission, judged.original)
        elif submission.event is None:
            self._quarantine(submission)
        else:
            self._record(submission)

    def _record(self, submission: Submission) -> None:
        held, event = self._hold(submission), submission.event
        assert event is not None  # what is not understood is in quarantine
        effect = Effect.UNKNOWN
        was_disputed = held is not None and held.envelope.disputed
        if held is not None:
            held.envelope, effect = project(
                held.envelope, event, received_at=submission.received_at
            )
            if held.erased_at is not None:
                held.envelope = completed(held.envelope)
            self._advance(held)
        self._store(submission, effect=effect, held=held)
        self._owe(submission.event_id, event.type, submission.account, held)
        self._answer(submission, Outcome.RECORDED, submission.event_id, effect=effect)
        if held is not None and held.envelope.disputed and not was_disputed:
            self._raise(DISPUTED, submission, held=held)

    def _copy(self, submission: Submission, original: UUID) -> None:
        self.copies[original] = self.copies.get(original, 0) + 1
        effect = self._refresh(submission, original)
        self._answer(submission, Outcome.DUPLICATE, original, effect=effect)

    def _refresh(self, submission: Submission, original: UUID) -> Effect | None:
        """Take over newer context; a copy that changes the row is kept as evidence."""
        if submission.event is None:
            return None
        held = self._hold(submission)
        is_newer = held is not None and self._bring_newer(held, submission.event, submission)
        if not is_newer and submission.event_id not in self.stored:
            return None
        self._store(submission, effect=Effect.REFRESHED, held=held, original=original, order=False)
        return Effect.REFRESHED

    def _bring_newer(self, held: Held, event: Event, submission: Submission) -> bool:
        if held.erased_at is not None:
            return False
        # Another replica may have received this copy before the first; that is no news, and
        # must not move a milestone whose time is only that of our receipt.
        received_at = max(submission.received_at, held.updated_at)
        fresh = refresh(held.envelope, event, received_at=received_at)
        if fresh == held.envelope:
            return False
        held.envelope = fresh
        self._advance(held, sequence=0)
        return True

    def _contradict(self, judged: Judged, *, known: UUID | None) -> None:
        submission = judged.submission
        self._bare_named(submission)
        if known is not None:
            if known != submission.event_id:
                self.copies[known] = self.copies.get(known, 0) + 1
            if submission.event_id in self.stored:
                self._store_conflict(judged, held=self._hold(submission))
            self._answer(submission, Outcome.CONFLICT, known, effect=Effect.CONFLICT)
            return
        held = self._hold(submission)
        was_disputed = held is None or held.envelope.disputed
        if held is not None and not was_disputed:
            held.envelope = replace(held.envelope, disputed=True)
            self._advance(held, sequence=0)
        self._store_conflict(judged, held=held)
        self._answer(submission, Outcome.CONFLICT, submission.event_id, effect=Effect.CONFLICT)
        self._raise(CONFLICT, submission, held=held)
        if not was_disputed:
            self._raise(DISPUTED, submission, held=held)

    def _bare_named(self, submission: Submission) -> None:
        """A contradiction may name another envelope than the one that it casts doubt on."""
        key, event = submission.named_key, submission.event
        named = self.held.get(key) if key is not None else None
        if named is not None and named.erased_at is not None and event is not None:
            submission.bare(event)

    def _store_conflict(self, judged: Judged, *, held: Held | None) -> None:
        self._store(
            judged.submission,
            effect=Effect.CONFLICT,
            held=held,
            original=judged.original,
            order=False,
        )

    def _quarantine(self, submission: Submission) -> None:
        self._store(submission, effect=Effect.QUARANTINED, held=None)
        self._answer(
            submission, Outcome.QUARANTINED, submission.event_id, effect=Effect.QUARANTINED
        )
        self._raise(QUARANTINED, submission, held=None)

    def _hold(self, submission: Submission) -> Held | None:
        key = submission.envelope_key
        if key is None:
            return None
        held = self.held.get(key)
        if held is None:
            held = Held(key, BLANK, 0, 0, submission.received_at, self.now, is_new=True)
            self.held[key] = held
        if held.erased_at is not None and submission.event is not None:
            submission.bare(submission.event)
        return held

    def _advance(self, held: Held, *, sequence: int = 1) -> None:
        held.version += 1
        held.sequence += sequence
        held.updated_at = self.now
        held.is_changed = True

    def _store(
        self,
        submission: Submission,
        *,
        effect: Effect,
        held: Held | None,
        original: UUID | None = None,
        order: bool = True,
    ) -> None:
        event = submission.event
        if event is None:
            row = _quarantine_row(submission)
        else:
            row = _event_row(submission, event, effect=effect, held=held, original=original)
            if not order:
                row = (*row[:7], None, *row[8:])
        self.events.append(row)
        if submission.bared is None:
            self.bodies.append((submission.event_id, submission.body))

    def _owe(self, event_id: UUID, event_type: str, account: str, held: Held | None) -> None:
        for callback in self.interested(event_type, account):
            envelope_id = held.key[1] if held is not None else None
            sequence = held.sequence if held is not None else None
            self.deliveries.append((event_id, callback, account, envelope_id, sequence))

    def _raise(
        self,
        event_type: str,
        submission: Submission,
        *,
        held: Held | None,
        effect: Effect = Effect.MILESTONE,
        more: Mapping[str, str | None] | None = None,
    ) -> None:
        """Add an event of our own about what just happened; callbacks may ask for it."""
        event_id = new_id()
        if held is not None:
            self._advance(held)
        said = {
            "event": event_type,
            "event_id": str(event_id),
            "about": str(submission.event_id),
            "type": submission.event.type if submission.event else None,
            "reason": submission.reason,
            **(more or {}),
        }
        if held is not None:
            said["envelope_id"] = held.key[1]
        own = _own_row(event_id, event_type, effect, submission=submission, held=held, now=self.now)
        self.events.append(own)
        self.bodies.append((event_id, json.dumps(said).encode()))
        self._owe(event_id, event_type, submission.account, held)

    def _answer(
        self, submission: Submission, outcome: Outcome, event_id: UUID, *, effect: Effect | None
    ) -> None:
        key = submission.envelope_key
        held = self.held.get(key) if key is not None else None
        fields_status = held.envelope.fields_status if held is not None else None
        self.facts.append(Fact(submission, Receipt(outcome, event_id), effect, fields_status))


def _settled(submission: Submission) -> Outcome:
    return Outcome.QUARANTINED if submission.event is None else Outcome.RECORDED


def _event_row(
    submission: Submission,
    event: Event,
    *,
    effect: Effect,
    held: Held | None,
    original: UUID | None,
) -> tuple[Any, ...]:
    core = submission.bared or core_of(event)
    keys = submission.keys
    is_digested = submission.bared is not None or (keys is not None and keys.content is not None)
    return (
        submission.event_id,
        submission.account,
        event.envelope_id,
        event.type,
        event.atlas_event_id,
        event.occurred_at,
        submission.received_at,
        held.sequence if held is not None else None,
        effect.value,
        held.envelope.status if held is not None else None,
        held.version if held is not None else None,
        core.status,
        core.reason,
        submission.content if is_digested else None,
        None,
        list(event.degraded) or None,
        original,
        submission.key_label,
    )


def _quarantine_row(submission: Submission) -> tuple[Any, ...]:
    return (
        submission.event_id,
        submission.account,
        None,
        None,
        None,
        None,
        submission.received_at,
        None,
        Effect.QUARANTINED.value,
        *(None,) * 5,
        submission.reason,
        None,
        None,
        submission.key_label,
    )


def _own_row(
    event_id: UUID,
    event_type: str,
    effect: Effect,
    *,
    submission: Submission,
    held: Held | None,
    now: datetime,
) -> tuple[Any, ...]:
    return (
        event_id,
        submission.account,
        held.key[1] if held is not None else None,
        event_type,
        None,
        now,
        now,
        held.sequence if held is not None else None,
        effect.value,
        held.envelope.status if held is not None else None,
        held.version if held is not None else None,
        *(None,) * 5,
        submission.event_id,
        None,
    )
