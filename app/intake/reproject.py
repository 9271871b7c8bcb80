"""Apply a stored event again: after a fix of the parser, or because a person takes its word.

The same steps as for one that arrives, in the same order of locks: identities, envelopes,
and only then the event's own row. If that says something else by then, somebody else was
here, and everything begins anew.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.errors import AppError, NotAllowed, NotFound
from app.events.lifecycle import Effect, accept, ends_said, project
from app.intake.projection import CONFLICT, DISPUTED, Interested, Projection
from app.intake.record import claim_conflicts, conflict_claim, judge
from app.intake.submission import Submission, understand
from app.store import callbacks, deliveries, envelopes, events, feed, pruning, replays
from app.store.callbacks import OWN_EVENTS
from app.store.envelopes import EnvelopeKey, EnvelopesBusy, Held
from app.store.events import COLUMNS, Claim
from app.store.session import Connection, Database, DatabaseError, blames_data, sqlstate
from app.telemetry import get_logger

log = get_logger("intake")

ACCEPTED = "receiver.accepted"
LIMIT = timedelta(seconds=10)
_PAUSE = 0.05
# Serialisation, deadlock, lock not available: another try may help.
_PASSING = ("40001", "40P01", "55P03")


class Result(StrEnum):
    """What became of an event that was applied again."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    REFRESHED = "refreshed"
    UNCHANGED = "unchanged"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True)
class Reprojected:
    """What became of an event: `original` is the one that it copies or contradicts."""

    event_id: UUID
    result: Result
    effect: str
    was: str
    type: str
    envelope_id: str | None
    original: UUID | None
    owed: tuple[str, ...]


class _Overtaken(AppError):
    """Somebody else has changed the event since it was read."""


async def reproject(
    database: Database,
    event_id: UUID,
    *,
    actor: str,
    is_accepted: bool = False,
    limit: timedelta = LIMIT,
) -> Reprojected:
    """Read the bytes of an event anew, and apply what they say today, in one transaction.

    From quarantine it becomes an event like any other, under its own id. What a conflict
    says is applied only if `is_accepted`, and then whatever was said before: the status may
    go down. Raises `NotFound`, `NotAllowed`.
    """
    end = asyncio.get_running_loop().time() + limit.total_seconds()
    while True:
        try:
            async with database.begin(limit=limit) as connection:
                work = await _begin(connection, event_id, is_accepted=is_accepted)
                done = await work.run(actor)
        except (EnvelopesBusy, _Overtaken) as error:
            if asyncio.get_running_loop().time() > end:
                raise NotAllowed(f"event {event_id} waits for others: {error}") from None
        except DatabaseError as error:
            _require_passing(error, event_id)
            if asyncio.get_running_loop().time() > end:
                raise NotAllowed(f"event {event_id} waits for others: it is held") from None
        else:
            _log(done)
            return done
        await asyncio.sleep(_PAUSE)


def _require_passing(error: Exception, event_id: UUID) -> None:
    """Let pass what another try may cure."""
    if blames_data(error):
        code = sqlstate(error) or type(error).__name__
        raise NotAllowed(f"the database cannot hold what event {event_id} says ({code})") from None
    if sqlstate(error) not in _PASSING:
        raise error


def _log(done: Reprojected) -> None:
    log.info(
        "event.reprojected",
        event_id=str(done.event_id),
        event_type=done.type,
        envelope_id=done.envelope_id,
        outcome=done.result.value,
        effect=done.effect,
    )


async def _begin(connection: Connection, event_id: UUID, *, is_accepted: bool) -> "_Work":
    row = await events.get(connection, event_id)
    if row is None:
        raise NotFound(f"there is no event {event_id}")
    if row.type is not None and row.type.startswith(OWN_EVENTS):
        raise NotAllowed(f"event {event_id} is one of the service about itself, not of Atlas")
    if row.effect not in set(Effect):
        raise NotAllowed(f"a later release has dealt with event {event_id}: apply it again there")
    body = await events.read_body(connection, event_id)
    if body is None:
        raise NotAllowed(
            f"the bytes of event {event_id} are no longer kept (pruned, or its envelope was "
            "erased), so they cannot be read anew"
        )
    submission = await asyncio.to_thread(
        understand,
        body,
        account=row.account,
        key_label=row.key_label,
        received_at=row.received_at,
    )
    if submission.event is None:
        raise NotAllowed(f"event {event_id} cannot be understood: {submission.reason}")
    submission.event_id = event_id
    return _work_for(row, is_accepted=is_accepted)(connection, row, submission)


def _work_for(row: Any, *, is_accepted: bool) -> "type[_Work]":
    if row.effect == Effect.CONFLICT and is_accepted:
        return _Acceptance
    if row.effect == Effect.CONFLICT:
        raise NotAllowed(
            f"event {row.id} contradicts event {row.original_id}: look at both; if this one is "
            "right, --accept takes its word, whatever was said before"
        )
    if is_accepted:
        raise NotAllowed(f"event {row.id} contradicts nothing: there is nothing to accept")
    return _Recovery if row.effect == Effect.QUARANTINED else _Repetition


class _Work(ABC):
    """One event that is applied again, within one transaction."""

    def __init__(self, connection: Connection, row: Any, submission: Submission) -> None:
        self.connection = connection
        self.row = row
        self.submission = submission
        self.interested: Interested = lambda _type, _account: ()

    async def run(self, actor: str) -> Reprojected:
        """Do it, and write down who did."""
        registered = await callbacks.read(self.connection)
        self.interested = lambda event_type, account: tuple(
            each.name for each in registered if each.wants(event_type, account)
        )
        done = await self.apply()
        await deliveries.audit(
            self.connection,
            actor=actor,
            action="event.accepted" if done.result is Result.ACCEPTED else "event.reprojected",
            subject=f"event:{done.event_id}",
            details={
                "result": done.result.value,
                "from_effect": done.was,
                "effect": done.effect,
                "original_id": str(done.original) if done.original else None,
                "owed": list(done.owed),
            },
        )
        return done

    @abstractmethod
    async def apply(self) -> Reprojected:
        """Take the locks, and write."""

    async def hold(self, *others: EnvelopeKey | None) -> "_Rewriting":
        """Lock the envelopes, and then the event: if it has changed, begin anew."""
        named = (self.submission.envelope_key, self.submission.named_key)
        keys = {key for key in (*named, *others) if key is not None}
        held = await envelopes.lock(self.connection, keys)
        if (key := self.submission.named_key) is not None and key not in held:
            # Whoever holds it may be about to erase it.
            held |= await envelopes.wait(self.connection, [key])
        if missing := {key for key in others if key is not None} - held.keys():
            raise EnvelopesBusy(missing)
        locked = await events.lock(self.connection, self.row.id)
        if locked is None or tuple(locked) != tuple(self.row):
            raise _Overtaken("somebody else changed it")
        now = datetime.now(UTC)
        return _Rewriting(held, self.interested, now, stored=frozenset({self.row.id}))

    async def write(self, rewriting: "_Rewriting") -> None:
        """Write what changes; the event has its row and its bytes already."""
        await envelopes.write(self.connection, rewriting.held.values())
        is_own = COLUMNS.names.index("id")
        new = [row for row in rewriting.events if row[is_own] != self.row.id]
        bodies = [(id_, body) for id_, body in rewriting.bodies if id_ != self.row.id]
        await events.add(self.connection, new, bodies)
        await events.restate(self.connection, rewriting.restated(self.row.id))
        if self.submission.bared is not None:
            await pruning.empty(self.connection, [self.row.id])
        await deliveries.enqueue(self.connection, rewriting.deliveries)
        await events.count_copies(self.connection, rewriting.copies, at=rewriting.now)
        await self._note(rewriting)

    async def _note(self, rewriting: "_Rewriting") -> None:
        """Note for the feed what has changed, unless an event of our own says so already."""
        own = self.row.account, rewriting.restated(self.row.id)["envelope_id"]
        told = {
            (row["account"], row["envelope_id"])
            for row in rewriting.rows()
            if row["id"] != self.row.id
        }
        changed: set[tuple[str, str | None]] = {
            key for key, held in rewriting.held.items() if held.is_changed
        }
        if self._is_restated(rewriting):
            changed.add(own)
        for account, envelope_id in sorted(changed - told, key=str):
            await feed.note(
                self.connection,
                feed.Kind.CORRECTION,
                account=account,
                envelope_id=envelope_id,
                event_id=self.row.id if (account, envelope_id) == own else None,
            )

    def _is_restated(self, rewriting: "_Rewriting") -> bool:
        """Whether the event's row says something else now to those who read the feed."""
        after = rewriting.restated(self.row.id)
        return any(after[name] != getattr(self.row, name) for name in feed.EVENT_COLUMNS)

    def done(self, result: Result, rewriting: "_Rewriting") -> Reprojected:
        restated = rewriting.restated(self.row.id)
        return Reprojected(
            event_id=self.row.id,
            result=result,
            effect=restated["effect"],
            was=self.row.effect,
            type=restated["type"],
            envelope_id=restated["envelope_id"],
            original=restated["original_id"],
            owed=rewriting.owed(self.row.id),
        )


class _Rewriting(Projection):
    """A projection of events whose rows are there."""

    __slots__ = ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the events that are written, by column."""
        return (dict(zip(COLUMNS.names, row, strict=True)) for row in self.events)

    def restated(self, event_id: UUID) -> dict[str, Any]:
        """Give the new values of an event's row."""
        return next(row for row in self.rows() if row["id"] == event_id)

    def owed(self, event_id: UUID) -> tuple[str, ...]:
        """Name the callbacks that are owed an event by this."""
        return tuple(row[1] for row in self.deliveries if row[0] == event_id)

    def repeat(self, submission: Submission, row: Any) -> Result:
        """Apply what was applied before, as it is read today; its place stays the same."""
        held = self._hold(submission)
        was_disputed = held is None or held.envelope.disputed
        is_changed, effect = self._apply_again(held, submission, row)
        self._store(submission, effect=effect, held=held, original=row.original_id)
        self._keep_place(row, is_changed=is_changed)
        if held is not None and held.envelope.disputed and not was_disputed:
            self._raise(DISPUTED, submission, held=held)
        return Result.REFRESHED if is_changed else Result.UNCHANGED

    def _apply_again(
        self, held: Held | None, submission: Submission, row: Any
    ) -> tuple[bool, Effect]:
        event, effect = submission.event, Effect(row.effect)
        if held is None or event is None:
            return False, effect
        if effect is Effect.REFRESHED:
            return self._bring_newer(held, event, submission), effect
        after, today = project(held.envelope, event, received_at=submission.received_at)
        is_changed = after != held.envelope
        if is_changed:
            held.envelope = after
            self._advance(held, sequence=0)
        # What it did at its time stands, though the same would be stale by now.
        is_news = today is Effect.APPLIED or effect is Effect.UNKNOWN or row.type != event.type
        return is_changed, today if is_news else effect

    def _keep_place(self, row: Any, *, is_changed: bool) -> None:
        values = dict(zip(COLUMNS.names, self.events[-1], strict=True))
        values["sequence"] = row.sequence
        values["content"] = values["content"] or row.content
        if not is_changed:
            values |= {"status": row.status, "version": row.version}
        self.events[-1] = tuple(values.values())

    def take_word(self, submission: Submission) -> None:
        """Let an envelope say what an event says, over whatever was said before."""
        held, event = self._hold(submission), submission.event
        if held is not None and event is not None:
            held.envelope = accept(held.envelope, event, received_at=submission.received_at)
            self._advance(held)

    def end_dispute(self, key: EnvelopeKey) -> None:
        """Say that nothing contradicts what is known of an envelope any more."""
        held = self.held[key]
        if held.envelope.disputed:
            held.envelope = replace(held.envelope, disputed=False)
            self._advance(held, sequence=0)

    def announce(self, submission: Submission, row: Any) -> None:
        """Owe an event whose word was taken, and say that it was."""
        held, event = self._hold(submission), submission.event
        assert event is not None  # what is not understood was refused
        self._store(submission, effect=Effect.APPLIED, held=held, original=row.original_id)
        self._owe(row.id, event.type, row.account, held)
        said = {
            "instead_of": str(row.original_id),
            "status": held.envelope.status if held is not None else None,
        }
        self._raise(ACCEPTED, submission, held=held, effect=Effect.APPLIED, more=said)


class _Recovery(_Work):
    """From quarantine: an event like any other, or a copy, or a contradiction."""

    async def apply(self) -> Reprojected:
        [judged] = await judge(self.connection, [self.submission], is_stored=True)
        conflicts = await claim_conflicts(self.connection, [judged])
        rewriting = await self.hold()
        rewriting.take(judged, conflicts=conflicts)
        await self.write(rewriting)
        result = Result(rewriting.facts[0].receipt.outcome.value)
        return self.done(result, rewriting)


class _Repetition(_Work):
    """Recorded before: the same event, as it is read today."""

    async def apply(self) -> Reprojected:
        event, row = self.submission.event, self.row
        assert event is not None  # what is not understood was refused
        if event.envelope_id != row.envelope_id:
            raise NotAllowed(
                f"event {row.id} was taken for one of envelope {row.envelope_id}, and reads as "
                f"one of {event.envelope_id} today: what it did there cannot be taken back"
            )
        is_copy = row.effect == Effect.REFRESHED
        owner = row.original_id if is_copy else row.id
        await events.claim(self.connection, dict.fromkeys(self.submission.claims, owner))
        rewriting = await self.hold()
        await self._refuse_overruled()
        result = rewriting.repeat(self.submission, row)
        if not is_copy:
            await self._owe(event.type, rewriting)
        await self.write(rewriting)
        return self.done(result, rewriting)

    async def _refuse_overruled(self) -> None:
        if self.row.envelope_id is None:
            return
        said = await events.history(self.connection, self.row.account, self.row.envelope_id)
        for each in said:
            if _overruled_by(each) == self.row.id:
                raise NotAllowed(f"event {self.row.id} was overruled: event {each.id} is accepted")

    async def _owe(self, event_type: str, rewriting: _Rewriting) -> None:
        """Owe it to those who were never owed it, at the place that it has."""
        row = self.row
        known = await replays.generations(self.connection, row.id)
        rewriting.deliveries += [
            (row.id, name, row.account, row.envelope_id, row.sequence)
            for name in self.interested(event_type, row.account)
            if name not in known
        ]


class _Acceptance(_Work):
    """A contradiction whose word counts from now on, by the decision of a person."""

    async def apply(self) -> Reprojected:
        overruled = await self._take_over()
        doubted = await self._doubted()
        rewriting = await self.hold(doubted)
        rewriting.take_word(self.submission)
        for key in rewriting.held:
            if not await self._is_disputed(key, rewriting.held[key].envelope.status, overruled):
                rewriting.end_dispute(key)
        rewriting.announce(self.submission, self.row)
        await self.write(rewriting)
        return self.done(Result.ACCEPTED, rewriting)

    async def _take_over(self) -> set[UUID]:
        """Own the keys that were contested; a copy of what is overruled is known from now on.

        Gives the events that are overruled.
        """
        row, submission = self.row, self.submission
        known = await events.claim(self.connection, dict.fromkeys(submission.claims, row.id))
        own = submission.keys.own if submission.keys is not None else None
        contested = [(row.account, own)] if own is not None else submission.claims
        overruled = {known[claim].event_id for claim in contested if claim in known}
        overruled = (overruled | {row.original_id}) - {row.id}
        taken = [claim for claim, each in known.items() if each.event_id in overruled]
        await events.repoint(self.connection, dict.fromkeys(taken, row.id))
        conflicts: dict[Claim, UUID] = {}
        for event_id in overruled:
            if content := await events.read_content(self.connection, event_id):
                conflicts[conflict_claim(row.account, row.id, content)] = event_id
        if conflicts:
            await events.claim(self.connection, conflicts)
        return overruled

    async def _doubted(self) -> EnvelopeKey | None:
        """Name the envelope that the contradiction cast doubt on; it may be another one."""
        original = await events.get(self.connection, self.row.original_id)
        if original is None or original.envelope_id is None:
            return None
        return original.account, original.envelope_id

    async def _is_disputed(
        self, key: EnvelopeKey, status: str | None, overruled: set[UUID]
    ) -> bool:
        """Whether anything else contradicts: an open conflict, or another end that was said."""
        said = await events.history(self.connection, *key)
        conflicts = {row.original_id for row in said if row.type == CONFLICT} - {self.row.id}
        effects = await events.effects_of(self.connection, conflicts)
        if Effect.CONFLICT in effects.values():
            return True
        gone = overruled | {_overruled_by(row) for row in said}
        ends = [ends_said(row.type, row.core_status) for row in said if _stands(row, gone)]
        return bool(set().union(*ends) - {status})


def _overruled_by(row: Any) -> UUID | None:
    """Name the event whose word this one took the place of."""
    is_accepted = row.effect == Effect.APPLIED and not row.type.startswith(OWN_EVENTS)
    return row.original_id if is_accepted else None


def _stands(row: Any, gone: set[UUID | None]) -> bool:
    return row.effect in {Effect.APPLIED, Effect.STALE} and row.id not in gone
