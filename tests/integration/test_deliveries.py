"""Deliveries in the database: claimed by one, in order, for a time; settled by who claimed them."""

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.store import callbacks, claims, contents, deliveries, verdicts
from app.store.callbacks import Subscription
from app.store.claims import Claim, Room
from app.store.deliveries import Delivery
from app.store.dialects import SQLITE_LATER
from app.store.ids import first_id_at, new_id
from app.store.verdicts import Settlement
from tests.integration.ledger import LEASE, PATIENCE, WORKER, Ledger, until

MINUTE = timedelta(minutes=1)
PAST = timedelta(minutes=20)


@pytest.fixture(name="ledger")
async def _ledger(ledger: Ledger) -> Ledger:
    await ledger.register("file")
    return ledger


@pytest.fixture(name="postgres_ledger")
async def _postgres_ledger(postgres_ledger: Ledger) -> Ledger:
    await postgres_ledger.register("file")
    return postgres_ledger


def verdict_on(claim: Claim, verdict: str = "done", **changes: Any) -> Settlement:
    state = {"done": "done", "failed": "pending", "dead": "dead"}[verdict]
    values: dict[str, Any] = {
        "id": claim.id,
        "token": claim.token,
        "attempt": claim.attempt,
        "verdict": verdict,
        "state": state,
        "wait": MINUTE if verdict == "failed" else None,
        "error": None if verdict == "done" else "ValueError: no",
        "fingerprint": None if verdict == "done" else "0123456789abcdef",
        "started_at": datetime.now(UTC),
        "finished_at": datetime.now(UTC),
    }
    return Settlement(**(values | changes))


async def settle(ledger: Ledger, *settlements: Settlement) -> dict[UUID, datetime | None]:
    async with ledger.transaction() as connection:
        return await verdicts.settle(connection, settlements, worker=WORKER)


class TestEnqueue:
    async def test_a_delivery_is_due_at_once(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one("file", envelope="env_9", sequence=7)

        (owed,) = await ledger.deliveries()

        assert delivery_id == owed.id
        assert ("file", "default", "env_9", 7) == (
            owed.callback,
            owed.account,
            owed.envelope_id,
            owed.sequence,
        )
        assert ("pending", 0, 1) == (owed.state, owed.attempts, owed.generation)
        assert owed.due_at == owed.created_at
        assert abs(owed.created_at - datetime.now(UTC)) < MINUTE

    async def test_what_is_owed_already_stays_as_it_is(self, ledger: Ledger) -> None:
        event = await ledger.record()
        first = await ledger.owe_one("file", event=event)
        await ledger.claim()

        again = await ledger.owe_one("file", event=event)

        assert first == again
        assert ["running"] == await ledger.states()

    async def test_owing_nothing_is_fine(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await deliveries.enqueue(connection, [])

        assert [] == await ledger.deliveries()


class TestClaim:
    async def test_a_claim_is_a_lease_and_counts_the_attempt(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one()

        (claim,) = await ledger.claim(lease=MINUTE)

        row = await ledger.delivery(delivery_id)
        assert (delivery_id, 1, 1, 0) == (claim.id, claim.token, claim.attempt, claim.spent)
        assert ("running", 1, WORKER) == (row.state, row.attempts, row.worker)
        assert row.due_at is not None
        assert timedelta(0) < row.due_at - datetime.now(UTC) <= MINUTE

    async def test_nobody_else_gets_it(self, ledger: Ledger) -> None:
        await ledger.owe_one()

        claims = [await ledger.claim(), await ledger.claim(worker="worker-2")]

        assert [1, 0] == [len(each) for each in claims]

    async def test_two_claims_at_once_never_share_a_row(self, ledger: Ledger) -> None:
        for number in range(60):
            await ledger.owe_one(envelope=f"env_{number}")

        claims = await asyncio.gather(*(ledger.claim(limit=20) for _ in range(3)))

        ids = [claim.id for batch in claims for claim in batch]
        assert len(ids) == len(set(ids))
        assert len(ids) + len(await ledger.claim(limit=100)) == 60

    async def test_a_locked_row_is_passed_over(self, postgres_ledger: Ledger) -> None:
        """A claim that waited would hold up every other delivery behind one."""
        held = await postgres_ledger.owe_one(envelope="env_1")
        free = await postgres_ledger.owe_one(envelope="env_2")

        async with postgres_ledger.transaction() as connection:
            await deliveries.lock(connection, held)
            claims = await postgres_ledger.claim()

        assert [free] == [claim.id for claim in claims]

    async def test_the_longest_due_come_first_and_no_more_than_asked_for(
        self, ledger: Ledger
    ) -> None:
        owed = [await ledger.owe_one(envelope=f"env_{n}") for n in range(3)]
        await ledger.shift("deliveries", "due_at", -MINUTE, envelope_id="env_2")

        claims = await ledger.claim(limit=1)

        assert [owed[2]] == [claim.id for claim in claims]

    async def test_each_callback_has_its_own_room(self, ledger: Ledger) -> None:
        await ledger.register("mail", "file")
        for number in range(3):
            await ledger.owe("file", "mail", envelope=f"env_{number}")

        claims = await ledger.claim("file", "mail", limit=2)

        assert ["file", "file", "mail", "mail"] == sorted(claim.callback for claim in claims)

    async def test_what_is_due_later_and_what_others_serve_stays(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        await ledger.owe_one("mail")
        await ledger.owe_one("file")
        await ledger.shift("deliveries", "due_at", MINUTE, callback="file")

        assert [] == await ledger.claim("file")

    async def test_a_paused_callback_is_not_served(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.change("UPDATE callbacks SET paused_at = last_seen_at")

        assert [] == await ledger.claim()

        await ledger.change("UPDATE callbacks SET paused_at = NULL")
        assert 1 == len(await ledger.claim())

    async def test_neither_is_it_if_another_one_is_not_paused(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.change("UPDATE callbacks SET paused_at = last_seen_at")
        await ledger.register("mail")

        assert [] == await ledger.claim("file", "mail")

    async def test_one_that_is_left_alone_gets_probes_only(self, ledger: Ledger) -> None:
        """Its breaker is open; a few calls show whether it may close."""
        owed = await ledger.owe_one()
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")

        assert [] == await ledger.claim()
        async with ledger.transaction() as connection:
            probing = [Room("file", 1, is_ordered=True, is_probe=True)]
            (probe,) = await claims.claim(
                connection, probing, worker=WORKER, lease=LEASE, patience=PATIENCE
            )
        assert owed == probe.id

    async def test_a_lost_lease_is_claimed_again_and_stands_in_the_history(
        self, ledger: Ledger
    ) -> None:
        delivery_id = await ledger.owe_one()
        await ledger.claim(worker="worker-that-dies")
        await ledger.shift("deliveries", "due_at", -MINUTE)

        (claim,) = await ledger.claim()

        (lost,) = await ledger.attempts(delivery_id)
        assert (2, 2) == (claim.token, claim.attempt)
        assert ("lost", 1, 1) == (lost.verdict, lost.token, lost.number)
        assert "worker-that-dies" == lost.worker
        assert lost.started_at is None

    async def test_a_history_that_knows_of_it_already_is_no_obstacle(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.claim()
        await ledger.change(
            "INSERT INTO attempts (delivery_id, token, number, worker, finished_at, verdict) "
            "SELECT id, token, attempts, worker, CURRENT_TIMESTAMP, 'failed' FROM deliveries"
        )
        await ledger.shift("deliveries", "due_at", -MINUTE)

        (claim,) = await ledger.claim()

        assert 2 == claim.token
        assert ["failed"] == await ledger.verdicts()

    async def test_leases_begin_when_the_statement_does(self, postgres_ledger: Ledger) -> None:
        """The clock of a transaction stands still; a lease that starts in the past is none."""
        await postgres_ledger.owe_one()
        async with postgres_ledger.transaction() as connection:
            await connection.exec_driver_sql("SELECT pg_sleep(0.5)")
            rooms = [Room("file", 1, is_ordered=True)]
            await claims.claim(connection, rooms, worker=WORKER, lease=MINUTE, patience=PATIENCE)
            left = "SELECT due_at - now() FROM deliveries"
            lease = (await connection.exec_driver_sql(left)).scalar_one()

        assert lease >= MINUTE + timedelta(seconds=0.5)

    async def test_the_plan_uses_the_index_of_what_is_owed(self, postgres_ledger: Ledger) -> None:
        """A million finished rows must not be in the way of a claim."""
        await postgres_ledger.change(
            "INSERT INTO deliveries (id, event_id, callback, account, state, created_at) "
            "SELECT gen_random_uuid(), gen_random_uuid(), 'file', 'default', 'done', now() "
            "FROM generate_series(1, 50000)"
        )
        await postgres_ledger.change("ANALYZE deliveries")
        statement = claims._CLAIM_POSTGRESQL
        types = "text[], int4[], bool[], text, interval, interval, bool[]"
        async with postgres_ledger.transaction() as connection:
            await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.exec_driver_sql(f"PREPARE claim ({types}) AS {statement}")
            explain = (
                "EXPLAIN EXECUTE claim ('{file}', '{64}', '{t}', 'w', '30 s', '15 min', '{f}')"
            )
            plan = "\n".join((await connection.exec_driver_sql(explain)).scalars())

        assert 1 == plan.count("deliveries_due_idx")
        assert 2 == plan.count("deliveries_order_idx")
        assert "deliveries_pkey" in plan
        assert "Seq Scan on deliveries" not in plan


class TestOrder:
    """Events of one envelope reach one callback one after the other."""

    async def test_a_later_one_waits_for_the_earlier(self, ledger: Ledger) -> None:
        second = await ledger.owe_one(sequence=2)
        first = await ledger.owe_one(sequence=1)

        (claim,) = await ledger.claim()

        assert first == claim.id
        assert [] == await ledger.claim()
        await settle(ledger, verdict_on(claim))
        assert [second] == [each.id for each in await ledger.claim()]

    async def test_it_waits_also_while_the_earlier_one_backs_off(self, ledger: Ledger) -> None:
        await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)
        (claim,) = await ledger.claim()

        await settle(ledger, verdict_on(claim, "failed"))

        assert [] == await ledger.claim()

    async def test_others_are_never_held_up(self, ledger: Ledger) -> None:
        """Neither other envelopes, nor other accounts, nor other callbacks."""
        await ledger.register("mail")
        await ledger.owe("file", "mail", sequence=1)
        (claim,) = await ledger.claim("file")
        await settle(ledger, verdict_on(claim, "failed"))
        other_envelope = await ledger.owe_one(envelope="env_2", sequence=2)
        other_account = await ledger.owe_one(account="acme", sequence=2)

        claims = await ledger.claim("file")

        assert {other_envelope, other_account} == {each.id for each in claims}
        assert 1 == len(await ledger.claim("mail"))

    async def test_events_about_no_envelope_have_no_order(self, ledger: Ledger) -> None:
        await ledger.owe_one(envelope=None, sequence=None)
        await ledger.owe_one(envelope=None, sequence=None)

        assert 2 == len(await ledger.claim())

    async def test_a_callback_without_order_gets_all_at_once(self, ledger: Ledger) -> None:
        await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)

        assert 2 == len(await ledger.claim(is_ordered=False))

    async def test_who_has_waited_too_long_overtakes(self, ledger: Ledger) -> None:
        failing = await ledger.owe_one(sequence=1)
        patient = await ledger.owe_one(sequence=2)
        (claim,) = await ledger.claim()
        await settle(ledger, verdict_on(claim, "failed"))
        await ledger.shift("deliveries", "created_at", -PAST)

        claims = await ledger.claim(patience=PATIENCE)

        assert [patient] == [each.id for each in claims]
        assert failing == claim.id

    async def test_one_at_work_is_not_overtaken(self, ledger: Ledger) -> None:
        await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)
        await ledger.claim()
        await ledger.shift("deliveries", "created_at", -PAST)

        assert [] == await ledger.claim()

    async def test_who_is_overtaken_waits_for_the_end_of_that(self, ledger: Ledger) -> None:
        """Never two at once: else the earlier one could not know that it comes late."""
        overtaken = await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)
        (claim,) = await ledger.claim()
        await settle(ledger, verdict_on(claim, "failed"))
        await ledger.shift("deliveries", "created_at", -PAST)
        (overtaking,) = await ledger.claim()
        await ledger.make_due()

        assert [] == await ledger.claim()
        await settle(ledger, verdict_on(overtaking))
        assert [overtaken] == [each.id for each in await ledger.claim()]

    async def test_a_lost_worker_blocks_neither_way(self, ledger: Ledger) -> None:
        await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)
        await ledger.change(
            "UPDATE deliveries SET state = 'running', attempts = 1 WHERE sequence = 2"
        )
        await ledger.shift("deliveries", "due_at", -MINUTE)

        (first,) = await ledger.claim()
        await settle(ledger, verdict_on(first))
        (second,) = await ledger.claim()

        assert [1, 2] == [(await ledger.delivery(c.id)).sequence for c in (first, second)]

    async def test_an_old_backlog_is_worked_off_in_order(self, ledger: Ledger) -> None:
        """After an outage everything has waited too long; that is no reason to mix it up."""
        owed = [await ledger.owe_one(sequence=n) for n in (1, 2, 3)]
        await ledger.shift("deliveries", "created_at", -PAST)

        served = []
        while claims := await ledger.claim():
            served.append([each.id for each in claims])
            await settle(ledger, *(verdict_on(each) for each in claims))

        assert [[each] for each in owed] == served

    @pytest.mark.parametrize("end", ["dead", "discarded", "parked"])
    async def test_what_is_not_owed_any_more_blocks_nobody(self, ledger: Ledger, end: str) -> None:
        first = await ledger.owe_one(sequence=1)
        second = await ledger.owe_one(sequence=2)
        await ledger.change(
            "UPDATE deliveries SET state = :state, due_at = NULL WHERE sequence = 1", state=end
        )

        claims = await ledger.claim()

        assert [second] == [claim.id for claim in claims]
        assert first not in {claim.id for claim in claims}


class TestHeldBack:
    """What is held back gets out of the way of the claim, and comes back when it may run."""

    async def chain(self, ledger: Ledger, length: int = 3) -> list[UUID]:
        """Owe events of one envelope; the first fails, and the others are postponed."""
        owed = [await ledger.owe_one(sequence=n) for n in range(1, length + 1)]
        (claim,) = await ledger.claim()
        await settle(ledger, verdict_on(claim, "failed"))
        assert length - 1 == await self.postpone(ledger)
        return owed

    async def postpone(self, ledger: Ledger, *, patience: timedelta = PATIENCE) -> int:
        rooms = [Room("file", 10, is_ordered=True)]
        async with ledger.transaction() as connection:
            return await claims.postpone(connection, rooms, patience=patience)

    async def due_in(self, ledger: Ledger, delivery_id: UUID) -> timedelta:
        due_at = (await ledger.delivery(delivery_id)).due_at
        assert due_at is not None
        return due_at - datetime.now(UTC)

    async def between(self, ledger: Ledger, one: UUID, other: UUID) -> timedelta:
        """How much later the other is due."""
        sooner, later = [(await ledger.delivery(each)).due_at for each in (one, other)]
        assert sooner is not None
        assert later is not None
        return later - sooner

    async def fail_first(self, ledger: Ledger, delivery_id: UUID) -> Claim:
        """Let the back-off of the first pass, and claim it again."""
        await ledger.shift("deliveries", "due_at", -2 * MINUTE, state="pending", worker=WORKER)
        (claim,) = await ledger.claim()
        assert delivery_id == claim.id
        return claim

    async def test_it_is_away_until_the_first_one_is_tried_again(self, ledger: Ledger) -> None:
        _, second, third = await self.chain(ledger)

        for each in (second, third):
            assert MINUTE / 2 < await self.due_in(ledger, each) <= MINUTE + claims.SHORTLY
        assert 0 == await self.postpone(ledger)

    async def test_it_waits_for_the_first_of_its_own_envelope(self, ledger: Ledger) -> None:
        """Not for one of another callback, account or envelope, whatever their numbers are."""
        await ledger.register("mail")
        await ledger.owe_one("mail", sequence=0)
        await ledger.owe_one(account="acme", sequence=0)
        await ledger.owe_one(envelope="env_2", sequence=0)
        await ledger.shift("deliveries", "due_at", 10 * MINUTE)

        first, *others = await self.chain(ledger)

        for each in others:
            assert timedelta(seconds=5) == await self.between(ledger, first, each)

    async def test_each_waits_for_its_own(self, ledger: Ledger) -> None:
        firsts = [await ledger.owe_one(envelope=name, sequence=1) for name in ("env_1", "env_2")]
        others = [await ledger.owe_one(envelope=name, sequence=2) for name in ("env_1", "env_2")]
        claimed = {claim.id: claim for claim in await ledger.claim()}
        waits = zip(firsts, (MINUTE, 5 * MINUTE), strict=True)
        await settle(
            ledger, *(verdict_on(claimed[id_], "failed", wait=wait) for id_, wait in waits)
        )

        assert 2 == await self.postpone(ledger)

        for first, other in zip(firsts, others, strict=True):
            assert timedelta(seconds=5) == await self.between(ledger, first, other)

    async def test_nobody_elses_is_touched(self, ledger: Ledger) -> None:
        """Neither that of a callback which was not named, nor of one that keeps no order."""
        await ledger.register("mail")
        for name in ("file", "mail"):
            await ledger.owe_one(name, sequence=1)
            await ledger.owe_one(name, sequence=2)
        claimed = await ledger.claim("file", "mail")
        await settle(ledger, *(verdict_on(claim, "failed") for claim in claimed))

        async with ledger.transaction() as connection:
            rooms = [Room("file", 10, is_ordered=False)]
            assert 0 == await claims.postpone(connection, rooms, patience=PATIENCE)
        assert 1 == await self.postpone(ledger)

    async def test_one_that_somebody_holds_is_left_for_the_next_time(
        self, postgres_ledger: Ledger
    ) -> None:
        """Whoever locks it may be about to change it, and nobody is to wait for that."""
        await postgres_ledger.owe_one(sequence=1)
        second = await postgres_ledger.owe_one(sequence=2)
        await postgres_ledger.claim()

        async with postgres_ledger.transaction() as connection:
            await deliveries.lock(connection, second)
            assert 0 == await self.postpone(postgres_ledger)

        assert 1 == await self.postpone(postgres_ledger)

    async def test_but_no_longer_than_until_it_may_overtake(self, ledger: Ledger) -> None:
        first = await ledger.owe_one(sequence=1)
        second = await ledger.owe_one(sequence=2)
        (claim,) = await ledger.claim()
        await settle(ledger, verdict_on(claim, "failed", wait=60 * MINUTE))

        await self.postpone(ledger, patience=2 * MINUTE)

        assert first == claim.id
        assert MINUTE < await self.due_in(ledger, second) <= 2 * MINUTE

    @pytest.mark.parametrize("end", ["done", "dead"])
    async def test_the_end_of_one_wakes_the_next_and_only_that(
        self, ledger: Ledger, end: str
    ) -> None:
        first, second, _ = await self.chain(ledger)
        claim = await self.fail_first(ledger, first)

        await settle(ledger, verdict_on(claim, end))

        assert [second] == [each.id for each in await ledger.claim()]

    async def test_so_does_an_operator_who_discards_one(self, ledger: Ledger) -> None:
        first, second, _ = await self.chain(ledger)

        async with ledger.transaction() as connection:
            await deliveries.discard(connection, first)

        assert [second] == [each.id for each in await ledger.claim()]

    async def test_one_that_backs_off_is_not_woken(self, ledger: Ledger) -> None:
        first, second, _ = await self.chain(ledger)
        await ledger.change("UPDATE deliveries SET attempts = 1 WHERE sequence = 2")
        claim = await self.fail_first(ledger, first)

        await settle(ledger, verdict_on(claim))

        assert timedelta(0) < await self.due_in(ledger, second)

    async def test_its_time_comes_without_being_woken(self, ledger: Ledger) -> None:
        _, second, third = await self.chain(ledger)
        await ledger.change(
            "UPDATE deliveries SET state = 'done', due_at = NULL WHERE sequence = 1"
        )
        await ledger.make_due()

        assert [second] == [each.id for each in await ledger.claim()]
        await self.postpone(ledger)
        assert timedelta(0) < await self.due_in(ledger, third) <= LEASE + claims.SHORTLY

    async def test_who_is_postponed_is_not_overtaken(self, ledger: Ledger) -> None:
        """It does not back off, it only waits: an old backlog is not mixed up."""
        _, _, third = await self.chain(ledger)
        await ledger.change(
            "UPDATE deliveries SET state = 'done', due_at = NULL WHERE sequence = 1"
        )
        await ledger.shift("deliveries", "created_at", -PAST)
        await ledger.shift("deliveries", "due_at", -PAST, id=third.hex)

        assert [] == await ledger.claim()
        assert 1 == await self.postpone(ledger)
        assert await self.due_in(ledger, third) <= timedelta(seconds=30)

    async def test_one_at_work_and_one_without_order_stay_as_they_are(self, ledger: Ledger) -> None:
        await ledger.owe_one(sequence=1)
        await ledger.owe_one(sequence=2)
        await ledger.owe_one(envelope=None, sequence=None)
        await ledger.change("UPDATE deliveries SET state = 'running' WHERE sequence = 2")

        assert 0 == await self.postpone(ledger)

    async def hold_back(self, ledger: Ledger, number: int = 5000) -> None:
        """Owe four events of each envelope; the first of each backs off."""
        is_postgresql = ledger.database.is_postgresql
        new = "gen_random_uuid()" if is_postgresql else "lower(hex(randomblob(16)))"
        due = "now() + interval '{}'" if is_postgresql else SQLITE_LATER
        later, past = (
            (due.format("10 min"), due.format("-1 min"))
            if is_postgresql
            else (due.replace("?", f"'{by}'") for by in ("+10 minutes", "-1 minutes"))
        )
        await ledger.change(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number}), "  # noqa: S608
            "s(k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM s WHERE k < 4) "
            "INSERT INTO deliveries (id, event_id, callback, account, envelope_id, sequence, "
            f"due_at, created_at, attempts) SELECT {new}, {new}, 'file', 'default', "
            f"'held_' || i, k, CASE k WHEN 1 THEN {later} ELSE {past} END, {past}, "
            "CASE k WHEN 1 THEN 1 ELSE 0 END FROM n, s"
        )

    async def test_thousands_of_them_hold_up_nobody(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        await self.hold_back(ledger)
        healthy = await ledger.owe_one("mail", envelope="env_1")
        free = await ledger.owe_one("file", envelope="env_2")

        assert [healthy] == [each.id for each in await ledger.claim("file", "mail")]

        # As many pieces as it takes, each of them bounded.
        pieces = []
        while postponed := await self.postpone(ledger):
            pieces.append(postponed)
        assert 15_000 == sum(pieces)
        assert max(pieces) <= claims.WINDOW + 10
        assert [free] == [each.id for each in await ledger.claim("file", "mail")]

    async def test_no_statement_visits_more_than_a_window_of_them(
        self, postgres_ledger: Ledger
    ) -> None:
        await self.hold_back(postgres_ledger)
        bound = claims.WINDOW + 10
        room = "'{file}', '{10}', '{t}'"
        statements = {
            claims._CLAIM_POSTGRESQL: (
                "text[], int4[], bool[], text, interval, interval, bool[]",
                f"{room}, 'w', '30 s', '15 min', '{{f}}'",
            ),
            claims._POSTPONE_POSTGRESQL: (
                "text[], int4[], bool[], interval, interval, interval",
                f"{room}, '5 s', '30 s', '15 min'",
            ),
        }
        for statement, (types, values) in statements.items():
            # With the statistics of a quiet hour, too.
            async with postgres_ledger.transaction() as connection:
                await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
                await connection.exec_driver_sql(f"PREPARE bounded ({types}) AS {statement}")
                explain = f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE bounded ({values})"
                (answer,) = (await connection.exec_driver_sql(explain)).scalars()
                await connection.exec_driver_sql("DEALLOCATE bounded")

            for visited in scanned(answer[0]["Plan"]):
                assert visited <= 2 * bound


def scanned(plan: dict[str, Any]) -> Iterator[float]:
    """How many rows each scan of deliveries in a plan has seen, those it threw away included."""
    if plan.get("Relation Name") == "deliveries" and "Scan" in plan["Node Type"]:
        rows = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        yield rows * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from scanned(part)


class TestWaking:
    """What waits behind a delivery is woken, whatever is written at the same moment."""

    async def test_a_postpone_that_read_before_and_writes_after_changes_nothing(
        self, postgres_ledger: Ledger
    ) -> None:
        await postgres_ledger.register("file")
        await postgres_ledger.owe_one(sequence=1)
        second = await postgres_ledger.owe_one(sequence=2)
        (claim,) = await postgres_ledger.claim("file")
        slowly = _napping(claims._POSTPONE_POSTGRESQL)
        arguments = (["file"], [10], [True], claims.SHORTLY, claims.SOON, PATIENCE)

        async def postpone() -> None:
            async with postgres_ledger.transaction() as connection:
                await connection.exec_driver_sql(slowly, arguments)

        postponing = asyncio.create_task(postpone())
        await until(lambda: is_napping(postgres_ledger))
        await settle(postgres_ledger, verdict_on(claim))
        await postponing

        assert [second] == [c.id for c in await postgres_ledger.claim("file")]

    async def test_one_that_was_postponed_is_due_at_once(self, postgres_ledger: Ledger) -> None:
        await postgres_ledger.register("file")
        await postgres_ledger.owe_one(sequence=1)
        second = await postgres_ledger.owe_one(sequence=2)
        (claim,) = await postgres_ledger.claim("file")
        async with postgres_ledger.transaction() as connection:
            rooms = [Room("file", 10, is_ordered=True)]
            assert 1 == await claims.postpone(connection, rooms, patience=PATIENCE)

        await settle(postgres_ledger, verdict_on(claim))

        assert [second] == [c.id for c in await postgres_ledger.claim("file")]


def _napping(statement: str) -> str:
    """Let a statement sleep between what it reads and what it writes."""
    nap = "), nap AS MATERIALIZED (SELECT pg_sleep(2) FROM (SELECT count(*) FROM held) AS all_of)"
    slow = statement.replace("), ours AS MATERIALIZED (", f"{nap}, ours AS MATERIALIZED (")
    return slow.replace(
        "FROM held CROSS JOIN LATERAL", "FROM nap CROSS JOIN held CROSS JOIN LATERAL"
    )


async def is_napping(ledger: Ledger) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    async with ledger.reading() as connection:
        return bool((await connection.exec_driver_sql(query)).scalar())


class TestLoad:
    async def load_envelope(self, ledger: Ledger, delivery_id: UUID) -> Mapping[str, Any] | None:
        async with ledger.transaction() as connection:
            found = await contents.load(connection, [delivery_id])
        return contents.decode_envelope(found[delivery_id])

    async def load(self, ledger: Ledger, *ids: UUID) -> contents.Decoded:
        async with ledger.transaction() as connection:
            found = await contents.load(connection, ids)
        return contents.decode(found[ids[0]])

    async def test_gives_event_bytes_and_envelope_in_one_query(self, ledger: Ledger) -> None:
        await ledger.envelope(status="signed", fields_status="ready", parties=[{"name": "Ada"}])
        event = await ledger.record(body=b'{"n": 1}')
        delivery_id = await ledger.owe_one(event=event)

        found = await self.load(ledger, delivery_id)
        envelope = await self.load_envelope(ledger, delivery_id)

        assert found.event is not None
        assert envelope is not None
        assert (event, "envelope.signed") == (found.event["id"], found.event["type"])
        assert isinstance(found.event["received_at"], datetime)
        assert ("signed", [{"name": "Ada"}]) == (
            envelope["status"],
            envelope["parties"],
        )
        assert envelope["disputed"] is False
        assert "marks" not in envelope
        assert b'{"n": 1}' == found.body
        assert not found.is_late

    async def test_what_is_gone_is_none(self, ledger: Ledger) -> None:
        pruned = await ledger.owe_one(body=None)

        found = await self.load(ledger, pruned)

        assert found.body is None
        assert await self.load_envelope(ledger, pruned) is None

    async def test_a_delivery_whose_event_is_gone_is_still_claimable(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one(event=new_id())

        found = await self.load(ledger, delivery_id)

        assert found.event is None

    async def test_one_is_late_once_a_later_one_is_done(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        first, mailed = await ledger.owe("file", "mail", sequence=1)
        await ledger.owe_one(sequence=2)
        claims = await ledger.claim(is_ordered=False)
        later = next(claim for claim in claims if claim.id != first)

        assert not (await self.load(ledger, first)).is_late
        await settle(ledger, verdict_on(later))

        assert (await self.load(ledger, first)).is_late
        assert not (await self.load(ledger, mailed)).is_late
        assert not (await self.load(ledger, later.id)).is_late


class TestSettle:
    async def test_a_done_delivery_owes_nothing(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()

        answer = await settle(ledger, verdict_on(claim))

        row = await ledger.delivery(claim.id)
        (history,) = await ledger.attempts()
        assert {claim.id: None} == answer
        assert ("done", None, None) == (row.state, row.due_at, row.last_error)
        assert row.settled_at is not None
        assert ("done", 1, WORKER) == (history.verdict, history.number, history.worker)
        assert history.started_at is not None

    async def test_a_failed_one_is_due_again_after_its_wait(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()

        answer = await settle(ledger, verdict_on(claim, "failed"))

        row = await ledger.delivery(claim.id)
        assert ("pending", "ValueError: no", "0123456789abcdef") == (
            row.state,
            row.last_error,
            row.fingerprint,
        )
        assert row.due_at == answer[claim.id]
        assert row.due_at is not None
        assert abs(row.due_at - datetime.now(UTC) - MINUTE) < timedelta(seconds=30)
        assert row.settled_at is None

    async def test_success_clears_the_error_of_an_earlier_attempt(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()
        await settle(ledger, verdict_on(claim, "failed", wait=timedelta(0)))
        (again,) = await ledger.claim()

        await settle(ledger, verdict_on(again))

        row = await ledger.delivery(claim.id)
        assert (None, None, 2) == (row.last_error, row.fingerprint, row.attempts)
        assert ["failed", "done"] == await ledger.verdicts()

    async def test_many_are_settled_in_one_statement(self, ledger: Ledger) -> None:
        for number in range(50):
            await ledger.owe_one(envelope=f"env_{number}")
        claims = await ledger.claim(limit=50)

        await settle(ledger, *(verdict_on(claim) for claim in claims))

        assert {"done"} == set(await ledger.states())
        assert 50 == len(await ledger.attempts())

    async def test_the_verdict_of_a_zombie_is_thrown_away(self, ledger: Ledger) -> None:
        await ledger.owe_one(envelope="env_1")
        await ledger.owe_one(envelope="env_2")
        zombie, honest = sorted(await ledger.claim(), key=lambda claim: claim.id)
        await ledger.shift("deliveries", "due_at", -MINUTE, envelope_id="env_1")
        (claim,) = await ledger.claim(worker="worker-2")

        answer = await settle(ledger, verdict_on(zombie, "dead"), verdict_on(honest))

        assert {honest.id} == set(answer)
        assert "running" == (await ledger.delivery(zombie.id)).state
        assert ["lost"] == await ledger.verdicts(zombie.id)
        await settle(ledger, verdict_on(claim))
        assert "done" == (await ledger.delivery(zombie.id)).state

    async def test_an_error_may_hold_any_text(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()
        error = "Fehler: \N{SNOWMAN} \U0001f41b 'quoted' \"twice\" \\ \n {}"

        await settle(ledger, verdict_on(claim, "dead", error=error))

        assert error == (await ledger.delivery(claim.id)).last_error


class TestLease:
    async def test_renewal_begins_it_anew(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim(lease=timedelta(seconds=1))

        async with ledger.transaction() as connection:
            held = [(claim.id, claim.token), (new_id(), 1)]
            ours = await claims.renew(connection, held, lease=MINUTE)

        row = await ledger.delivery(claim.id)
        assert {claim.id} == ours
        assert row.due_at is not None
        assert row.due_at - datetime.now(UTC) > timedelta(seconds=30)

    async def test_who_lost_it_is_told_so(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()
        await ledger.shift("deliveries", "due_at", -MINUTE)
        await ledger.claim(worker="worker-2")

        async with ledger.transaction() as connection:
            ours = await claims.renew(connection, [(claim.id, claim.token)], lease=LEASE)

        assert set() == ours

    async def test_what_is_given_back_was_never_claimed(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        (claim,) = await ledger.claim()

        async with ledger.transaction() as connection:
            await claims.release(connection, [(claim.id, claim.token)])

        row = await ledger.delivery(claim.id)
        (again,) = await ledger.claim()
        assert ("pending", 0) == (row.state, row.attempts)
        assert (1, 2) == (again.attempt, again.token)
        assert [] == await ledger.attempts()

    async def test_only_what_is_named_is_renewed_or_given_back(self, ledger: Ledger) -> None:
        for envelope in ("env_1", "env_2", "env_3"):
            await ledger.owe_one(envelope=envelope)
        one, other, third = await ledger.claim()

        async with ledger.transaction() as connection:
            renewed = await claims.renew(connection, [one.held], lease=60 * MINUTE)
            returned = await claims.release(connection, [other.held])

        rows = [await ledger.delivery(each.id) for each in (one, other, third)]
        assert ({one.id}, {other.id}) == (renewed, returned)
        assert ["running", "pending", "running"] == [row.state for row in rows]
        assert [1, 0, 1] == [row.attempts for row in rows]
        ends = [row.due_at for row in rows if row.due_at is not None]
        assert ends[0] - ends[2] > 58 * MINUTE

    async def test_with_another_token_it_is_somebody_elses(self, ledger: Ledger) -> None:
        for envelope in ("env_1", "env_2"):
            await ledger.owe_one(envelope=envelope)
        one, other = await ledger.claim()

        async with ledger.transaction() as connection:
            held = [(one.id, one.token + 1), other.held]
            assert {other.id} == await claims.renew(connection, held, lease=LEASE)
            assert {other.id} == await claims.release(connection, held)


class TestPark:
    async def park(self, ledger: Ledger, *, limit: int = 100) -> int:
        async with ledger.transaction() as connection:
            return await deliveries.park(connection, after=10 * MINUTE, limit=limit)

    async def test_what_nobody_serves_is_set_aside(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        gone, served = await ledger.owe("file", "mail")
        await ledger.shift("callbacks", "last_seen_at", -11 * MINUTE, name="file")

        assert 1 == await self.park(ledger)

        row = await ledger.delivery(gone)
        assert ("parked", None) == (row.state, row.due_at)
        assert "pending" == (await ledger.delivery(served)).state
        assert 0 == await self.park(ledger)

    async def test_a_running_attempt_is_left_to_its_lease(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one()
        (claim,) = await ledger.claim()
        await ledger.shift("callbacks", "last_seen_at", -11 * MINUTE)

        assert 0 == await self.park(ledger)
        await ledger.shift("deliveries", "due_at", -MINUTE)
        assert 1 == await self.park(ledger)

        assert ["lost"] == await ledger.verdicts(delivery_id)
        assert {} == await settle(ledger, verdict_on(claim))

    async def test_only_so_many_at_once(self, ledger: Ledger) -> None:
        for number in range(3):
            await ledger.owe_one(envelope=f"env_{number}")
        await ledger.shift("callbacks", "last_seen_at", -11 * MINUTE)

        assert [2, 1, 0] == [await self.park(ledger, limit=2) for _ in range(3)]

    async def test_it_comes_back_when_the_callback_does(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.shift("callbacks", "last_seen_at", -11 * MINUTE)
        await self.park(ledger)

        await ledger.register("file")

        assert 1 == len(await ledger.claim())

    async def test_a_heart_beat_brings_back_what_was_parked_meanwhile(self, ledger: Ledger) -> None:
        """One process may park while another, whose beat it has not seen, registers."""
        await ledger.owe_one()
        await ledger.change("UPDATE deliveries SET state = 'parked', due_at = NULL")

        async with ledger.transaction() as connection:
            unparked = [await callbacks.unpark(connection, ["file"]) for _ in range(2)]

        assert [1, 0] == unparked
        assert ["pending"] == await ledger.states()


class TestRegister:
    async def read(self, ledger: Ledger) -> list[Subscription]:
        async with ledger.transaction() as connection:
            return await callbacks.read(connection)

    async def test_intake_reads_what_was_registered(self, ledger: Ledger) -> None:
        options = {"timeout": 30.0}
        wanted = Subscription("mail", ("envelope.signed", "contract.*"), "acme", options)
        async with ledger.transaction() as connection:
            await callbacks.register(connection, [wanted])

        found = await self.read(ledger)

        assert [Subscription("file", ("*",)), wanted] == found
        assert options == found[1].options

    async def test_the_first_time_is_kept_and_the_rest_is_taken_over(self, ledger: Ledger) -> None:
        await ledger.shift("callbacks", "first_seen_at", -MINUTE)
        await ledger.shift("callbacks", "last_seen_at", -MINUTE)

        await ledger.register("file", patterns=["envelope.signed"])

        async with ledger.transaction() as connection:
            (row,) = await callbacks.read_all(connection, unserved_after=10 * MINUTE)
        assert ("envelope.signed",) == row.subscription.patterns
        assert row.last_seen_at - row.first_seen_at > MINUTE / 2
        assert row.is_served

    async def test_a_heart_beat_says_who_must_register_first(self, ledger: Ledger) -> None:
        await ledger.shift("callbacks", "last_seen_at", -11 * MINUTE)

        async with ledger.transaction() as connection:
            answers = [
                await callbacks.touch(connection, ["file"]),
                await callbacks.touch(connection, ["file", "mail"]),
            ]
            (row,) = await callbacks.read_all(connection, unserved_after=10 * MINUTE)

        assert [True, False] == answers
        assert row.is_served

    async def test_two_processes_at_once_do_not_block_each_other(self, ledger: Ledger) -> None:
        await asyncio.gather(*(ledger.register("a", "b", "c") for _ in range(3)))
        await asyncio.gather(*(ledger.register("c", "b", "a") for _ in range(3)))

        assert ["a", "b", "c", "file"] == [each.name for each in await self.read(ledger)]


class TestSweep:
    """Who is owed what was recorded while intake did not know the callback yet."""

    async def sweep(
        self, ledger: Ledger, *, every: timedelta = timedelta(0), limit: int = 10_000
    ) -> callbacks.Swept:
        async with ledger.transaction() as connection:
            return await callbacks.sweep(connection, every=every, limit=limit)

    async def owed(self, ledger: Ledger) -> list[tuple[str, UUID]]:
        return sorted((d.callback, d.event_id) for d in await ledger.deliveries())

    async def test_what_is_missing_is_owed_once(self, ledger: Ledger) -> None:
        event = await ledger.record(sequence=4)

        owed = [(await self.sweep(ledger)).owed for _ in range(3)]

        (delivery,) = await ledger.deliveries()
        assert [1, 0, 0] == owed
        assert (event, "env_1", 4) == (delivery.event_id, delivery.envelope_id, delivery.sequence)

    async def test_two_replicas_at_once_owe_it_once(self, ledger: Ledger) -> None:
        for number in range(20):
            await ledger.record(sequence=number)

        await asyncio.gather(*(self.sweep(ledger) for _ in range(2)))

        assert 20 == len(await ledger.deliveries())

    async def test_what_was_swept_a_moment_ago_is_left_alone(self, ledger: Ledger) -> None:
        await self.sweep(ledger)
        await ledger.record()

        swept = await self.sweep(ledger, every=MINUTE)

        assert 0 == swept.owed

    async def test_only_the_types_that_the_patterns_name(self, ledger: Ledger) -> None:
        await ledger.register("exact", patterns=["envelope.signed", "a_b"])
        await ledger.register("prefix", patterns=["envelope.*"])
        await ledger.register("own", patterns=["receiver.dead"])
        types = ["envelope.signed", "envelopes.signed", "aXb", "contract.extracted"]
        events = {each: await ledger.record(each, envelope=None) for each in types}
        events["receiver.dead"] = await ledger.record("receiver.dead", envelope=None)
        await ledger.record(None, envelope=None)

        await self.sweep(ledger)

        wanted = [("file", events[each]) for each in types]
        wanted += [(name, events["envelope.signed"]) for name in ("exact", "prefix")]
        wanted += [("own", events["receiver.dead"])]
        assert sorted(wanted) == await self.owed(ledger)

    async def test_only_the_account_asked_for(self, ledger: Ledger) -> None:
        await ledger.change("UPDATE callbacks SET account = 'acme'")
        await ledger.record(account="default")
        event = await ledger.record(account="acme")

        await self.sweep(ledger)

        assert [("file", event)] == await self.owed(ledger)

    @pytest.mark.parametrize("effect", ["conflict", "quarantined", "refreshed"])
    async def test_what_changed_nothing_is_owed_to_nobody(
        self, ledger: Ledger, effect: str
    ) -> None:
        await ledger.record(effect=effect)

        assert 0 == (await self.sweep(ledger)).owed

    async def test_what_came_before_the_first_registration_is_not_owed(
        self, ledger: Ledger
    ) -> None:
        before = datetime.now(UTC) - MINUTE / 2
        event_id = UUID(int=first_id_at(before.timestamp()).int + 1)
        await ledger.record(received_at=before, event_id=event_id)

        assert 0 == (await self.sweep(ledger)).owed

    async def test_a_request_under_way_at_registration_is_owed(self, ledger: Ledger) -> None:
        """It was received before, and committed after: intake could not know."""
        await ledger.record(received_at=datetime.now(UTC) - timedelta(seconds=2))

        assert 1 == (await self.sweep(ledger)).owed

    async def test_a_commit_that_took_long_is_found(self, ledger: Ledger) -> None:
        """Ids are made at receipt, so an event may appear behind the place swept last."""
        await ledger.shift("callbacks", "first_seen_at", -MINUTE)
        await self.sweep(ledger)
        received = datetime.now(UTC) - timedelta(seconds=20)
        event_id = UUID(int=first_id_at(received.timestamp()).int + 1)
        await ledger.record(received_at=received, event_id=event_id)

        assert 1 == (await self.sweep(ledger)).owed

    async def test_a_long_absence_is_made_good_piece_by_piece(self, ledger: Ledger) -> None:
        long_ago = datetime.now(UTC) - timedelta(hours=2)
        await ledger.shift("callbacks", "first_seen_at", timedelta(hours=-3))
        await ledger.shift("callbacks", "swept_at", timedelta(hours=-3))
        for number in range(10):
            at = long_ago + number * MINUTE
            event_id = UUID(int=first_id_at(at.timestamp()).int + 1)
            await ledger.record(received_at=at, event_id=event_id, sequence=number)

        swept = await self.sweep(ledger, limit=4)

        assert (5, True) == (swept.owed, swept.is_behind)
        while (await self.sweep(ledger, limit=4)).is_behind:
            pass
        assert 10 == len(await ledger.deliveries())


class TestPage:
    async def test_the_newest_come_first_and_a_page_continues(self, ledger: Ledger) -> None:
        owed = [await ledger.owe_one(envelope=f"env_{n}") for n in range(3)]

        async with ledger.transaction() as connection:
            first = await deliveries.page(connection, filters={}, limit=2)
            rest = await deliveries.page(connection, filters={}, limit=2, before=first[-1].id)

        assert owed[::-1] == [d.id for d in [*first, *rest]]
        assert isinstance(first[0], Delivery)
        assert "envelope.signed" == first[0].event_type


class TestPoll:
    async def is_any_due(self, ledger: Ledger, *names: str) -> bool:
        async with ledger.database.begin(limit=MINUTE, is_reading=True) as connection:
            return await claims.is_any_due(connection, names)

    async def test_of_sqlite_asks_before_it_locks(self, sqlite_url: str) -> None:
        ledger = Ledger(sqlite_url)
        await ledger.register("file")

        assert not await self.is_any_due(ledger, "file")
        await ledger.owe_one()
        await until(lambda: self.is_any_due(ledger, "file"))
        assert not await self.is_any_due(ledger, "mail")
        await ledger.shift("deliveries", "due_at", MINUTE)
        assert not await self.is_any_due(ledger, "file")
        await ledger.database.close()
