"""A stored event applied again: out of quarantine, after a fix, or by the word of a person."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.errors import NotAllowed, NotFound
from app.intake.reproject import Reprojected, Result, reproject
from app.intake.submission import Outcome
from app.store import callbacks, envelopes, events
from app.store.callbacks import Subscription
from app.store.models import AuditRow
from tests.factories import make_body
from tests.replicas import (
    BODIES,
    DELIVERIES,
    ENVELOPES,
    EVENTS,
    IDENTITIES,
    Replica,
    execute,
    replica,
)

ACTOR = "ada"
NOBODY = UUID("01890a5d-ac96-774b-bcce-b302099a8057")


@pytest.fixture(name="receiver")
async def _receiver(database_url: str) -> AsyncIterator[Replica]:
    """A replica that owes nothing by itself: what is owed is owed by what is tested."""
    async with replica(database_url, interested=lambda _type, _account: ()) as receiver:
        async with receiver.database.begin(limit=timedelta(seconds=5)) as connection:
            every, signed = (
                Subscription("every", ("*",)),
                Subscription("signed", ("envelope.signed",)),
            )
            own = Subscription("own", ("receiver.*",))
            await callbacks.register(connection, [every, signed, own])
        yield receiver


async def again(receiver: Replica, event_id: UUID, **options: Any) -> Reprojected:
    return await reproject(receiver.database, event_id, actor=ACTOR, **options)


async def event(receiver: Replica, event_id: UUID) -> Any:
    [row] = await receiver.rows(select(EVENTS).where(EVENTS.c.id == event_id))
    return row


async def owed(receiver: Replica, event_id: UUID) -> list[tuple[str, int | None]]:
    query = select(DELIVERIES).where(DELIVERIES.c.event_id == event_id)
    rows = await receiver.rows(query.order_by(DELIVERIES.c.callback))
    return [(row.callback, row.sequence) for row in rows]


async def audit(receiver: Replica) -> list[Any]:
    table: Any = AuditRow.__table__
    return list(await receiver.rows(select(table).order_by(table.c.id)))


async def quarantine(receiver: Replica, body: bytes, *, bad: bytes = b"[]") -> UUID:
    """Record bytes that an older release could not understand, and this one can."""
    receipt = await receiver.record(bad)
    assert Outcome.QUARANTINED == receipt.outcome
    await rewrite(receiver, receipt.event_id, body)
    return receipt.event_id


async def rewrite(receiver: Replica, event_id: UUID, body: bytes) -> None:
    """Let today's parser read other things in the bytes than that of the day did."""
    change = BODIES.update().where(BODIES.c.event_id == event_id).values(body=body)
    await execute(receiver.database, change)


async def prune(receiver: Replica, event_id: UUID) -> None:
    await execute(receiver.database, BODIES.delete().where(BODIES.c.event_id == event_id))


class TestQuarantine:
    async def test_is_left_for_an_event_like_any_other(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1", event="envelope.sent"))
        body = make_body(envelope_id="env_1", event_id="e1", timestamp="2026-07-01T10:00:00Z")
        id_ = await quarantine(receiver, body)

        done = await again(receiver, id_)

        row, envelope = await event(receiver, id_), await receiver.envelope("env_1")
        assert (Result.RECORDED, "applied", "quarantined") == (done.result, done.effect, done.was)
        assert ("envelope.signed", "env_1", "e1", "applied", 2, None) == (
            row.type,
            row.envelope_id,
            row.atlas_event_id,
            row.effect,
            row.sequence,
            row.reason,
        )
        assert ("signed", 2) == (envelope.status, envelope.version)
        assert [("every", 2), ("signed", 2)] == await owed(receiver, id_)
        assert ("every", "signed") == done.owed

    async def test_its_copies_are_known_from_then_on(self, receiver: Replica) -> None:
        body = make_body(envelope_id="env_1", event_id="e1")
        id_ = await quarantine(receiver, body)
        await again(receiver, id_)

        copies = [await receiver.record(body), await receiver.record(b"[]")]

        assert [(Outcome.DUPLICATE, id_)] * 2 == [(c.outcome, c.event_id) for c in copies]
        assert 2 == (await event(receiver, id_)).copies

    async def test_is_kept_for_what_is_still_not_understood(self, receiver: Replica) -> None:
        receipt = await receiver.record(b"[]")

        with pytest.raises(NotAllowed, match="not_an_object"):
            await again(receiver, receipt.event_id)

        assert "quarantined" == (await event(receiver, receipt.event_id)).effect
        assert [] == await audit(receiver)

    async def test_may_turn_out_to_hold_a_copy(self, receiver: Replica) -> None:
        body = make_body(envelope_id="env_1", event_id="e1")
        first = await receiver.record(body)
        id_ = await quarantine(receiver, body)
        before = await receiver.envelope("env_1")

        done = await again(receiver, id_)

        row = await event(receiver, id_)
        assert (Result.DUPLICATE, first.event_id, ()) == (done.result, done.original, done.owed)
        assert ("refreshed", first.event_id, None) == (row.effect, row.original_id, row.sequence)
        assert 1 == (await event(receiver, first.event_id)).copies
        assert before == await receiver.envelope("env_1")

    async def test_may_turn_out_to_hold_a_richer_copy(self, receiver: Replica) -> None:
        first = await receiver.record(make_body(envelope_id="env_1", event_id="e1", metadata=None))
        id_ = await quarantine(receiver, make_body(envelope_id="env_1", event_id="e1"))

        done = await again(receiver, id_)

        assert (Result.DUPLICATE, "refreshed") == (done.result, done.effect)
        assert first.event_id == done.original
        assert {"customer": "c-1"} == (await receiver.envelope("env_1")).metadata

    async def test_may_turn_out_to_hold_a_contradiction(self, receiver: Replica) -> None:
        first = await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        body = make_body(envelope_id="env_1", event_id="e1", event="envelope.declined")
        id_ = await quarantine(receiver, body)

        done = await again(receiver, id_)

        row = await event(receiver, id_)
        assert (Result.CONFLICT, first.event_id, ()) == (done.result, done.original, done.owed)
        assert ("conflict", first.event_id) == (row.effect, row.original_id)
        assert (await receiver.envelope("env_1")).disputed
        assert ["receiver.conflict", "receiver.disputed", "receiver.quarantined"] == (
            await receiver.own_events()
        )

    async def test_may_hold_a_contradiction_that_is_known(self, receiver: Replica) -> None:
        first = await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        body = make_body(envelope_id="env_1", event_id="e1", event="envelope.declined")
        known = await receiver.record(body)
        id_ = await quarantine(receiver, body)

        done = await again(receiver, id_)

        row = await event(receiver, id_)
        assert (Result.CONFLICT, "conflict", first.event_id) == (
            done.result,
            row.effect,
            row.original_id,
        )
        assert 1 == (await event(receiver, known.event_id)).copies

    async def test_may_hold_a_copy_about_no_envelope(self, receiver: Replica) -> None:
        body = b'{"event": "survey.answered", "event_id": "e1"}'
        first = await receiver.record(body)
        id_ = await quarantine(receiver, body)

        done = await again(receiver, id_)

        assert (Result.DUPLICATE, first.event_id, None) == (
            done.result,
            done.original,
            done.envelope_id,
        )

    async def test_is_left_once_by_two_at_once(self, receiver: Replica) -> None:
        id_ = await quarantine(receiver, make_body(envelope_id="env_1", event_id="e1"))

        done = await asyncio.gather(*(again(receiver, id_) for _ in range(3)))

        assert ["recorded", "unchanged", "unchanged"] == sorted(each.result for each in done)
        assert (1, 1) == (
            (await receiver.envelope("env_1")).version,
            (await receiver.envelope("env_1")).sequence,
        )
        assert 2 == len(await owed(receiver, id_))

    async def test_of_two_that_say_the_same_one_is_the_copy(self, receiver: Replica) -> None:
        """Each is applied by somebody else at the same time, and one of them arrives anew."""
        body = make_body(envelope_id="env_1", event_id="e1")
        first = await quarantine(receiver, body, bad=b"[1]")
        second = await quarantine(receiver, body, bad=b"[2]")

        results = await asyncio.gather(
            again(receiver, first), again(receiver, second), receiver.record(body)
        )

        said = sorted(
            each.result.value if isinstance(each, Reprojected) else each.outcome.value
            for each in results
        )
        assert ["duplicate", "duplicate", "recorded"] == said
        assert 1 == (await receiver.envelope("env_1")).sequence

    async def test_is_written_down(self, receiver: Replica) -> None:
        id_ = await quarantine(receiver, make_body(envelope_id="env_1"))

        await again(receiver, id_)

        (row,) = await audit(receiver)
        assert (ACTOR, "event.reprojected", f"event:{id_}") == (
            row.actor,
            row.action,
            row.subject,
        )
        assert {
            "result": "recorded",
            "from_effect": "quarantined",
            "effect": "applied",
            "original_id": None,
            "owed": ["every", "signed"],
        } == row.details


class TestRepetition:
    async def test_changes_nothing_if_nothing_has_changed(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1", status="completed"))
        before = await event(receiver, receipt.event_id), await receiver.envelope("env_1")

        done = await again(receiver, receipt.event_id)

        after = await event(receiver, receipt.event_id), await receiver.envelope("env_1")
        assert (Result.UNCHANGED, "applied") == (done.result, done.effect)
        assert before == after

    async def test_brings_what_was_lost(self, receiver: Replica) -> None:
        """A value was dropped by the parser of the day, and is understood today."""
        body = make_body(envelope_id="env_1", metadata="lost")
        receipt = await receiver.record(body)
        assert ["metadata"] == (await event(receiver, receipt.event_id)).degraded
        await receiver.record(make_body(envelope_id="env_1", event="envelope.viewed"))
        await rewrite(receiver, receipt.event_id, make_body(envelope_id="env_1"))

        done = await again(receiver, receipt.event_id)

        row, envelope = await event(receiver, receipt.event_id), await receiver.envelope("env_1")
        assert (Result.REFRESHED, "applied") == (done.result, done.effect)
        assert (None, 1, 3) == (row.degraded, row.sequence, row.version)
        assert ({"customer": "c-1"}, 3, 2) == (
            envelope.metadata,
            envelope.version,
            envelope.sequence,
        )

    async def test_gives_a_type_that_is_known_today_its_effect(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1", event="envelope.finished"))
        assert "unknown" == (await event(receiver, receipt.event_id)).effect
        await rewrite(receiver, receipt.event_id, make_body(envelope_id="env_1"))

        done = await again(receiver, receipt.event_id)

        assert ("applied", "envelope.signed") == (done.effect, done.type)
        assert "signed" == (await receiver.envelope("env_1")).status
        assert Outcome.DUPLICATE == await receiver.outcome(make_body(envelope_id="env_1"))

    async def test_keeps_an_effect_that_it_had_at_its_time(self, receiver: Replica) -> None:
        sent = await receiver.record(make_body(envelope_id="env_1", event="envelope.sent"))
        await receiver.record(make_body(envelope_id="env_1"))

        done = await again(receiver, sent.event_id)

        assert (Result.UNCHANGED, "applied") == (done.result, done.effect)

    async def test_owes_it_to_those_who_were_never_owed_it(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        first = await again(receiver, receipt.event_id)
        async with receiver.database.begin(limit=timedelta(seconds=5)) as connection:
            await callbacks.register(connection, [Subscription("late", ("*",))])

        second = await again(receiver, receipt.event_id)

        assert (("every", "signed"), ("late",)) == (first.owed, second.owed)
        assert [("every", 1), ("late", 1), ("signed", 1)] == (
            await owed(receiver, receipt.event_id)
        )

    async def test_of_a_copy_owes_nothing(self, receiver: Replica) -> None:
        first = await receiver.record(make_body(envelope_id="env_1", event_id="e1", metadata=None))
        richer = make_body(envelope_id="env_1", event_id="e1")
        await receiver.record(richer)
        [copy] = await receiver.rows(select(EVENTS).where(EVENTS.c.effect == "refreshed"))
        newest = make_body(envelope_id="env_1", event_id="e1", metadata={"customer": "c-9"})
        await rewrite(receiver, copy.id, newest)

        done = await again(receiver, copy.id)

        assert (Result.REFRESHED, "refreshed", ()) == (done.result, done.effect, done.owed)
        assert first.event_id == done.original
        assert {"customer": "c-9"} == (await receiver.envelope("env_1")).metadata

    async def test_may_reveal_a_dispute(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1"))
        other = await receiver.record(make_body(envelope_id="env_1", event="envelope.ended"))
        declined = make_body(envelope_id="env_1", event="envelope.declined")
        await rewrite(receiver, other.event_id, declined)

        done = await again(receiver, other.event_id)

        envelope = await receiver.envelope("env_1")
        assert ("stale", True, "signed") == (done.effect, envelope.disputed, envelope.status)
        assert ["receiver.disputed"] == await receiver.own_events()

    async def test_about_no_envelope_is_fine(self, receiver: Replica) -> None:
        receipt = await receiver.record(b'{"event": "survey.answered", "event_id": "e1"}')

        done = await again(receiver, receipt.event_id)

        assert (Result.UNCHANGED, "unknown", ("every",)) == (done.result, done.effect, done.owed)

    async def test_waits_for_a_key_that_somebody_is_claiming(self, postgres_url: str) -> None:
        async with replica(postgres_url, interested=lambda _type, _account: ()) as receiver:
            id_ = await quarantine(receiver, make_body(envelope_id="env_1", event_id="e1"))

            async with receiver.database.begin(limit=timedelta(seconds=50)) as connection:
                await events.claim(connection, {("acme", "id:e1"): NOBODY})
                with pytest.raises(NotAllowed, match="waits for others"):
                    await again(receiver, id_, limit=timedelta(seconds=1.5))
                waiting = asyncio.create_task(again(receiver, id_))
                await asyncio.sleep(0.3)
                await events.disown(connection, [("acme", "id:e1")])

            assert Result.RECORDED == (await waiting).result

    async def test_about_another_envelope_is_refused(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await rewrite(receiver, receipt.event_id, make_body(envelope_id="env_2"))

        with pytest.raises(NotAllowed, match="reads as one of env_2 today"):
            await again(receiver, receipt.event_id)

    async def test_waits_for_an_envelope_that_somebody_holds(self, postgres_url: str) -> None:
        async with replica(postgres_url, interested=lambda _type, _account: ()) as receiver:
            receipt = await receiver.record(make_body(envelope_id="env_1"))

            async with receiver.database.begin(limit=timedelta(seconds=50)) as connection:
                await envelopes.lock(connection, [("acme", "env_1")])
                with pytest.raises(NotAllowed, match="waits for others"):
                    await again(receiver, receipt.event_id, limit=timedelta(seconds=1.5))
                waiting = asyncio.create_task(again(receiver, receipt.event_id))
                await asyncio.sleep(0.1)

            assert Result.UNCHANGED == (await waiting).result


class TestAcceptance:
    async def dispute(self, receiver: Replica, **fields: Any) -> tuple[UUID, UUID]:
        """Let Atlas say two things under one id; gives both events."""
        first = await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        said = {"envelope_id": "env_1", "event_id": "e1", "event": "envelope.declined", **fields}
        second = await receiver.record(make_body(**said))
        assert Outcome.CONFLICT == second.outcome
        return first.event_id, second.event_id

    async def test_takes_the_status_down(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver, reason="too dear")
        before = await receiver.envelope("env_1")

        done = await again(receiver, second, is_accepted=True)

        row, envelope = await event(receiver, second), await receiver.envelope("env_1")
        assert (Result.ACCEPTED, "conflict", "applied", first) == (
            done.result,
            done.was,
            done.effect,
            done.original,
        )
        assert ("declined", "too dear", False) == (
            envelope.status,
            envelope.decline_reason,
            envelope.disputed,
        )
        assert envelope.version > before.version
        assert ("applied", "declined", before.sequence + 1) == (
            row.effect,
            row.status,
            row.sequence,
        )
        assert [("every", row.sequence)] == await owed(receiver, second)

    async def test_is_an_event_of_its_own_kind(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver)

        await again(receiver, second, is_accepted=True)

        [own] = await receiver.rows(select(EVENTS).where(EVENTS.c.type == "receiver.accepted"))
        envelope = await receiver.envelope("env_1")
        assert ("applied", "declined", envelope.version, envelope.sequence, second) == (
            own.effect,
            own.status,
            own.version,
            own.sequence,
            own.original_id,
        )
        [body] = await receiver.rows(select(BODIES.c.body).where(BODIES.c.event_id == own.id))
        assert {
            "event": "receiver.accepted",
            "event_id": str(own.id),
            "about": str(second),
            "type": "envelope.declined",
            "reason": None,
            "envelope_id": "env_1",
            "instead_of": str(first),
            "status": "declined",
        } == json.loads(body.body)
        assert [("own", own.sequence)] == await owed(receiver, own.id)
        assert ["event.accepted"] == [row.action for row in await audit(receiver)]

    async def test_must_be_asked_for(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver)

        with pytest.raises(NotAllowed, match=f"contradicts event {first}.*--accept"):
            await again(receiver, second)

        assert "signed" == (await receiver.envelope("env_1")).status

    async def test_of_what_contradicts_nothing_is_refused(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))

        with pytest.raises(NotAllowed, match="contradicts nothing"):
            await again(receiver, receipt.event_id, is_accepted=True)

    async def test_is_done_once_by_two_at_once(self, receiver: Replica) -> None:
        _, second = await self.dispute(receiver)

        done = await asyncio.gather(
            *(again(receiver, second, is_accepted=True) for _ in range(2)), return_exceptions=True
        )

        (refused,) = [each for each in done if isinstance(each, BaseException)]
        assert "contradicts nothing" in str(refused)
        assert 1 == (await receiver.own_events()).count("receiver.accepted")

    async def test_is_done_once_if_another_comes_between(
        self, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between reading what is to be done, and the locks that it takes."""
        async with replica(postgres_url, interested=lambda _type, _account: ()) as receiver:
            _, second = await self.dispute(receiver)
            read = events.read_body

            async def hesitate(*arguments: Any) -> Any:
                monkeypatch.undo()
                done.append(await again(receiver, second, is_accepted=True))
                return await read(*arguments)

            done: list[Any] = []
            monkeypatch.setattr(events, "read_body", hesitate)
            with pytest.raises(NotAllowed, match="contradicts nothing"):
                await again(receiver, second, is_accepted=True)

            assert [Result.ACCEPTED] == [each.result for each in done]
            assert 1 == (await receiver.own_events()).count("receiver.accepted")

    async def test_is_not_undone_by_copies_of_either(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver)
        await again(receiver, second, is_accepted=True)
        before = await receiver.envelope("env_1")
        said = {"envelope_id": "env_1", "event_id": "e1"}

        outcomes = [
            await receiver.record(make_body(**said)),
            await receiver.record(make_body(**said, event="envelope.declined")),
        ]

        assert [(Outcome.CONFLICT, first), (Outcome.DUPLICATE, second)] == [
            (each.outcome, each.event_id) for each in outcomes
        ]
        assert before == await receiver.envelope("env_1")

    async def test_is_not_undone_by_what_it_overruled(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver)
        await again(receiver, second, is_accepted=True)

        with pytest.raises(NotAllowed, match=f"overruled: event {second} is accepted"):
            await again(receiver, first)
        repeated = await again(receiver, second)

        assert Result.UNCHANGED == repeated.result
        assert "declined" == (await receiver.envelope("env_1")).status

    async def test_leaves_what_else_is_disputed(self, receiver: Replica) -> None:
        _, second = await self.dispute(receiver)
        third = make_body(envelope_id="env_1", event_id="e1", event="envelope.voided")
        other = await receiver.record(third)

        await again(receiver, second, is_accepted=True)
        was_disputed = (await receiver.envelope("env_1")).disputed
        await again(receiver, other.event_id, is_accepted=True)

        envelope = await receiver.envelope("env_1")
        assert was_disputed
        assert ("voided", False) == (envelope.status, envelope.disputed)

    async def test_leaves_another_end_that_was_said(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1", event="envelope.voided"))
        _, second = await self.dispute(receiver)

        await again(receiver, second, is_accepted=True)

        envelope = await receiver.envelope("env_1")
        assert ("declined", True) == (envelope.status, envelope.disputed)

    async def test_may_be_of_another_envelope(self, receiver: Replica) -> None:
        _, second = await self.dispute(receiver, envelope_id="env_2")
        assert (await receiver.envelope("env_1")).disputed

        done = await again(receiver, second, is_accepted=True)

        doubted, other = await receiver.envelope("env_1"), await receiver.envelope("env_2")
        assert "env_2" == done.envelope_id
        assert ("signed", False) == (doubted.status, doubted.disputed)
        assert ("declined", False) == (other.status, other.disputed)

    async def test_of_another_reason_takes_that(self, receiver: Replica) -> None:
        said = {"envelope_id": "env_1", "event": "envelope.declined"}
        late = "2026-07-02T10:00:00Z"
        await receiver.record(make_body(**said, reason="z", timestamp=late))
        second = await receiver.record(make_body(**said, reason="a"))
        assert Outcome.CONFLICT == second.outcome

        await again(receiver, second.event_id, is_accepted=True)
        copy = await receiver.outcome(make_body(**said, reason="z", timestamp=late))

        envelope = await receiver.envelope("env_1")
        assert ("declined", "a", False) == (
            envelope.status,
            envelope.decline_reason,
            envelope.disputed,
        )
        assert Outcome.CONFLICT == copy

    async def test_of_what_says_no_status_leaves_it(self, receiver: Replica) -> None:
        said = {"envelope_id": "env_1", "event": "envelope.viewed", "event_id": "e9"}
        await receiver.record(make_body(envelope_id="env_1", event="envelope.sent"))
        await receiver.record(make_body(**said))
        second = await receiver.record(make_body(**said, status="odd"))
        assert Outcome.CONFLICT == second.outcome

        await again(receiver, second.event_id, is_accepted=True)

        envelope = await receiver.envelope("env_1")
        assert ("pending", "odd", False) == (
            envelope.status,
            envelope.status_word,
            envelope.disputed,
        )

    async def test_about_no_envelope_is_fine(self, receiver: Replica) -> None:
        await receiver.record(b'{"event": "survey.answered", "event_id": "e1"}')
        second = await receiver.record(b'{"event": "survey.begun", "event_id": "e1"}')
        assert Outcome.CONFLICT == second.outcome

        done = await again(receiver, second.event_id, is_accepted=True)

        assert (Result.ACCEPTED, None, ("every",)) == (done.result, done.envelope_id, done.owed)

    async def test_does_without_the_bytes_of_what_it_overrules(self, receiver: Replica) -> None:
        first, second = await self.dispute(receiver)
        await prune(receiver, first)

        await again(receiver, second, is_accepted=True)

        keys = await receiver.rows(select(IDENTITIES).where(IDENTITIES.c.event_id == second))
        assert {"id:e1", "once:env_1:envelope.declined"} <= {row.key for row in keys}

    async def test_waits_for_the_other_envelope(self, postgres_url: str) -> None:
        async with replica(postgres_url, interested=lambda _type, _account: ()) as receiver:
            _, second = await self.dispute(receiver, envelope_id="env_2")

            async with receiver.database.begin(limit=timedelta(seconds=50)) as connection:
                await envelopes.lock(connection, [("acme", "env_1")])
                with pytest.raises(NotAllowed, match="waits for others"):
                    await again(receiver, second, is_accepted=True, limit=timedelta(seconds=1.5))

            assert "conflict" == (await event(receiver, second)).effect


class TestRefusals:
    async def test_of_what_is_not_there(self, receiver: Replica) -> None:
        with pytest.raises(NotFound, match=str(NOBODY)):
            await again(receiver, NOBODY)

    async def test_of_bytes_that_are_gone(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await prune(receiver, receipt.event_id)

        with pytest.raises(NotAllowed, match="no longer kept"):
            await again(receiver, receipt.event_id)

    async def test_of_events_of_the_service_about_itself(self, receiver: Replica) -> None:
        await receiver.record(b"[]")
        [own] = await receiver.rows(select(EVENTS).where(EVENTS.c.type == "receiver.quarantined"))

        with pytest.raises(NotAllowed, match="one of the service about itself"):
            await again(receiver, own.id)

    async def test_of_what_only_a_later_release_understands(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await execute(receiver.database, EVENTS.update().values(effect="merged"))

        with pytest.raises(NotAllowed, match="a later release has dealt with event"):
            await again(receiver, receipt.event_id)

    async def test_leave_everything_as_it_was(self, receiver: Replica) -> None:
        """One transaction: what fails at its end has not begun."""
        id_ = await quarantine(receiver, make_body(envelope_id="env_1"))
        await execute(receiver.database, "ALTER TABLE audit RENAME TO missing")

        with pytest.raises(Exception, match="audit"):
            await again(receiver, id_)

        assert "quarantined" == (await event(receiver, id_)).effect
        assert [] == await receiver.rows(select(ENVELOPES))

    async def test_of_the_database_are_explained(self, postgres_url: str) -> None:
        async with replica(postgres_url) as receiver:
            id_ = await quarantine(receiver, make_body(envelope_id="env_1"))
            rule = "ALTER TABLE events ADD CONSTRAINT short CHECK (length(type) < 5) NOT VALID"
            await execute(receiver.database, rule)

            with pytest.raises(NotAllowed, match=r"cannot hold what event .* says \(23514\)"):
                await again(receiver, id_)
