"""Envelopes computed anew from their events: as intake had them, and mended where they were not."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.errors import NotAllowed, NotFound
from app.intake.reproject import reproject
from app.intake.submission import Outcome
from app.store import callbacks, envelopes
from app.store.callbacks import Subscription
from app.store.models import AuditRow
from app.upkeep.rebuilding import REBUILT, Chosen, Progress, rebuild
from tests.factories import make_body
from tests.replicas import BODIES, DELIVERIES, ENVELOPES, EVENTS, Replica, execute, replica

ACTOR = "ada"
AUDIT: Any = AuditRow.__table__


@pytest.fixture(name="receiver")
async def _receiver(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url) as receiver:
        yield receiver


async def rebuilt(receiver: Replica, *, apply: bool = False, **chosen: Any) -> Progress:
    """Run it to its end; what it found on the way is put together."""
    found: list[Any] = []
    last = None
    steps = rebuild(
        receiver.database,
        Chosen(**chosen),
        actor=ACTOR,
        is_applied=apply,
        patience=timedelta(seconds=0.3),
    )
    async for last in steps:
        found += last.found
    assert last is not None
    return Progress(
        **{
            **{name: getattr(last, name) for name in Progress.__slots__},
            "found": tuple(found),
        }
    )


class Story:
    """A random life of some envelopes, by the real intake and the real verbs."""

    TYPES = (
        "created", "sent", "viewed", "in_progress", "signed", "declined", "voided", "extracted",
    )  # fmt: skip
    WORDS = (None, None, "pending", "signed", "completed", "odd", "even")
    NAMES = ("env_1", "env_2", "env_3")

    def __init__(self, receiver: Replica, seed: int) -> None:
        self.receiver = receiver
        self.random = random.Random(seed)
        self.sent: list[bytes] = []

    def body(self, **given: Any) -> bytes:
        pick = self.random.choice
        said = {
            "event": f"envelope.{pick(self.TYPES)}",
            "envelope_id": pick(self.NAMES),
            "event_id": pick([None, *(f"e{n}" for n in range(12))]),
            "status": pick(self.WORDS),
            "timestamp": pick([None, *(f"2026-07-{day:02}T10:00:00Z" for day in range(1, 9))]),
            "reason": pick([None, None, "dear", "late"]),
            "external_id": pick([None, "x", "y"]),
            "is_test": pick([None, True, False]),
            "fields_version": pick([None, 1, 2]),
            "fields_status": pick([None, "draft", "confirmed"]),
            "metadata": pick([None, {"a": 1.5}, {"b": 1e23}, {"c": ["x"]}]),
            "parties": pick([None, self.parties(), self.parties()]),
            **given,
        }
        return make_body(**said)

    def parties(self) -> list[dict[str, Any]]:
        names = self.random.sample(["ada", "bob", "eve"], self.random.randint(1, 3))
        statuses = ["waiting", "viewed", "signed", "declined", None]
        return [{"email": f"{n}@x.org", "status": self.random.choice(statuses)} for n in names]

    async def tell(self, moments: int) -> None:
        acts = [
            *[self.send] * 8,
            *[self.send_at_once] * 2,
            *[self.send_again] * 2,
            *[self.enrich] * 2,
            *[self.accept] * 3,
            self.fix_the_parser,
            self.leave_quarantine,
        ]
        for _ in range(moments):
            await self.random.choice(acts)()

    async def send(self) -> None:
        self.sent.append(self.body())
        await self.receiver.record(self.sent[-1])

    async def send_at_once(self) -> None:
        bodies = [self.body() for _ in range(4)]
        self.sent += bodies
        await self.receiver.together(*bodies, self.random.choice(bodies))

    async def send_again(self) -> None:
        if self.sent:
            await self.receiver.record(self.random.choice(self.sent))

    async def enrich(self) -> None:
        """A copy that says more than the first."""
        if self.sent:
            said = json.loads(self.random.choice(self.sent))
            said |= {"parties": self.parties(), "client_reference_id": self.random.choice("pq")}
            await self.receiver.record(json.dumps(said).encode())

    async def accept(self) -> None:
        await self.apply_again(EVENTS.c.effect == "conflict", is_accepted=True)

    async def fix_the_parser(self) -> None:
        """Let today's parser find in the bytes what that of the day had lost.

        Not in what was accepted: had more been read then, more would have been overruled.
        """
        is_first = EVENTS.c.original_id.is_(None) | (EVENTS.c.effect == "refreshed")
        done = await self.chosen(EVENTS.c.type.like("envelope.%"), is_first)
        if done is None:
            return
        query = select(BODIES.c.body).where(BODIES.c.event_id == done)
        [row] = await self.receiver.rows(query)
        said = json.loads(row.body)
        said.setdefault("send_error", self.random.choice(["bounced", "full"]))
        await rewrite(self.receiver, done, json.dumps(said).encode())
        if not await self.attempt(done):
            await rewrite(self.receiver, done, row.body)

    async def leave_quarantine(self) -> None:
        receipt = await self.receiver.record(b"[%d]" % self.random.randint(0, 10**9))
        assert Outcome.QUARANTINED == receipt.outcome
        body = self.random.choice([*self.sent, self.body()])
        await rewrite(self.receiver, receipt.event_id, body)
        await self.attempt(receipt.event_id)

    async def apply_again(self, *conditions: Any, **options: Any) -> None:
        if (id_ := await self.chosen(*conditions)) is not None:
            await self.attempt(id_, **options)

    async def chosen(self, *conditions: Any) -> UUID | None:
        rows = await self.receiver.rows(select(EVENTS.c.id).where(*conditions).order_by("id"))
        return self.random.choice(rows)[0] if rows else None

    async def attempt(self, event_id: UUID, **options: Any) -> bool:
        """Apply it again, unless that is refused: what it says was overruled, say."""
        try:
            await reproject(self.receiver.database, event_id, actor=ACTOR, **options)
        except NotAllowed:
            return False
        return True


async def rewrite(receiver: Replica, event_id: UUID, body: bytes) -> None:
    change = BODIES.update().where(BODIES.c.event_id == event_id).values(body=body)
    await execute(receiver.database, change)


async def damage(receiver: Replica, envelope_id: str, **values: Any) -> None:
    """Let a row say what none of its events has said."""
    same = ENVELOPES.c.id == envelope_id
    await execute(receiver.database, ENVELOPES.update().where(same).values(**values))


async def prune(receiver: Replica, event_id: UUID) -> None:
    await execute(receiver.database, BODIES.delete().where(BODIES.c.event_id == event_id))


def columns(done: Progress) -> list[tuple[str, str, Any, Any]]:
    return [(d.envelope_id, d.column, d.is_now, d.would_be) for d in done.found]


async def last_event(receiver: Replica, event_type: str) -> Any:
    query = select(EVENTS).where(EVENTS.c.type == event_type).order_by(EVENTS.c.id.desc())
    return (await receiver.rows(query.limit(1)))[0]


class TestWhatIsThere:
    @pytest.mark.parametrize("seed", range(4))
    async def test_is_what_is_computed_anew(self, receiver: Replica, seed: int) -> None:
        await Story(receiver, seed).tell(moments=40)

        done = await rebuilt(receiver)

        assert () == done.found
        assert (3, 0, 0, 0) == (done.done, done.different, done.from_row, done.busy)

    @pytest.mark.parametrize("seed", range(10, 12))
    async def test_is_that_again_once_it_was_mended(self, receiver: Replica, seed: int) -> None:
        story = Story(receiver, seed)
        await story.tell(moments=25)
        for name in story.NAMES:
            await damage(receiver, name, status="draft", parties=None, marks={}, disputed=True)

        mended = await rebuilt(receiver, apply=True)
        after = await rebuilt(receiver)
        await story.tell(moments=25)
        later = await rebuilt(receiver)

        assert (3, 3) == (mended.different, mended.applied)
        assert () == after.found
        assert () == later.found

    @pytest.mark.parametrize("seed", range(13, 15))
    async def test_is_enough_where_bytes_are_gone(self, receiver: Replica, seed: int) -> None:
        story = Story(receiver, seed)
        await story.tell(moments=50)
        for name in story.NAMES:
            event_id = await story.chosen(
                EVENTS.c.envelope_id == name, EVENTS.c.key_label == "main"
            )
            assert event_id is not None
            await prune(receiver, event_id)

        done = await rebuilt(receiver)

        assert () == done.found
        # What is a conflict is not needed.
        assert done.from_row > 0

    async def test_holds_when_nobody_knows_when_a_word_was_taken(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        said = {"envelope_id": "env_2", "event_id": "e1", "event": "envelope.declined"}
        second = await receiver.record(make_body(**said))
        other = await receiver.record(make_body(envelope_id="env_2", event_id="e1"))
        await reproject(receiver.database, second.event_id, actor=ACTOR, is_accepted=True)
        await execute(receiver.database, "DELETE FROM audit")

        done = await rebuilt(receiver)

        assert Outcome.CONFLICT == other.outcome
        assert () == done.found

    async def test_counts_what_only_looks_like_our_own(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1", event="receiver.odd", external_id="x"))

        done = await rebuilt(receiver)

        assert "x" == (await receiver.envelope("env_1")).external_id
        assert () == done.found


class TestWhatDiffers:
    async def test_is_told_and_left(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1", event="envelope.sent"))
        await receiver.record(make_body(envelope_id="env_2"))
        await damage(receiver, "env_1", status="signed", external_id="x")
        before = await receiver.envelope("env_1")

        done = await rebuilt(receiver)

        assert [("env_1", "status", "signed", "pending"), ("env_1", "external_id", "x", None)] == (
            columns(done)
        )
        assert (2, 2, 1, 0) == (done.total, done.done, done.different, done.applied)
        assert before == await receiver.envelope("env_1")

    async def test_is_mended_if_so_told(self, receiver: Replica) -> None:
        async with receiver.database.begin(limit=timedelta(seconds=5)) as connection:
            asked = [Subscription("own", ("receiver.*",)), Subscription("other", ("*",))]
            await callbacks.register(connection, asked)
        await receiver.record(make_body(envelope_id="env_1", event="envelope.sent"))
        await damage(receiver, "env_1", status="signed")
        before = await receiver.envelope("env_1")

        done = await rebuilt(receiver, apply=True)

        after, event = await receiver.envelope("env_1"), await last_event(receiver, REBUILT)
        assert (1, 1) == (done.different, done.applied)
        assert ("pending", before.version + 1, before.sequence + 1) == (
            after.status,
            after.version,
            after.sequence,
        )
        assert ("applied", "pending", after.version, after.sequence, "env_1") == (
            event.effect,
            event.status,
            event.version,
            event.sequence,
            event.envelope_id,
        )
        said = {"columns": ["status"], "was": "signed", "status": "pending"}
        [body] = await receiver.rows(select(BODIES.c.body).where(BODIES.c.event_id == event.id))
        ids = {"event_id": str(event.id), "envelope_id": "env_1"}
        assert {"event": REBUILT, **ids, **said} == json.loads(body.body)
        owed = select(DELIVERIES).where(DELIVERIES.c.event_id == event.id)
        assert [("own", event.sequence)] == [
            (row.callback, row.sequence) for row in await receiver.rows(owed)
        ]
        [audit] = await receiver.rows(select(AUDIT))
        assert (ACTOR, "envelope.rebuilt", "envelope:env_1") == (
            audit.actor,
            audit.action,
            audit.subject,
        )
        assert {"account": "acme", "event_id": str(event.id), **said} == audit.details

    async def test_may_come_of_a_parser_that_reads_otherwise(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await rewrite(receiver, receipt.event_id, make_body(envelope_id="env_1", metadata={"n": 1}))

        done = await rebuilt(receiver, apply=True)

        assert [("env_1", "metadata", {"customer": "c-1"}, {"n": 1})] == columns(done)
        assert () == (await rebuilt(receiver)).found

    async def test_does_not_keep_a_contradiction_from_being_accepted(
        self, receiver: Replica
    ) -> None:
        said = {"envelope_id": "env_1", "event_id": "e1"}
        await receiver.record(make_body(**said))
        await damage(receiver, "env_1", status="voided")
        await rebuilt(receiver, apply=True)
        second = await receiver.record(make_body(**said, event="envelope.declined"))
        disputed = await receiver.envelope("env_1")
        between = await rebuilt(receiver)
        await reproject(receiver.database, second.event_id, actor=ACTOR, is_accepted=True)

        done = await rebuilt(receiver)

        after = await receiver.envelope("env_1")
        assert disputed.disputed
        assert ("declined", False) == (after.status, after.disputed)
        assert ((), ()) == (between.found, done.found)


class TestBytesThatAreGone:
    async def test_leave_what_the_row_says(self, receiver: Replica) -> None:
        first = await receiver.record(make_body(envelope_id="env_1", external_id="x"))
        second = await receiver.record(make_body(envelope_id="env_1", event="envelope.viewed"))
        await prune(receiver, first.event_id)
        said = {"envelope_id": "env_1", "event": "envelope.viewed", "send_error": "bounced"}
        await rewrite(receiver, second.event_id, make_body(**said))

        done = await rebuilt(receiver, apply=True)

        after = await receiver.envelope("env_1")
        assert ["send_error", "marks"] == [d.column for d in done.found]
        assert (1, 1, "signed", "x") == (
            done.from_row,
            done.applied,
            after.status,
            after.external_id,
        )

    async def test_do_not_bring_back_what_was_overruled(self, receiver: Replica) -> None:
        said = {"envelope_id": "env_1", "event_id": "e1"}
        first = await receiver.record(make_body(**said))
        await receiver.record(make_body(envelope_id="env_1", event="envelope.viewed"))
        second = await receiver.record(make_body(**said, event="envelope.declined"))
        await reproject(receiver.database, second.event_id, actor=ACTOR, is_accepted=True)
        await prune(receiver, second.event_id)

        done = await rebuilt(receiver)

        assert first.event_id != second.event_id
        assert (1, ()) == (done.from_row, done.found)
        assert "declined" == (await receiver.envelope("env_1")).status

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"[]", id="nothing"),
            pytest.param(make_body(envelope_id="env_9"), id="another-envelope"),
        ],
    )
    async def test_are_those_that_say_something_else_today(
        self, receiver: Replica, body: bytes
    ) -> None:
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await rewrite(receiver, receipt.event_id, body)

        done = await rebuilt(receiver)

        assert (1, ()) == (done.from_row, done.found)


class TestErased:
    async def test_is_left_alone(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_1"))
        await damage(receiver, "env_1", parties=None, erased_at=datetime.now(UTC))

        done = await rebuilt(receiver, apply=True)

        assert (1, 1, 0, ()) == (done.done, done.erased, done.different, done.found)


class TestChoice:
    async def test_of_one_envelope(self, receiver: Replica) -> None:
        for account in ("acme", "beta"):
            await receiver.record(make_body(envelope_id="env_1"), account=account)
        await receiver.record(make_body(envelope_id="env_2"))
        await damage(receiver, "env_1", status="draft")

        both = await rebuilt(receiver, envelope_id="env_1")
        one = await rebuilt(receiver, envelope_id="env_1", account="beta")

        assert (2, 2, {"acme", "beta"}) == (both.total, both.done, {d.account for d in both.found})
        assert (1, {"beta"}) == (one.done, {d.account for d in one.found})

    async def test_of_one_that_is_not_there(self, receiver: Replica) -> None:
        with pytest.raises(NotFound, match="env_1"):
            await rebuilt(receiver, envelope_id="env_1")

    async def test_of_an_account(self, receiver: Replica) -> None:
        for account in ("acme", "beta", "zeta"):
            await receiver.record(make_body(envelope_id="env_1"), account=account)
        await damage(receiver, "env_1", status="draft")

        done = await rebuilt(receiver, account="beta")

        assert (1, 1, {"beta"}) == (done.total, done.done, {d.account for d in done.found})

    async def test_of_those_behind_one(self, receiver: Replica) -> None:
        for number in range(3):
            await receiver.record(make_body(envelope_id=f"env_{number}"))

        done = await rebuilt(receiver, after=("acme", "env_1"))

        assert (1, ("acme", "env_2")) == (done.done, done.last)

    async def test_of_all_takes_them_page_by_page(self, receiver: Replica) -> None:
        bodies = [make_body(envelope_id=f"env_{number:03}") for number in range(120)]
        await receiver.together(*bodies)
        # As if thousands of events had come: then fewer are taken at once.
        await damage(receiver, "env_050", version=5000)

        steps = [
            step
            async for step in rebuild(receiver.database, Chosen(), actor=ACTOR, is_applied=False)
        ]

        assert [0, 50, 51, 100, 120] == [step.done for step in steps]

    async def test_of_none_is_fine(self, receiver: Replica) -> None:
        done = await rebuilt(receiver)

        assert (0, 0) == (done.total, done.done)


class TestOthers:
    async def test_who_hold_an_envelope_are_waited_for(self, postgres_url: str) -> None:
        async with replica(postgres_url) as receiver:
            await receiver.record(make_body(envelope_id="env_1"))
            await damage(receiver, "env_1", status="draft")

            async with receiver.database.begin(limit=timedelta(seconds=50)) as connection:
                await envelopes.lock(connection, [("acme", "env_1")])
                held = await rebuilt(receiver, apply=True)
            free = await rebuilt(receiver, apply=True)

            assert (1, 0) == (held.busy, held.applied)
            assert (0, 1) == (free.busy, free.applied)

    async def test_who_record_meanwhile_lose_nothing(self, receiver: Replica) -> None:
        names = [f"env_{number}" for number in range(8)]
        await receiver.together(*[make_body(envelope_id=n, event="envelope.sent") for n in names])
        await execute(receiver.database, ENVELOPES.update().values(external_id="x"))

        async def go_on() -> None:
            for event in ("viewed", "in_progress", "declined"):
                said = [make_body(envelope_id=n, event=f"envelope.{event}") for n in names]
                assert {Outcome.RECORDED} == {*await receiver.together(*said)}

        mended, _ = await asyncio.gather(rebuilt(receiver, apply=True), go_on())
        done = await rebuilt(receiver, apply=mended.busy > 0)

        rows = [await receiver.envelope(name) for name in names]
        assert 8 == mended.applied + done.applied
        assert {("declined", None)} == {(row.status, row.external_id) for row in rows}

    async def test_who_mend_or_erase_it_meanwhile_are_believed(self, receiver: Replica) -> None:
        for name in ("env_1", "env_2", "env_3"):
            await receiver.record(make_body(envelope_id=name))
            await damage(receiver, name, status="draft")
        # As if thousands of events had come: then the others are compared after it.
        await damage(receiver, "env_1", version=5000)
        steps = rebuild(receiver.database, Chosen(), actor=ACTOR, is_applied=True)

        done = await anext(steps)
        while done.done < 1:
            done = await anext(steps)
        await rebuilt(receiver, apply=True, envelope_id="env_2")
        await damage(receiver, "env_3", erased_at=datetime.now(UTC))
        done = await anext(steps)

        await steps.aclose()
        assert (3, 1, 1, ()) == (done.done, done.different, done.applied, done.found)
        assert 1 == len(
            await receiver.rows(select(AUDIT).where(AUDIT.c.subject == "envelope:env_2"))
        )
