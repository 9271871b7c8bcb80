"""Bodies that are old go, and nothing else: copies are recognised, what is needed stays."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import structlog
from sqlalchemy import select

from app.callbacks import Callbacks, Event
from app.cli.retention import _WHY
from app.intake.submission import Outcome
from app.store import leases, pruning
from app.store.ids import first_id_at
from app.upkeep.pruning import NAME, Occupied, Pruned, Pruner, prune
from tests.factories import make_body
from tests.integration.ledger import Ledger, until
from tests.replicas import BODIES, EVENTS, Replica, execute, replica

DAY = timedelta(days=1)
AGE = 90 * DAY
LONG_AGO = datetime.now(UTC) - 100 * DAY


@pytest.fixture(name="receiver")
async def _receiver(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url, account="default", interested=lambda *_: ()) as receiver:
        yield receiver


async def old(ledger: Ledger, number: int = 0, **about: Any) -> UUID:
    """Record an event that came long ago."""
    at = LONG_AGO + timedelta(seconds=number)
    event_id = UUID(int=first_id_at(at.timestamp()).int + number)
    return await ledger.record(event_id=event_id, received_at=at, **about)


async def age(receiver: Replica, event_id: UUID) -> UUID:
    """Make an event one that came long ago, with everything that names it."""
    aged = UUID(int=first_id_at(LONG_AGO.timestamp()).int + event_id.int % 2**32)
    for statement in (
        EVENTS.update().where(EVENTS.c.id == event_id).values(id=aged, received_at=LONG_AGO),
        BODIES.update().where(BODIES.c.event_id == event_id).values(event_id=aged),
    ):
        await execute(receiver.database, statement)
    change = "UPDATE identities SET event_id = {} WHERE event_id = {}"
    if receiver.database.is_postgresql:
        await execute(receiver.database, change.format("$1", "$2"), aged, event_id)
    else:
        await execute(receiver.database, change.format("?", "?"), aged.hex, event_id.hex)
    return aged


async def pruned(ledger: Ledger | Replica, age: timedelta = AGE, **options: Any) -> Pruned:
    return [step async for step in prune(ledger.database, age, holder="me", **options)][-1]


async def kept(ledger: Ledger) -> set[UUID]:
    async with ledger.reading() as connection:
        return set((await connection.execute(select(BODIES.c.event_id))).scalars())


class TestOldBodies:
    async def test_go_and_their_events_stay(self, ledger: Ledger) -> None:
        first, second = [await old(ledger, number) for number in range(2)]
        young = await ledger.record()

        done = await pruned(ledger)

        assert (2, 2, 2, {}) == (done.emptied, done.seen, done.total, done.skipped)
        assert {young} == await kept(ledger)
        assert {first, second, young} == set(await ledger.events("envelope.signed"))

    async def test_go_a_few_at_a_time(self, ledger: Ledger) -> None:
        for number in range(5):
            await old(ledger, number)

        steps = [
            (step.seen, step.total)
            async for step in prune(ledger.database, AGE, holder="me", at_once=2)
        ]

        assert [(0, 5), (2, 5), (4, 5), (5, 5)] == steps

    async def test_are_only_counted_if_that_is_wanted(self, ledger: Ledger) -> None:
        event_id = await old(ledger)

        done = await pruned(ledger, is_dry=True)

        assert 1 == done.emptied
        assert {event_id} == await kept(ledger)

    async def test_are_as_old_as_the_database_says(self, ledger: Ledger) -> None:
        """The id was made by a replica whose clock is a moment ahead of the time beside it."""
        at = datetime.now(UTC) - AGE - timedelta(seconds=20)
        ahead = first_id_at((at + timedelta(seconds=40)).timestamp())
        await ledger.record(event_id=ahead, received_at=at)
        behind = first_id_at((at - timedelta(seconds=40)).timestamp())
        young = await ledger.record(event_id=behind, received_at=at + timedelta(seconds=60))

        done = await pruned(ledger)

        assert 1 == done.emptied
        assert {young} == await kept(ledger)

    async def test_of_before_there_were_any(self, ledger: Ledger) -> None:
        event_id = await old(ledger)

        assert Pruned(0) == await pruned(ledger, timedelta.max)
        assert {event_id} == await kept(ledger)

    async def test_without_any_there_is_nothing_to_do(self, ledger: Ledger) -> None:
        assert Pruned(0) == await pruned(ledger)


class TestBodiesThatAreNeeded:
    @pytest.mark.parametrize(
        "state, reason",
        [("pending", "owed"), ("running", "owed"), ("dead", "dead"), ("parked", "parked")],
    )
    async def test_of_what_is_not_settled(self, ledger: Ledger, state: str, reason: str) -> None:
        event_id = await old(ledger)
        await ledger.owe("file", event=event_id)
        await ledger.change("UPDATE deliveries SET state = :state", state=state)
        if reason != "owed":
            await ledger.change("UPDATE deliveries SET due_at = NULL")

        done = await pruned(ledger)

        assert {event_id} == await kept(ledger)
        assert {reason: 1} == done.skipped

    @pytest.mark.parametrize("state", ["done", "discarded"])
    async def test_are_not_those_of_what_is_settled(self, ledger: Ledger, state: str) -> None:
        event_id = await old(ledger)
        await ledger.owe("file", event=event_id)
        await ledger.change("UPDATE deliveries SET state = :state, due_at = NULL", state=state)

        assert 1 == (await pruned(ledger)).emptied

    @pytest.mark.parametrize(
        "about, reason",
        [
            pytest.param({"effect": "quarantined", "event_type": None}, "quarantined", id="odd"),
            pytest.param({"effect": "conflict"}, "conflicting", id="conflict"),
            pytest.param({"event_type": "receiver.accepted"}, "own", id="own"),
        ],
    )
    async def test_of_what_a_person_may_ask_for(
        self, ledger: Ledger, about: dict[str, Any], reason: str
    ) -> None:
        event_id = await old(ledger, **about)

        done = await pruned(ledger)

        assert {event_id} == await kept(ledger)
        assert {reason: 1} == done.skipped

    async def test_of_disputed_envelopes(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1", disputed=True)
        await ledger.envelope("env_2")
        disputed = await old(ledger, 0, envelope="env_1")
        await old(ledger, 1, envelope="env_2")

        done = await pruned(ledger)

        assert ({disputed}, {"conflicting": 1}) == (await kept(ledger), done.skipped)

    async def test_of_what_a_conflict_about_no_envelope_contradicts(
        self, receiver: Replica, ledger: Ledger
    ) -> None:
        said = {"event": "billing.due", "envelope_id": None, "event_id": "b1"}
        first = await receiver.record(make_body(**said))
        contested = await age(receiver, first.event_id)
        conflict = await receiver.record(make_body(**said, status="other"))
        change = EVENTS.update().where(EVENTS.c.id == conflict.event_id)
        await execute(receiver.database, change.values(original_id=contested))
        await old(ledger, 1, event_type="billing.paid", envelope=None)

        done = await pruned(ledger)

        assert Outcome.CONFLICT == conflict.outcome
        assert (1, {"conflicting": 1}) == (done.emptied, done.skipped)
        assert contested in await kept(ledger)

    async def test_of_what_somebody_is_just_changing(self, ledger: Ledger) -> None:
        if not ledger.database.is_postgresql:
            pytest.skip("one who writes on SQLite is waited for")
        event_id = await old(ledger)
        async with ledger.transaction() as connection:
            await connection.execute(select(EVENTS).with_for_update())

            done = await pruned(ledger)

        assert ({event_id}, {"busy": 1}) == (await kept(ledger), done.skipped)


class TestCopies:
    @pytest.mark.parametrize("own_id", [None, "evt_1"])
    async def test_of_what_is_pruned_are_known(
        self, receiver: Replica, ledger: Ledger, own_id: str | None
    ) -> None:
        body = make_body(envelope_id="env_1", event_id=own_id)
        first = await age(receiver, (await receiver.record(body)).event_id)
        assert 1 == (await pruned(ledger)).emptied

        again = await receiver.record(body)

        assert (Outcome.DUPLICATE, first) == (again.outcome, again.event_id)

    async def test_under_another_id_are_known_by_their_content(
        self, receiver: Replica, ledger: Ledger
    ) -> None:
        """Years later only the digest can tell a retry from another signing."""
        first = await receiver.record(make_body(envelope_id="env_1", event_id="evt_1"))
        aged = await age(receiver, first.event_id)
        assert 1 == (await pruned(ledger)).emptied

        again = await receiver.record(make_body(envelope_id="env_1", event_id="evt_2"))
        other = await receiver.record(make_body(envelope_id="env_1", event_id="evt_3", title="x"))

        assert (Outcome.DUPLICATE, aged) == (again.outcome, again.event_id)
        assert Outcome.RECORDED == other.outcome

    async def test_have_no_digest_if_the_bytes_went_without_it(
        self, receiver: Replica, ledger: Ledger
    ) -> None:
        """As a table that was restored without the other: the sender's word counts then."""
        await receiver.record(make_body(envelope_id="env_1", event_id="evt_1"))
        await execute(receiver.database, BODIES.delete())

        again = await receiver.record(make_body(envelope_id="env_1", event_id="evt_2"))

        assert Outcome.RECORDED == again.outcome
        assert 1 == len(await kept(ledger))


class TestOneAtATime:
    async def test_another_process_is_named(self, ledger: Ledger) -> None:
        event_id = await old(ledger)
        async with ledger.transaction() as connection:
            await leases.hold(connection, NAME, holder="host:7", span=timedelta(minutes=1))

        with pytest.raises(Occupied, match="host:7 prunes just now"):
            await pruned(ledger)

        assert {event_id} == await kept(ledger)
        assert 1 == (await pruned(ledger, is_dry=True)).emptied

    async def test_who_is_done_lets_others(self, ledger: Ledger) -> None:
        await old(ledger, 0)
        await pruned(ledger)
        await old(ledger, 1)

        steps = prune(ledger.database, AGE, holder="other")

        assert 1 == [step async for step in steps][-1].emptied

    async def test_who_is_stopped_in_the_middle_lets_others_go_on(self, ledger: Ledger) -> None:
        for number in range(4):
            await old(ledger, number)
        steps = prune(ledger.database, AGE, holder="me", at_once=1)
        async for step in steps:
            if step.emptied == 2:
                break
        await steps.aclose()

        others = prune(ledger.database, AGE, holder="other")

        assert 2 == [step async for step in others][-1].emptied

    async def test_two_at_once_empty_everything_once(self, ledger: Ledger) -> None:
        for number in range(20):
            await old(ledger, number)

        async def run(holder: str) -> int:
            try:
                steps = prune(ledger.database, AGE, holder=holder, at_once=1)
                return [step async for step in steps][-1].emptied
            except Occupied:
                return 0

        assert [0, 20] == sorted(await asyncio.gather(run("one"), run("other")))
        assert set() == await kept(ledger)


class TestPruner:
    async def test_prunes_and_says_so(self, ledger: Ledger) -> None:
        await old(ledger, 0)
        await old(ledger, 1, effect="conflict")
        pruner = Pruner(ledger.database, AGE, holder="me")

        with structlog.testing.capture_logs() as lines:
            assert {"emptied": 1, "conflicting": 1} == await pruner.step()
            assert {"emptied": 0, "conflicting": 1} == await pruner.step()

        [line] = lines
        assert ("bodies.pruned", 1) == (line["event"], line["count"])

    async def test_leaves_it_to_whoever_does_it_already(self, ledger: Ledger) -> None:
        await old(ledger)
        async with ledger.transaction() as connection:
            await leases.hold(connection, NAME, holder="host:7", span=timedelta(minutes=1))

        assert await Pruner(ledger.database, AGE, holder="me").step() is None

    async def test_looks_again_and_again(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.upkeep.pruning.FIRST", timedelta(0))
        monkeypatch.setattr("app.upkeep.pruning.EVERY", timedelta(milliseconds=20))
        running = asyncio.create_task(Pruner(ledger.database, AGE, holder="me").run())

        await ledger.change("ALTER TABLE bodies RENAME TO hidden")
        await asyncio.wait([running], timeout=0.2)
        await ledger.change("ALTER TABLE hidden RENAME TO bodies")
        await old(ledger)
        await until(lambda: _is_empty(ledger))

        running.cancel()


async def _is_empty(ledger: Ledger) -> bool:
    return not await kept(ledger)


class TestCallbacks:
    async def test_are_given_a_pruned_event_without_data(self, ledger: Ledger) -> None:
        seen: list[Event] = []
        callbacks = Callbacks()
        callbacks.on("*", name="keep")(seen.append)
        event_id = await old(ledger)
        await pruned(ledger)
        await ledger.owe("keep", event=event_id)

        with ledger.dispatching(callbacks):
            await until(lambda: seen)

        assert seen[0].data is None
        assert str(event_id) == seen[0].id


async def test_every_reason_has_its_words() -> None:
    reasons = {pruning.OWED, pruning.OWN, pruning.QUARANTINED, pruning.CONFLICTING, pruning.BUSY}
    assert reasons | {"dead", "parked"} == _WHY.keys()
    assert len(_WHY) == len(Counter(_WHY.values()))
