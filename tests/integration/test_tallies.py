"""Counts of all processes add up, and wait for a database that is away."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from app.callbacks import Callbacks
from app.callbacks.testing import make_event
from app.dispatch.attempt import Call, Done, Failed, Outcome
from app.dispatch.settling import settlement
from app.metrics import Metrics
from app.store import levels, tallies
from app.store.claims import Claim
from app.store.ids import new_id
from app.store.session import Database, DatabaseAddress
from app.store.tallies import KEPT, Step, Tally
from app.upkeep import tallying
from app.upkeep.counting import ATTEMPTS, DELIVERIES, Counting
from app.upkeep.levels import CLOSED, HALF_OPEN, OPEN, PAUSED, Gauges, Lag, oldest, show, state_of
from app.upkeep.sequencer import Sequencer
from app.upkeep.tallying import Tallies
from tests.integration.ledger import Ledger

MATCHED_KEY = """
INSERT INTO keys (fingerprint, label, account, first_seen_at, last_match_at)
VALUES ('f', 'new', 'default', CURRENT_TIMESTAMP, CURRENT_TIMESTAMP)
"""
NOON = datetime(2026, 7, 1, 12, 0, 30, tzinfo=UTC)


def tally(at: datetime = NOON, account: str = "default", label: str = "recorded") -> Tally:
    return Tally(Step.MINUTE.floor(at), account, "webhooks", label)


async def add(ledger: Ledger, counts: dict[Tally, int]) -> None:
    async with ledger.transaction() as connection:
        await tallies.add(connection, counts)


async def total(
    ledger: Ledger,
    step: Step,
    *,
    at: datetime = NOON,
    accounts: tuple[str, ...] | None = None,
) -> dict[str, int]:
    async with ledger.reading() as connection:
        points = await tallies.read(
            connection, [step.floor(at)], step=step, names=["webhooks"], accounts=accounts
        )
    return {point.label: point.count for point in points}


class TestStep:
    @pytest.mark.parametrize(
        "step, begin",
        [
            (Step.MINUTE, NOON.replace(second=0)),
            (Step.HOUR, NOON.replace(minute=0, second=0)),
            (Step.DAY, NOON.replace(hour=0, minute=0, second=0)),
        ],
    )
    def test_begins_at_a_round_time(self, step: Step, begin: datetime) -> None:
        assert begin == step.floor(NOON)
        assert begin == step.floor(begin)


class TestCounts:
    async def test_of_several_processes_add_up_in_every_step(self, ledger: Ledger) -> None:
        later = NOON + timedelta(minutes=1)

        await add(ledger, {tally(): 2, tally(label="duplicate"): 1})
        await add(ledger, {tally(): 3, tally(later): 5})

        assert {"recorded": 5, "duplicate": 1} == await total(ledger, Step.MINUTE)
        assert {"recorded": 10, "duplicate": 1} == await total(ledger, Step.HOUR)
        assert {"recorded": 10, "duplicate": 1} == await total(ledger, Step.DAY)

    async def test_of_nothing_are_no_statement(self, ledger: Ledger) -> None:
        await add(ledger, {})

        assert {} == await total(ledger, Step.DAY)

    async def test_are_seen_by_account(self, ledger: Ledger) -> None:
        await add(ledger, {tally(account=name): 1 for name in ("", "a", "b")})

        assert {"recorded": 3} == await total(ledger, Step.HOUR)
        assert {"recorded": 2} == await total(ledger, Step.HOUR, accounts=("a", "b", "c"))
        assert {} == await total(ledger, Step.HOUR, accounts=())

    async def test_written_at_once_by_many_lose_nothing(self, ledger: Ledger) -> None:
        labels = [f"label-{number}" for number in range(20)]

        async def write(order: list[str]) -> None:
            for _ in range(5):
                await add(ledger, {tally(label=label): 1 for label in order})

        await asyncio.gather(write(labels), write(labels[::-1]), write(labels[10:] + labels[:10]))

        assert dict.fromkeys(labels, 15) == await total(ledger, Step.DAY)


class TestOldCounts:
    async def test_are_dropped_by_step(self, ledger: Ledger) -> None:
        await add(ledger, {tally(): 1, tally(NOON - timedelta(days=30)): 1})

        async with ledger.transaction() as connection:
            more = await tallies.drop_old(connection, Step.MINUTE, before=NOON - timedelta(days=1))

        before = NOON - timedelta(days=30)
        assert not more
        assert {} == await total(ledger, Step.MINUTE, at=before)
        assert {"recorded": 1} == await total(ledger, Step.HOUR, at=before)
        assert {"recorded": 1} == await total(ledger, Step.MINUTE)

    async def test_are_dropped_a_few_at_a_time(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tallies, "DROPPED_AT_ONCE", 2)
        await add(ledger, {tally(NOON - timedelta(minutes=n)): 1 for n in range(3)})

        async with ledger.transaction() as connection:
            said = [await tallies.drop_old(connection, Step.MINUTE, before=NOON) for _ in range(2)]

        assert [True, False] == said

    async def test_are_dropped_while_counting_goes_on(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tallying, "EVERY", timedelta(milliseconds=10))
        now = datetime.now(UTC)
        past = now - KEPT[Step.MINUTE] - timedelta(hours=1)
        await add(ledger, {tally(past): 1})
        counting = Tallies(ledger.database, holder="a")
        running = asyncio.create_task(counting.run())

        deadline = asyncio.get_running_loop().time() + 20
        while await total(ledger, Step.MINUTE, at=past):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        running.cancel()

        assert {"recorded": 1} == await total(ledger, Step.HOUR, at=past)


class TestTallies:
    async def test_are_told_once(self, ledger: Ledger) -> None:
        counting = Tallies(ledger.database, holder="a")
        counting.count({("default", "webhooks", "recorded"): 2})
        counting.count({("default", "webhooks", "recorded"): 1})

        await counting.flush()
        await counting.flush()

        assert {"recorded": 3} == await total(ledger, Step.DAY, at=datetime.now(UTC))

    async def test_are_kept_for_a_database_that_is_away(self, ledger: Ledger) -> None:
        await ledger.change("ALTER TABLE tallies RENAME TO mislaid")
        counting = Tallies(ledger.database, holder="a")
        counting.count({("default", "webhooks", "recorded"): 2})

        await counting.flush()
        counting.count({("default", "webhooks", "recorded"): 1})
        await counting.flush()
        await ledger.change("ALTER TABLE mislaid RENAME TO tallies")
        await counting.flush()

        assert {"recorded": 3} == await total(ledger, Step.DAY, at=datetime.now(UTC))

    async def test_are_bounded(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tallying, "MOST", 2)
        counting = Tallies(ledger.database, holder="a")

        for label in ("a", "b", "c", "a"):
            counting.count({("default", "webhooks", label): 1})
        await counting.flush()

        assert {"a": 2, "b": 1} == await total(ledger, Step.DAY, at=datetime.now(UTC))

    async def test_that_the_database_refuses_are_given_up(self, postgres_url: str) -> None:
        """They would keep all others from it."""
        ledger = Ledger(postgres_url)
        counting = Tallies(ledger.database, holder="a")
        counting.count({("default", "webhooks", "\x00"): 1})
        await counting.flush()
        counting.count({("default", "webhooks", "duplicate"): 1})

        await counting.flush()

        assert {"duplicate": 1} == await total(ledger, Step.DAY, at=datetime.now(UTC))
        await ledger.database.close()


class TestCounting:
    async def test_of_attempts_is_by_verdict_and_by_what_became_of_them(
        self, ledger: Ledger
    ) -> None:
        counting = Tallies(ledger.database, holder="a")
        metrics, callbacks = Metrics(version="1"), Callbacks()
        callbacks.on("*", name="file")(lambda _: None)
        event = make_event("envelope.signed", account="beta")
        claim = Claim(new_id(), 1, 1, 0, "file", 1, new_id(), "env_1")
        call = Call(next(iter(callbacks)), claim, None, event)
        ended = Outcome(call, Done(), NOON, NOON + timedelta(seconds=2))
        never_begun = Outcome(call, Failed("no", "f"), None, NOON)
        settled = [(o, settlement(o, noise=0.5)) for o in (ended, never_begun)]

        Counting(metrics, counting).attempted(settled)
        await counting.flush()

        text = metrics.write().decode()
        assert 'atlas_attempts_total{callback="file",verdict="done"} 1.0' in text
        assert 'atlas_attempts_total{callback="file",verdict="failed"} 1.0' in text
        assert 'atlas_attempt_seconds_total{callback="file"} 2.0' in text
        async with ledger.reading() as connection:
            points = await tallies.read(
                connection,
                [Step.DAY.floor(datetime.now(UTC))],
                step=Step.DAY,
                names=[ATTEMPTS, DELIVERIES],
                accounts=["beta"],
            )
        assert {
            (ATTEMPTS, "done", 1),
            (ATTEMPTS, "failed", 1),
            (DELIVERIES, "done", 1),
        } == {(point.name, point.label, point.count) for point in points}


class TestLevels:
    async def test_are_those_of_the_database(self, ledger: Ledger) -> None:
        await ledger.register("file", "mail")
        await ledger.owe("file", "mail", sequence=1)
        await ledger.owe_one("file", sequence=2, account="beta")
        await ledger.change(
            "UPDATE deliveries SET state = 'dead', due_at = NULL WHERE account = 'beta'"
        )
        await ledger.shift("deliveries", "due_at", timedelta(seconds=-60), state="pending")
        gauges = Gauges(ledger.database)

        seen = await gauges.refresh()

        assert seen is not None
        assert [("beta", "file", "dead", 1), ("default", "file", "pending", 1)] == sorted(
            (q.account, q.callback, q.state, q.count) for q in seen.queues if q.callback == "file"
        )
        assert 59 <= oldest(seen.queues, seen) < 120
        assert ["file", "mail"] == [gate.callback for gate in seen.gates]
        assert (0, True) == (seen.position, seen.waiting_since is not None)

    async def test_count_as_due_what_a_dead_worker_has_left(self, ledger: Ledger) -> None:
        """Its lease is over, and while nobody else works nobody takes it back."""
        await ledger.register("file")
        await ledger.owe("file")
        await ledger.change("UPDATE deliveries SET state = 'running'")
        await ledger.shift("deliveries", "due_at", timedelta(seconds=-60), state="running")

        seen = await Gauges(ledger.database).refresh()

        assert seen is not None
        assert 59 <= oldest(seen.queues, seen) < 120

    async def test_are_asked_for_once_for_all_who_look(self, ledger: Ledger) -> None:
        gauges = Gauges(ledger.database)

        first, second = await asyncio.gather(gauges.refresh(), gauges.refresh())
        third = await gauges.refresh()
        fourth = await gauges.refresh(max_age=timedelta(0))

        assert first is second
        assert second is third
        assert third is not fourth

    async def test_of_a_database_that_is_away_are_the_last_known(self, ledger: Ledger) -> None:
        gauges = Gauges(ledger.database)
        unknown = gauges.age
        known = await gauges.refresh()
        await ledger.change("ALTER TABLE callbacks RENAME TO mislaid")

        seen = await gauges.refresh(max_age=timedelta(0))

        assert known is seen
        assert (True, False) == (unknown is None, gauges.age is None)
        await ledger.change("ALTER TABLE mislaid RENAME TO callbacks")

    async def test_are_shown_as_metrics(self, ledger: Ledger) -> None:
        metrics, gauges = Metrics(version="1"), Gauges(ledger.database)
        show(metrics, gauges)
        nothing = metrics.write().decode()
        await ledger.register("file")
        await ledger.owe("file")
        await ledger.change(MATCHED_KEY)
        await Sequencer(ledger.database, holder="a").step()

        await gauges.refresh()
        text = metrics.write().decode()

        assert "atlas_deliveries{" not in nothing
        assert "\natlas_feed_position " not in nothing
        assert 'atlas_deliveries{callback="file",state="pending"} 1.0' in text
        assert 'atlas_breaker_state{callback="file"} 0.0' in text
        assert "atlas_feed_position 1.0" in text
        assert "atlas_feed_lag_seconds 0.0" in text
        assert 'atlas_key_last_match_timestamp_seconds{account="default",key="new"} 1' in text
        assert "atlas_delivery_oldest_due_seconds " in text

    @pytest.mark.parametrize(
        "paused, opened, state",
        [
            (None, None, CLOSED),
            (None, NOON, HALF_OPEN),
            (None, NOON + timedelta(seconds=1), OPEN),
            (NOON, None, PAUSED),
        ],
    )
    def test_say_what_keeps_a_callback(
        self, paused: datetime | None, opened: datetime | None, state: int
    ) -> None:
        assert state == state_of(levels.Gate("file", paused, opened), NOON)


class TestPool:
    async def test_is_counted(self, ledger: Ledger) -> None:
        idle = levels.pool_of(ledger.database)
        async with ledger.reading():
            busy = levels.pool_of(ledger.database)

        assert idle[1] + 1 == busy[1]
        assert busy[0] > 0

    async def test_of_a_pooler_outside_is_none_of_ours(self, postgres_url: str) -> None:
        database = Database(DatabaseAddress(postgres_url, pgbouncer=True))

        assert (0, 0) == levels.pool_of(database)


class TestLag:
    async def test_of_a_loop_is_the_worst_of_late(self) -> None:
        lag = Lag()
        assert 0.0 == lag.worst
        running = asyncio.create_task(lag.run())

        async with asyncio.timeout(20):
            while not lag._samples:  # noqa: ASYNC110  # it tells nobody
                await asyncio.sleep(0.05)
        running.cancel()

        assert lag.worst >= 0.0


PLANNED = {
    "read": (
        tallies._READ_POSTGRESQL,
        "timestamptz[], text[], text[]",
        f"array[{', '.join(['now()'] * 1500)}], array['minute:webhooks'], NULL",
    ),
    "drop_old": (
        tallies._DROP_POSTGRESQL,
        "timestamptz, text, text, int8",
        "now() - interval '3 days', 'minute:', 'minute;', 5000",
    ),
    "queues": (levels._QUEUES, "", ""),
    "gates": (levels._GATES, "", ""),
    "uses": (levels._USES, "", ""),
}


class TestPlans:
    @pytest.mark.parametrize("name", PLANNED)
    async def test_read_no_table_from_end_to_end(self, postgres_url: str, name: str) -> None:
        statement, types, values = PLANNED[name]
        ledger = Ledger(postgres_url)
        async with ledger.transaction() as connection:
            declared, given = (f"({types})", f"({values})") if types else ("", "")
            await connection.exec_driver_sql(f"PREPARE planned {declared} AS {statement}")
            explained = await connection.exec_driver_sql(f"EXPLAIN EXECUTE planned {given}")
            plan = "\n".join(explained.scalars())
            await connection.exec_driver_sql("DEALLOCATE planned")
        await ledger.database.close()

        assert "Seq Scan" not in plan, plan
