"""What arrives for an envelope that was erased: known, owed, and without personal data."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from app.callbacks import Callbacks, Event
from app.errors import NotAllowed
from app.events.erasure import ERASED
from app.intake.reproject import Result, reproject
from app.intake.submission import Outcome
from app.store import erasure as store
from app.upkeep import erasure
from tests.factories import SIGNER, make_body
from tests.integration.ledger import Ledger, until
from tests.replicas import BODIES, DELIVERIES, ENVELOPES, EVENTS, Replica, execute, replica

CANARY = "canary-4711"
# What callers and Atlas write in words of their own.
WORDY: dict[str, Any] = {
    "envelope_id": "env_1",
    "metadata": {"customer": CANARY},
    "external_id": CANARY,
    "reason": CANARY,
}


@pytest.fixture(name="receiver")
async def _receiver(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url) as receiver:
        yield receiver


async def no_files(_account: str, _envelope_id: str, _at: Iterable[datetime]) -> int:
    return 0


async def erase(receiver: Replica, envelope_id: str = "env_1") -> None:
    search = await erasure.of_envelope(receiver.database, envelope_id, None)
    found = [found async for found in erasure.find(receiver.database, search)][-1]
    steps = erasure.erase(receiver.database, search, found, actor="ada", remove_files=no_files)
    async for _ in steps:
        pass


@asynccontextmanager
async def erasing(receiver: Replica) -> AsyncIterator[None]:
    """Erase an envelope, and commit that at the end of the block."""
    key = (receiver.account, "env_1")
    async with receiver.database.begin(limit=timedelta(seconds=10)) as connection:
        held = await store.lock(connection, key)
        assert held is not None
        await store.clear_envelope(connection, held)
        said = await store.said_of(connection, key)
        await store.clear_events(connection, [row.id for row in said])
        yield


async def kept(receiver: Replica) -> set[UUID]:
    return {row.event_id for row in await receiver.rows(select(BODIES.c.event_id))}


async def event(receiver: Replica, event_id: UUID) -> Any:
    [row] = await receiver.rows(select(EVENTS).where(EVENTS.c.id == event_id))
    return row


async def everything(receiver: Replica) -> str:
    tables = (EVENTS, ENVELOPES, DELIVERIES, BODIES)
    return repr([await receiver.rows(select(table)) for table in tables])


class TestEventOfAnErasedEnvelope:
    async def test_keeps_identity_type_and_status_only(self, receiver: Replica) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await erase(receiver)

        receipt = await receiver.record(
            make_body(event="envelope.declined", event_id="evt_9", status="declined", **WORDY)
        )

        row = await event(receiver, receipt.event_id)
        assert Outcome.RECORDED == receipt.outcome
        assert ("envelope.declined", "evt_9", "applied") == (
            row.type,
            row.atlas_event_id,
            row.effect,
        )
        assert ("declined", ERASED, None) == (row.core_status, row.core_reason, row.degraded)
        assert set() == await kept(receiver)
        said = await everything(receiver)
        assert CANARY not in said
        assert SIGNER not in said

    async def test_moves_status_times_and_counts(self, receiver: Replica) -> None:
        await receiver.record(
            make_body(event="envelope.sent", parties=[{"email": SIGNER}], envelope_id="env_1")
        )
        await erase(receiver)
        erased = await receiver.envelope("env_1")

        await receiver.record(make_body(event="envelope.signed", **WORDY))

        row = await receiver.envelope("env_1")
        assert ("pending", 0, 1) == (erased.status, erased.signed_count, erased.total)
        assert ("signed", 1, 1) == (row.status, row.signed_count, row.total)
        assert row.version > erased.version
        assert erased.erased_at == row.erased_at is not None

    async def test_is_owed_like_any_other(self, receiver: Replica) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await erase(receiver)

        receipt = await receiver.record(make_body(event="envelope.signed", **WORDY))

        owed = select(DELIVERIES.c.callback).where(DELIVERIES.c.event_id == receipt.event_id)
        assert ["archive", "crm"] == sorted(row.callback for row in await receiver.rows(owed))

    async def test_shares_a_batch_with_those_of_others(self, receiver: Replica) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await erase(receiver)

        others = [make_body(envelope_id=f"env_{number}") for number in range(2, 6)]
        outcomes = await receiver.together(make_body(**WORDY), *others)

        assert [Outcome.RECORDED] * 5 == outcomes
        assert 4 == len(await kept(receiver))


class TestCopy:
    @pytest.mark.parametrize("own_id", [None, "evt_1"])
    async def test_of_what_came_before_is_one(self, receiver: Replica, own_id: str | None) -> None:
        body = make_body(event="envelope.declined", status="Cancelled!", event_id=own_id, **WORDY)
        first = await receiver.record(body)
        await erase(receiver)

        again = await receiver.record(body)

        assert (Outcome.DUPLICATE, first.event_id) == (again.outcome, again.event_id)

    async def test_under_another_id_is_known_by_its_content(self, receiver: Replica) -> None:
        said = {"event": "envelope.declined", **WORDY}
        first = await receiver.record(make_body(event_id="evt_1", **said))
        await erase(receiver)

        again = await receiver.record(make_body(event_id="evt_2", **said))
        other = await receiver.record(make_body(event_id="evt_3", **{**said, "reason": "price"}))

        assert (Outcome.DUPLICATE, first.event_id) == (again.outcome, again.event_id)
        assert Outcome.RECORDED == other.outcome

    async def test_of_what_came_afterwards_is_one(self, receiver: Replica) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await erase(receiver)
        said = {"event": "envelope.declined", **WORDY}

        outcomes = await receiver.in_turn(
            make_body(event_id="evt_1", **said),
            make_body(event_id="evt_1", **said),
            make_body(event_id="evt_2", **said),
        )

        assert [Outcome.RECORDED, Outcome.DUPLICATE, Outcome.DUPLICATE] == outcomes

    async def test_refreshes_nothing(self, receiver: Replica) -> None:
        body = make_body(event="envelope.signed", **WORDY)
        await receiver.record(body)
        await erase(receiver)
        before = await receiver.envelope("env_1")

        await receiver.record(
            make_body(event="envelope.signed", timestamp="2020-01-01T00:00:00Z", **WORDY)
        )

        assert before == await receiver.envelope("env_1")
        assert set() == await kept(receiver)


class TestContradiction:
    async def test_is_noted_without_its_body(self, receiver: Replica) -> None:
        said = {**WORDY, "event_id": "evt_1"}
        await receiver.record(make_body(event="envelope.signed", **said))
        await erase(receiver)

        receipt = await receiver.record(make_body(event="envelope.declined", **said))

        assert Outcome.CONFLICT == receipt.outcome
        assert receipt.event_id not in await kept(receiver)
        assert (await receiver.envelope("env_1")).disputed
        assert CANARY not in await everything(receiver)

    async def test_that_names_another_envelope_which_is_erased(self, receiver: Replica) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await receiver.record(make_body(envelope_id="env_2", event_id="evt_1"))
        await erase(receiver)

        receipt = await receiver.record(
            make_body(event="envelope.signed", event_id="evt_1", **WORDY)
        )

        assert Outcome.CONFLICT == receipt.outcome
        assert receipt.event_id not in await kept(receiver)
        assert CANARY not in await everything(receiver)

    async def test_that_names_another_envelope_which_is_just_being_erased(
        self, receiver: Replica
    ) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await receiver.record(make_body(envelope_id="env_2", event_id="evt_1"))

        async with erasing(receiver):
            body = make_body(event="envelope.signed", event_id="evt_1", **WORDY)
            recording = asyncio.create_task(receiver.record(body))
            # Nothing says that it waits; if it does not, this is where it goes wrong.
            await asyncio.wait([recording], timeout=0.3)
        receipt = await recording

        assert Outcome.CONFLICT == receipt.outcome
        assert receipt.event_id not in await kept(receiver)
        assert CANARY not in await everything(receiver)

    async def test_that_names_an_envelope_which_is_not(self, receiver: Replica) -> None:
        await receiver.record(make_body(envelope_id="env_2", event="envelope.sent"))
        await receiver.record(make_body(envelope_id="env_3", event_id="evt_1"))

        receipt = await receiver.record(make_body(envelope_id="env_2", event_id="evt_1"))

        assert Outcome.CONFLICT == receipt.outcome
        assert receipt.event_id in await kept(receiver)


class TestReprojecting:
    async def test_says_that_the_bytes_are_gone(self, receiver: Replica) -> None:
        receipt = await receiver.record(make_body(**WORDY))
        await erase(receiver)

        with pytest.raises(NotAllowed, match="pruned, or its envelope was erased"):
            await reproject(receiver.database, receipt.event_id, actor="ada")

    async def test_from_quarantine_keeps_no_more_than_if_it_came_now(
        self, receiver: Replica
    ) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await erase(receiver)
        quarantined = await receiver.record(b"[]")
        body = make_body(event="envelope.declined", **WORDY)
        change = BODIES.update().where(BODIES.c.event_id == quarantined.event_id)
        await execute(receiver.database, change.values(body=body))

        done = await reproject(receiver.database, quarantined.event_id, actor="ada")

        assert Result.RECORDED == done.result
        assert quarantined.event_id not in await kept(receiver)
        assert "declined" == (await receiver.envelope("env_1")).status
        assert CANARY not in await everything(receiver)

    async def test_from_quarantine_waits_for_whoever_erases_what_it_names(
        self, receiver: Replica
    ) -> None:
        await receiver.record(make_body(event="envelope.sent", **WORDY))
        await receiver.record(make_body(envelope_id="env_2", event_id="evt_1"))
        quarantined = await receiver.record(b"[]")
        body = make_body(event="envelope.signed", event_id="evt_1", **WORDY)
        change = BODIES.update().where(BODIES.c.event_id == quarantined.event_id)
        await execute(receiver.database, change.values(body=body))

        async with erasing(receiver):
            reading = asyncio.create_task(
                reproject(receiver.database, quarantined.event_id, actor="ada")
            )
            await asyncio.wait([reading], timeout=0.3)
        done = await reading

        assert Result.CONFLICT == done.result
        assert quarantined.event_id not in await kept(receiver)
        assert CANARY not in await everything(receiver)

    async def test_of_an_event_whose_bytes_came_back_changes_nothing_else(
        self, receiver: Replica
    ) -> None:
        """As after a restore of one table: the row of the envelope says what counts."""
        receipt = await receiver.record(make_body(**WORDY))
        await erase(receiver)
        row = BODIES.insert().values(event_id=receipt.event_id, body=make_body(**WORDY))
        await execute(receiver.database, row)

        await reproject(receiver.database, receipt.event_id, actor="ada")

        assert receipt.event_id not in await kept(receiver)
        assert CANARY not in await everything(receiver)


class TestData:
    """What callbacks are given as `event.data`."""

    @pytest.fixture(name="ledger")
    async def _ledger(self, database_url: str) -> AsyncIterator[Ledger]:
        ledger = Ledger(database_url)
        await ledger.envelope(status="signed", erased_at=datetime.now(UTC))
        yield ledger
        await ledger.database.close()

    async def given(self, ledger: Ledger, **about: Any) -> Any:
        seen: list[Event] = []
        callbacks = Callbacks()
        callbacks.on("*", name="keep")(seen.append)
        await ledger.owe_one("keep", **about)
        with ledger.dispatching(callbacks):
            await until(lambda: seen)
        return seen[0].data

    @pytest.mark.parametrize("body", [None, make_body(**WORDY)], ids=["gone", "not-yet-gone"])
    async def test_is_what_is_left(self, ledger: Ledger, body: bytes | None) -> None:
        data = await self.given(ledger, body=body)

        assert {"event": "envelope.signed", "envelope_id": "env_1", "status": "signed"} == data

    async def test_of_what_the_service_says_afterwards_is_whole(self, ledger: Ledger) -> None:
        data = await self.given(ledger, event_type="receiver.conflict", body=b'{"about": "7"}')

        assert {"about": "7"} == data

    async def test_of_what_the_service_said_before_is_what_is_left(self, ledger: Ledger) -> None:
        data = await self.given(ledger, event_type="receiver.conflict", body=None)

        assert {"event": "receiver.conflict", "envelope_id": "env_1", "status": "signed"} == data

    async def test_of_pruned_bodies_is_none(self, ledger: Ledger) -> None:
        await ledger.envelope("env_2")

        assert await self.given(ledger, envelope="env_2", body=None) is None
