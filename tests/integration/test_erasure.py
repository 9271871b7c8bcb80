"""Personal data erased on purpose: every place that held it, and what stays."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import structlog
from sqlalchemy import select

from app.callbacks import Callbacks, Event, GiveUp
from app.callbacks.shelf import Directory, Shelf, ShelfError, remove_documents
from app.errors import NotAllowed, NotFound
from app.events.erasure import ERASED
from app.store import callbacks as register
from app.store import deliveries, envelopes, feed, keys, terms
from app.store import erasure as store
from app.store.base import Base
from app.store.callbacks import Subscription
from app.store.envelopes import EnvelopesBusy
from app.store.models import AttemptRow, AuditRow, ExpectationRow, ShapeRow
from app.upkeep import erasure
from app.upkeep.erasure import Erased, Search, Traces
from tests.factories import make_body
from tests.integration.ledger import Ledger, until
from tests.replicas import BODIES, DELIVERIES, ENVELOPES, EVENTS, Replica, execute, replica

LIMIT = timedelta(seconds=10)
CANARY = "canary4711"
EMAIL = f"{CANARY}@example.com"
ATTEMPTS: Any = AttemptRow.__table__
AUDIT: Any = AuditRow.__table__
EXPECTATIONS: Any = ExpectationRow.__table__
SHAPES: Any = ShapeRow.__table__
# Everything that callers and Atlas may write in words of their own.
WORDY: dict[str, Any] = {
    "envelope_id": "env_1",
    "status": f"status {CANARY}",
    "parties": [{"email": EMAIL, "name": CANARY, "role": CANARY, "status": "viewed"}],
    "metadata": {CANARY: [CANARY], "note": {"deep": CANARY}},
    "external_id": CANARY,
    "client_reference_id": CANARY,
    "send_error": CANARY,
    "detection_error": CANARY,
    "fields_status": CANARY,
    "extraction": {CANARY: CANARY},
    "reason": CANARY,
    "title": CANARY,
}


class World:
    """A replica, what is owed, an archive: one account with traces all over."""

    def __init__(self, receiver: Replica, ledger: Ledger, shelf: Directory, root: Path) -> None:
        self.receiver = receiver
        self.ledger = ledger
        self.shelf: Shelf = shelf
        self.root = root
        self.database = receiver.database

    async def keep_file(self, envelope_id: str = "env_1", content: bytes = b"%PDF") -> str:
        stem = sha256(f"default\n{envelope_id}".encode()).hexdigest()[:32]
        name = f"default/{datetime.now(UTC):%Y/%m}/{stem}-{sha256(content).hexdigest()[:16]}.pdf"
        async with self.shelf.draft() as draft:
            draft.write(content + CANARY.encode())
            await self.shelf.keep(draft, name)
        change = ENVELOPES.update().where(ENVELOPES.c.id == envelope_id)
        await execute(self.database, change.values(archive_name=name, archive_sha256="0" * 64))
        return name

    async def search(self, what: str = "env_1", account: str | None = None) -> Search:
        if "@" in what:
            return erasure.of_address(what, account)
        return await erasure.of_envelope(self.database, what, account)

    async def find(self, search: Search) -> Traces:
        return [found async for found in erasure.find(self.database, search, at_once=3)][-1]

    async def erase(
        self, what: str = "env_1", *, account: str | None = None, is_dry: bool = False
    ) -> Erased:
        search = await self.search(what, account)
        found = await self.find(search)
        remove = partial(remove_documents, self.shelf)
        steps = erasure.erase(
            self.database, search, found, actor="ada", remove_files=remove, is_dry=is_dry
        )
        return [step async for step in steps][-1]

    async def traces(self, *, of: str = CANARY) -> list[str]:
        """Name every table and file that holds the canary, however it is written there."""
        held = []
        for table in Base.metadata.sorted_tables:
            rows = await self.receiver.rows(select(table))
            if of in repr([tuple(row) for row in rows]).lower():
                held.append(table.name)
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return held + [path.name for path in files if of.encode() in path.read_bytes()]

    async def act(self, subject: str, **details: Any) -> None:
        async with self.database.begin(limit=LIMIT) as connection:
            await deliveries.audit(
                connection, actor="ada", action="x", subject=subject, details=details
            )

    async def acts(self, subject: str) -> list[Any]:
        return list(await self.receiver.rows(select(AUDIT).where(AUDIT.c.subject == subject)))

    async def version(self, envelope_id: str = "env_1") -> int:
        return int((await self.receiver.envelope(envelope_id)).version)

    async def erasures(self) -> list[str | None]:
        async with self.database.begin(limit=LIMIT) as connection:
            await feed.place(connection, holder="me", span=LIMIT, limit=1000)
            items = await feed.read(connection, 0, limit=1000)
        return [item.envelope_id for item in items if item.kind == feed.Kind.ERASURE]


@pytest.fixture(name="world")
async def _world(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    root = tmp_path / "archive"
    ledger = Ledger(database_url)
    async with replica(database_url, account="default", interested=interested) as receiver:
        yield World(receiver, ledger, Directory(root), root)
    await ledger.database.close()


def interested(event_type: str, _: str) -> tuple[str, ...]:
    return ("filing",) if event_type.startswith("envelope.") else ()


def filing() -> Callbacks:
    """A callback that quotes what it fails at."""
    callbacks = Callbacks()

    @callbacks.on("envelope.*", name="filing")
    async def fail(event: Event) -> None:
        raise GiveUp(f"cannot file {event.data.get('metadata')}")

    return callbacks


async def spread(world: World) -> list[UUID]:
    """Leave the canary wherever it can be; give the ids of what Atlas said."""
    async with world.database.begin(limit=LIMIT) as connection:
        await register.register(connection, [Subscription("own", ("receiver.dead",))])
    said = [
        make_body(event="envelope.sent", event_id="evt_1", **WORDY),
        make_body(event="envelope.declined", event_id="evt_2", **WORDY),
        make_body(event="envelope.declined", event_id="evt_2", **{**WORDY, "reason": "other"}),
        make_body(event="envelope.sent", event_id="evt_1", **{**WORDY, "envelope_id": "env_9"}),
        make_body(event="envelope.odd", **{**WORDY, "metadata": f"no json {CANARY}"}),
        json.dumps({"event": 5, "envelope_id": "env_1", "who": CANARY}).encode(),
    ]
    receipts = [await world.receiver.record(body) for body in said]
    with world.ledger.dispatching(filing()):
        await until(lambda: _all_dead(world))
    async with world.database.begin(limit=LIMIT) as connection:
        await terms.learn(connection, [("default", "env_1")])
    row = {"account": "default", "envelope_id": "env_1", "consumer": CANARY}
    await execute(world.database, EXPECTATIONS.insert().values(**row, created_at=datetime.now(UTC)))
    await world.act(f"event:{receipts[0].event_id}", reason=f"because of {CANARY}", result="x")
    await world.act("envelope:env_1", reason=CANARY)
    await world.keep_file()
    return [receipt.event_id for receipt in receipts]


async def _all_dead(world: World) -> bool:
    # The conflicts and the one in quarantine are owed to nobody.
    return ["dead"] * 3 == [d.state for d in await world.ledger.deliveries(callback="filing")]


class TestEnvelope:
    async def test_leaves_no_trace_of_what_anybody_wrote(self, world: World) -> None:
        await spread(world)
        places = {"envelopes", "events", "bodies", "deliveries", "attempts", "terms"}
        assert places | {"expectations", "audit"} <= set(await world.traces())

        done = await world.erase()

        assert [] == await world.traces()
        assert [] == done.failures
        touched = {place for place, count in done.counts.items() if count}
        assert places | {"expectations", "audit", "files"} == touched

    async def test_leaves_what_recognises_a_copy(self, world: World) -> None:
        ids = await spread(world)
        before = await world.receiver.envelope("env_1")

        await world.erase()

        kept = await world.receiver.rows(select(EVENTS.c.id).where(EVENTS.c.id.in_(ids)))
        assert set(ids) == {row.id for row in kept}
        after = await world.receiver.envelope("env_1")
        assert (before.status, before.sent_at, before.total) == (
            after.status,
            after.sent_at,
            after.total,
        )
        again = await world.receiver.record(
            make_body(event="envelope.declined", event_id="evt_2", **WORDY)
        )
        assert ids[1] == again.event_id
        assert [] == await world.traces()

    async def test_is_seen_by_whoever_follows(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        before = await world.version()

        await world.erase()

        row = await world.receiver.envelope("env_1")
        assert row.version > before
        assert row.erased_at is not None
        assert ["env_1"] == await world.erasures()
        [act] = await world.acts("envelope:env_1")
        assert ("ada", "envelope.erased") == (act.actor, act.action)
        assert {"account": "default", "by": "envelope"} == act.details

    async def test_a_second_time_changes_nothing(self, world: World) -> None:
        await spread(world)
        await world.erase()
        before = await world.version()

        done = await world.erase()

        assert {0} == set(done.counts.values())
        assert before == await world.version()
        assert ["env_1"] == await world.erasures()

    async def test_leaves_others_alone(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        await world.receiver.record(make_body(**{**WORDY, "envelope_id": "env_11"}))
        loose = await world.receiver.record(b'{"event": 5, "envelope_id": "env_11"}')
        before = await world.receiver.envelope("env_11")

        await world.erase()

        assert before == await world.receiver.envelope("env_11")
        kept = {row.event_id for row in await world.receiver.rows(select(BODIES.c.event_id))}
        assert loose.event_id in kept

    async def test_of_another_account_stays(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        await world.receiver.record(make_body(**WORDY), account="beta")
        await world.act("envelope:env_1", account="beta", reason="of the other")

        with pytest.raises(NotAllowed, match="beta, default"):
            await world.erase()
        await world.erase(account="default")

        beta = await world.receiver.envelope("env_1", account="beta")
        assert beta.erased_at is None
        assert beta.parties is not None
        assert "of the other" in repr(await world.acts("envelope:env_1"))

    async def test_that_is_not_there(self, world: World) -> None:
        with pytest.raises(NotFound, match="env_1"):
            await world.erase()

    async def test_can_be_rehearsed(self, world: World) -> None:
        await spread(world)
        before = await world.traces()

        rehearsed = await world.erase(is_dry=True)

        assert before == await world.traces()
        assert rehearsed.counts == (await world.erase()).counts

    async def test_waits_for_whoever_holds_it(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        async with world.ledger.transaction() as connection:
            if world.database.is_postgresql:
                await envelopes.lock(connection, [("default", "env_1")])
            erasing = asyncio.create_task(world.erase())
            await asyncio.wait([erasing], timeout=0.3)

            assert not erasing.done()
        await erasing
        assert [] == await world.traces()

    async def test_comes_again_instead_of_waiting_inside_a_transaction(
        self, postgres_url: str
    ) -> None:
        async with replica(postgres_url) as one:
            await one.record(make_body(**WORDY))
            key = (one.account, "env_1")
            async with one.database.begin(limit=LIMIT) as holder:
                assert await store.lock(holder, key)
                async with one.database.begin(limit=LIMIT) as other:
                    with pytest.raises(EnvelopesBusy):
                        await store.lock(other, key)

    async def test_computes_what_a_later_copy_is_compared_with(self, world: World) -> None:
        first = await world.receiver.record(make_body(event_id="evt_1", **WORDY))

        await world.erase()

        again = await world.receiver.record(make_body(event_id="evt_2", **WORDY))
        assert first.event_id == again.event_id


class TestWhatIsOwed:
    async def test_is_still_owed(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))

        await world.erase()

        assert ["pending"] == await world.ledger.states()

    async def test_and_under_way_is_taken_back_from_its_worker(self, world: World) -> None:
        """What its attempt would write down may quote what is gone."""
        await world.receiver.record(make_body(**WORDY))
        await world.ledger.register("filing")
        [claim] = await world.ledger.claim("filing")

        await world.erase()

        [delivery] = await world.ledger.deliveries()
        assert ("pending", 0) == (delivery.state, delivery.attempts)
        assert delivery.due_at is not None
        [row] = await world.receiver.rows(select(DELIVERIES))
        assert row.token > claim.token

    async def test_dead_letters_stay_without_their_error(self, world: World) -> None:
        await spread(world)

        await world.erase()

        for delivery in await world.ledger.deliveries(callback="filing"):
            assert ("dead", ERASED) == (delivery.state, delivery.last_error)
            [attempt] = await world.ledger.attempts(delivery.id)
            assert ERASED == attempt.error


class TestFiles:
    async def test_older_ones_go_too(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        await world.keep_file(content=b"%PDF-1")
        await world.keep_file(content=b"%PDF-2")
        await world.receiver.record(make_body(envelope_id="env_2"))
        of_other = await world.keep_file("env_2")

        done = await world.erase()

        assert 2 == done.counts["files"]
        left = [path.name for path in world.root.rglob("*.pdf")]
        assert [of_other.rpartition("/")[2]] == left
        row = await world.receiver.envelope("env_1")
        assert (None, None, None) == (row.archived_at, row.archive_name, row.archive_sha256)

    async def test_of_before_the_account_was_renamed_go_too(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        await world.keep_file()
        async with world.database.begin(limit=LIMIT) as connection:
            await keys.rename(connection, "default", "acme", actor="ada", at=datetime.now(UTC))

        done = await world.erase()

        assert (1, []) == (done.counts["files"], done.failures)
        assert [] == await world.traces()

    async def test_that_cannot_be_removed_are_reported_and_removed_the_next_time(
        self, world: World
    ) -> None:
        await world.receiver.record(make_body(**WORDY))
        name = await world.keep_file()
        shelf, world.shelf = world.shelf, Directory(world.root / name)

        failed = await world.erase()

        assert "was not removed" in failed.failures[0]
        assert name == (await world.receiver.envelope("env_1")).archive_name
        world.shelf = shelf
        assert [] == (await world.erase()).failures
        assert [] == await world.traces()

    async def test_that_are_elsewhere_are_reported(self, world: World, tmp_path: Path) -> None:
        await world.receiver.record(make_body(**WORDY))
        name = await world.keep_file()
        world.shelf = Directory(tmp_path / "elsewhere")

        done = await world.erase()

        assert [name in failure for failure in done.failures] == [True]

    async def test_a_full_disk_is_named(self, world: World) -> None:
        with pytest.raises(ShelfError):
            await remove_documents(
                Directory(Path("/dev/null")), "default", "env_1", [datetime.now(UTC)]
            )
        assert world.root.parent.is_dir()


class TestAddress:
    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"parties": [{"email": EMAIL.upper()}]}, id="party"),
            pytest.param({"metadata": {"sent by": f"<{EMAIL}>"}}, id="metadata"),
            pytest.param({"title": f"Contract with {EMAIL}"}, id="body"),
            pytest.param({"sign_url": f"https://x.example/?to={EMAIL}"}, id="link"),
        ],
    )
    async def test_erases_each_envelope_that_mentions_it(
        self, world: World, fields: dict[str, Any]
    ) -> None:
        await world.receiver.record(make_body(envelope_id="env_1", **fields))
        await world.receiver.record(make_body(envelope_id="env_2"))

        done = await world.erase(EMAIL)

        assert 1 == done.counts["envelopes"]
        assert [] == await world.traces()
        assert (await world.receiver.envelope("env_2")).erased_at is None

    async def test_leaves_no_trace_anywhere(self, world: World) -> None:
        texts = {k: v for k, v in WORDY.items() if k not in {"parties", "envelope_id"}}
        wordy = {**WORDY, **dict.fromkeys(texts, EMAIL)}
        await world.receiver.record(make_body(event="envelope.sent", **wordy))
        await world.receiver.record(make_body(**wordy), account="beta")
        await world.receiver.record(b'{"who": "' + EMAIL.upper().encode() + b'"')
        await world.receiver.record(json.dumps({"event": "billing.due", "to": EMAIL}).encode())
        other = await world.receiver.record(make_body(envelope_id="env_2"))
        await world.act("callback:filing", reason=f"{EMAIL} asked", count=3)
        await world.act("callback:crm", reason="slow")
        await leave_error(world, other.event_id)
        shape = {"type": "envelope.sent", "kind": "field", "path": f"metadata.{EMAIL}"}
        seen = {"first_seen_at": datetime.now(UTC), "event_id": other.event_id}
        await execute(world.database, SHAPES.insert().values(**shape, **seen))

        done = await world.erase(EMAIL)

        assert [] == await world.traces(of=EMAIL)
        assert {"envelopes": 2, "bodies": 6, "shapes": 1} == {
            name: done.counts[name] for name in ("envelopes", "bodies", "shapes")
        }
        [act] = await world.acts("callback:filing")
        assert {"reason": ERASED, "count": 3} == act.details
        assert (await world.receiver.envelope("env_2")).erased_at is None

    async def test_that_only_an_error_mentions_leaves_the_envelope(self, world: World) -> None:
        other = await world.receiver.record(make_body(envelope_id="env_2"))
        await leave_error(world, other.event_id)

        done = await world.erase(EMAIL)

        assert {"deliveries": 1, "attempts": 1} == {k: v for k, v in done.counts.items() if v}
        assert (await world.receiver.envelope("env_2")).erased_at is None

    async def test_of_a_former_party_is_found_after_its_bodies_are_pruned(
        self, world: World
    ) -> None:
        await world.receiver.record(make_body(event="envelope.sent", **WORDY))
        async with world.database.begin(limit=LIMIT) as connection:
            await terms.learn(connection, [("default", "env_1")])
        later = {**WORDY, "parties": [{"email": "bob@example.com"}]}
        await world.receiver.record(make_body(**later))
        await execute(world.database, BODIES.delete())

        done = await world.erase(EMAIL)

        assert 1 == done.counts["envelopes"]

    async def test_of_one_account_leaves_the_others(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))
        await world.receiver.record(make_body(**WORDY), account="beta")

        await world.erase(EMAIL, account="beta")

        assert (await world.receiver.envelope("env_1")).erased_at is None
        assert (await world.receiver.envelope("env_1", account="beta")).erased_at is not None

    async def test_is_written_down_as_a_digest_only(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))

        with structlog.testing.capture_logs() as lines:
            await world.erase(EMAIL.upper())

        digest = sha256(EMAIL.encode()).hexdigest()
        [act] = await world.acts("envelope:env_1")
        assert digest == act.details["address_sha256"]
        [whole] = await world.acts(f"address:{digest}")
        assert ("address.erased", 1) == (whole.action, whole.details["envelopes"])
        assert EMAIL not in repr(lines).lower()
        assert ["data.erased"] == [line["event"] for line in lines if line["part"] == "retention"]

    async def test_of_nobody_finds_nothing(self, world: World) -> None:
        await world.receiver.record(make_body(**WORDY))

        found = await world.find(await world.search("nobody@example.com"))

        assert found.is_empty
        assert found.seen == found.total > 0

    async def test_in_a_conflict_that_names_an_envelope_without_a_row(self, world: World) -> None:
        await world.receiver.record(make_body(envelope_id="env_1", event_id="evt_1"))
        await world.receiver.record(make_body(**{**WORDY, "envelope_id": "e2"}, event_id="evt_1"))

        done = await world.erase(EMAIL)

        assert 0 == done.counts["envelopes"]
        assert [] == await world.traces()
        assert (await world.receiver.envelope("env_1")).erased_at is None


async def leave_error(world: World, event_id: UUID) -> None:
    """Let a delivery die with an error that quotes the address, as one that was not cleaned."""
    with world.ledger.dispatching(filing()):
        await until(lambda: _none_is_pending(world))
    [dead] = [d.id for d in await world.ledger.deliveries() if d.event_id == event_id]
    error = f"no mailbox {EMAIL}"
    change = DELIVERIES.update().where(DELIVERIES.c.id == dead)
    await execute(world.database, change.values(last_error=error))
    attempt = ATTEMPTS.update().where(ATTEMPTS.c.delivery_id == dead)
    await execute(world.database, attempt.values(error=error))


async def _none_is_pending(world: World) -> bool:
    return {"dead"} == set(await world.ledger.states())
