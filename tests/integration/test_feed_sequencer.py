"""Who gives places: one at a time, at once when told, and whatever fails in between."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from app.store import feed, leases
from app.store.feed import Floor, Item, Place, Placed
from app.store.session import DEFAULT_SCHEMA, Database, DatabaseAddress, Limits
from app.upkeep import sequencer as module
from app.upkeep.sequencer import Footing, Sequencer
from tests.integration.ledger import Ledger, until
from tests.said import said

AGES = timedelta(days=1)


@pytest.fixture(name="on_postgresql")
async def _on_postgresql(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    yield ledger
    await ledger.database.close()


@asynccontextmanager
async def running(sequencer: Sequencer) -> AsyncIterator[None]:
    task = asyncio.create_task(sequencer.run())
    yield
    assert not task.done()
    sequencer.close()
    await task


async def items_of(ledger: Ledger) -> list[Item]:
    async with ledger.reading() as connection:
        return await feed.read(connection, 0, limit=1000)


async def count_of(ledger: Ledger) -> int:
    return len(await items_of(ledger))


class TestLease:
    async def test_is_left_to_whoever_is_at_work_without_waiting(
        self, on_postgresql: Ledger
    ) -> None:
        await on_postgresql.record()
        await Sequencer(on_postgresql.database, holder="a").step()
        await on_postgresql.record()

        async with on_postgresql.transaction() as connection:
            assert await leases.hold(connection, feed.LEASE, holder="a", span=AGES)
            other = Sequencer(on_postgresql.database, holder="b")
            other.wake()
            # To wait for the lock would end in an error.
            assert module.OTHERS_TICK == await other.step()
        assert other.lag is None

    async def test_has_a_token_that_rises_with_each_new_holder(self, ledger: Ledger) -> None:
        tokens = []
        for holder, span in (("a", 0), ("a", 0), ("b", 60), ("b", 60), ("a", 60)):
            async with ledger.transaction() as connection:
                tokens.append(
                    await leases.hold(
                        connection, "work", holder=holder, span=timedelta(seconds=span)
                    )
                )
            await asyncio.sleep(0.002)

        assert [1, 1, 2, 2, None] == tokens
        async with ledger.reading() as connection:
            assert "b" == await leases.holder_of(connection, "work")

    async def test_is_not_written_at_each_use(self, on_postgresql: Ledger) -> None:
        versions = set()
        for _ in range(5):
            async with on_postgresql.transaction() as connection:
                await leases.hold(connection, "work", holder="a", span=AGES)
            async with on_postgresql.reading() as connection:
                rows = await connection.exec_driver_sql("SELECT ctid::text FROM leases")
                versions.add(rows.scalar_one())

        assert 1 == len(versions)

    @pytest.mark.parametrize(
        "passed, is_renewed",
        [
            pytest.param(timedelta(hours=11), False, id="more-than-half-is-left"),
            pytest.param(timedelta(hours=16), True, id="a-third-is-left"),
        ],
    )
    async def test_is_renewed_once_half_of_it_is_over(
        self, on_postgresql: Ledger, passed: timedelta, *, is_renewed: bool
    ) -> None:
        async def hold() -> datetime:
            async with on_postgresql.transaction() as connection:
                await leases.hold(connection, "work", holder="a", span=AGES)
                rows = await connection.exec_driver_sql("SELECT until FROM leases")
                end: datetime = rows.scalar_one()
                return end

        until_then = await hold() - passed
        await on_postgresql.shift("leases", "until", -passed)

        assert is_renewed == (await hold() > until_then)

    async def test_that_has_run_out_is_taken_by_one_of_many(self, on_postgresql: Ledger) -> None:
        """Also if another one looks before the first has committed; and nobody waits."""
        async with on_postgresql.transaction() as connection:
            await leases.hold(connection, "work", holder="lost", span=timedelta(0))

        async with on_postgresql.transaction() as one, on_postgresql.transaction() as other:
            taken = await leases.hold(one, "work", holder="a", span=AGES)
            async with asyncio.timeout(10):
                refused = await leases.hold(other, "work", holder="b", span=AGES)

        assert (2, None) == (taken, refused)

    async def test_is_given_back_at_the_end(self, ledger: Ledger) -> None:
        sequencer = Sequencer(ledger.database, holder="a")
        await ledger.record()
        await sequencer.step()

        await sequencer.stop()

        async with ledger.reading() as connection:
            assert await leases.holder_of(connection, feed.LEASE) is None

    async def test_is_given_back_by_its_holder_and_alone(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            for name in ("work", "other work"):
                await leases.hold(connection, name, holder="a", span=AGES)
            await leases.release(connection, "work", holder="b")
            assert "a" == await leases.holder_of(connection, "work")

            await leases.release(connection, "work", holder="a")

        async with ledger.reading() as connection:
            assert await leases.holder_of(connection, "work") is None
            assert "a" == await leases.holder_of(connection, "other work")

    async def test_of_a_database_that_is_away_ends_by_itself(self, ledger: Ledger) -> None:
        sequencer = Sequencer(ledger.database, holder="a")
        await ledger.record()
        await sequencer.step()
        await ledger.change("ALTER TABLE leases RENAME TO gone")

        await sequencer.stop()

    async def test_that_one_never_had_is_not_given_back(self, ledger: Ledger) -> None:
        await ledger.change("ALTER TABLE leases RENAME TO gone")

        await Sequencer(ledger.database, holder="a").stop()


class TestHint:
    async def test_places_what_was_committed_without_a_look(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("TICK", "IDLE_TICK"):
            monkeypatch.setattr(module, name, AGES / 2)
        monkeypatch.setattr(module, "OTHERS_TICK", AGES)
        sequencer = Sequencer(ledger.database, holder="a")
        async with running(sequencer):
            await until(lambda: sequencer.lag is not None)
            await ledger.record()

            sequencer.wake()

            await until(lambda: _has(ledger, 1))

    async def test_that_comes_again_and_again_is_gathered_under_pressure(
        self, ledger: Ledger
    ) -> None:
        sequencer = Sequencer(ledger.database, holder="a", is_pressed=lambda: True)
        async with running(sequencer):
            for number in range(3):
                await ledger.record(envelope=f"env_{number}")
                sequencer.wake()

            await until(lambda: _has(ledger, 3))

    async def test_is_nothing_to_those_who_leave_it_to_another(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await leases.hold(connection, feed.LEASE, holder="a", span=timedelta(seconds=1))
        other = Sequencer(ledger.database, holder="b")
        async with running(other):
            await ledger.record()
            other.wake()

            # The lease of the one that fell silent has an end.
            await until(lambda: _has(ledger, 1))


async def _has(ledger: Ledger, count: int) -> bool:
    return await count_of(ledger) == count


class TestLag:
    async def test_is_how_long_the_first_change_has_waited(self, ledger: Ledger) -> None:
        sequencer = Sequencer(ledger.database, holder="a")
        await ledger.record()
        await ledger.shift("changes", "at", timedelta(seconds=-90))

        async with ledger.reading() as connection:
            lag = await feed.lag(connection)
            since = await feed.pending_since(connection)
        assert lag is not None
        assert since is not None
        assert timedelta(seconds=80) < lag < timedelta(seconds=200)

        await sequencer.step()
        assert timedelta() == sequencer.lag
        async with ledger.reading() as connection:
            assert await feed.lag(connection) is None
            assert await feed.pending_since(connection) is None

    async def test_of_a_long_transaction_begins_when_it_can_be_seen(self, ledger: Ledger) -> None:
        sequencer = Sequencer(ledger.database, holder="a")
        await sequencer.step()
        await ledger.record()
        await ledger.shift("changes", "at", timedelta(seconds=-90))

        assert not await sequencer._is_done_by_another()

        assert sequencer.lag is not None
        assert timedelta() < sequencer.lag < timedelta(seconds=60)

    async def test_of_a_clock_that_was_set_back_is_none_and_holds_nothing_up(
        self, ledger: Ledger
    ) -> None:
        await ledger.record()
        await ledger.shift("changes", "at", timedelta(hours=1))
        async with ledger.reading() as connection:
            assert timedelta() == await feed.lag(connection)

        await Sequencer(ledger.database, holder="a").step()

        assert await _has(ledger, 1)

    async def test_is_the_affair_of_who_holds_the_lease(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await leases.hold(connection, feed.LEASE, holder="a", span=AGES)
        other = Sequencer(ledger.database, holder="b")

        assert module.OTHERS_TICK == await other.step()

        assert other.lag is None


class TestFailure:
    async def test_is_said_once_and_survived(self, ledger: Ledger) -> None:
        await ledger.record()
        await ledger.change("ALTER TABLE feed RENAME TO gone")
        sequencer = Sequencer(ledger.database, holder="a")
        with capture_logs() as lines:
            async with running(sequencer):
                await until(lambda: sequencer._at_once == 1)
                await ledger.change("ALTER TABLE gone RENAME TO feed")

                await until(lambda: _has(ledger, 1))
                await until(lambda: sequencer._at_once > 1)

        assert ["feed.delayed"] == said(lines, "feed")

    async def test_to_get_a_lock_is_none(self, on_postgresql: Ledger) -> None:
        address = DatabaseAddress(on_postgresql.address.url)
        database = Database(address, size=1, limits=Limits(lock=timedelta(milliseconds=100)))
        sequencer = Sequencer(database, holder="a")
        await on_postgresql.record()
        with capture_logs() as lines:
            async with on_postgresql.transaction() as connection:
                await connection.exec_driver_sql("LOCK TABLE changes")
                sequencer.wake()
                assert module.OTHERS_TICK == await sequencer._try()
            assert module.TICK == await sequencer.step()

        assert [] == said(lines, "feed")
        await database.close()


@asynccontextmanager
async def connected(ledger: Ledger) -> AsyncIterator[Any]:
    driver = await asyncpg.connect(
        ledger.address.dsn, server_settings={"search_path": DEFAULT_SCHEMA}
    )
    try:
        yield driver
    finally:
        await driver.close()


INSERT = (
    "INSERT INTO events (id, account, envelope_id, sequence, received_at, effect) "
    "VALUES ($1, 'default', $2, $3, now(), 'applied')"
)


async def insert(driver: Any, envelope: str, sequence: int) -> None:
    """As a release that has never heard of a feed."""
    await driver.execute(INSERT, uuid.uuid4(), envelope, sequence)


class TestFloor:
    """On PostgreSQL what is gone is walked over, while any transaction might look at it."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Footing, "WORTH_IT", 2)

    async def test_rises_behind_what_was_placed(self, on_postgresql: Ledger) -> None:
        sequencer = Sequencer(on_postgresql.database, holder="a")
        async with connected(on_postgresql) as driver:
            for number in range(1, 7):
                await insert(driver, "env_1", number)
                await sequencer.step()

        assert sequencer._footing.floor is not None
        assert sequencer._footing.floor.id > 3
        assert [1, 2, 3, 4, 5, 6] == [item.sequence for item in await items_of(on_postgresql)]

    async def test_never_rises_above_what_a_long_transaction_holds(
        self, on_postgresql: Ledger
    ) -> None:
        sequencer = Sequencer(on_postgresql.database, holder="a")
        async with connected(on_postgresql) as long, connected(on_postgresql) as driver:
            transaction = long.transaction()
            await transaction.start()
            await insert(long, "env_long", 1)
            for number in range(1, 9):
                await insert(driver, "env_1", number)
                await sequencer.step()

            await transaction.commit()
            await insert(long, "env_long", 2)
            for number in range(9, 17):
                await insert(driver, "env_1", number)
                await sequencer.step()

        items = await items_of(on_postgresql)
        assert [1, 2] == [i.sequence for i in items if i.envelope_id == "env_long"]
        assert list(range(1, 17)) == [i.sequence for i in items if i.envelope_id == "env_1"]
        assert sequencer._footing.floor is not None
        assert sequencer._footing.floor.id > 9

    async def test_does_not_wait_for_who_reads_or_writes_something_else(
        self, on_postgresql: Ledger
    ) -> None:
        sequencer = Sequencer(on_postgresql.database, holder="a")
        async with connected(on_postgresql) as other, connected(on_postgresql) as driver:
            transaction = other.transaction(isolation="repeatable_read")
            await transaction.start()
            await other.execute("SELECT count(*) FROM changes")
            await other.execute("INSERT INTO followers (name, position) VALUES ('x', 0)")
            for number in range(1, 7):
                await insert(driver, "env_1", number)
                await sequencer.step()

            assert sequencer._footing.floor is not None
            assert sequencer._footing.floor.id > 3

    async def test_is_forgotten_when_the_feed_is_another_one(self, on_postgresql: Ledger) -> None:
        """As after a restore: ids are given again that lie below it."""
        sequencer = Sequencer(on_postgresql.database, holder="a")
        async with connected(on_postgresql) as driver:
            for number in range(1, 7):
                await insert(driver, "env_1", number)
                await sequencer.step()

            await driver.execute("TRUNCATE feed, changes, events RESTART IDENTITY")
            await insert(driver, "env_2", 1)
            assert module.TICK == await sequencer.step()

        assert [("env_2", 1)] == [
            (item.envelope_id, item.position) for item in await items_of(on_postgresql)
        ]

    def test_rises_only_after_a_look_that_came_later(self) -> None:
        end = Place(5, datetime.now(UTC))
        footing = Footing()
        footing.note(Placed(5, 9, end, is_floored=True), is_all=True)
        assert footing.wants_writers
        footing.watch({"3/1", "4/7"})
        footing.watch({"4/7", "5/1"})
        footing.note(Placed(1, 12, end, is_floored=True), is_all=True)
        assert Floor(feed.BEGINNING, end) == footing.floor

        footing.watch({"5/1"})
        footing.note(Placed(3, 8, end, is_floored=True), is_all=False)
        assert Floor(feed.BEGINNING, end) == footing.floor

        footing.note(Placed(0, feed.BEGINNING, end, is_floored=True), is_all=True)
        assert Floor(10, end) == footing.floor

    def test_waits_for_one_that_is_prepared_and_has_another_name(self) -> None:
        end = Place(5, datetime.now(UTC))
        footing = Footing()
        footing.note(Placed(5, 9, end, is_floored=True), is_all=True)
        footing.watch({"3/1"})
        footing.watch({"-1/900"})
        footing.note(Placed(1, 12, end, is_floored=True), is_all=True)
        assert Floor(feed.BEGINNING, end) == footing.floor

        footing.watch(set())
        footing.note(Placed(0, feed.BEGINNING, end, is_floored=True), is_all=True)
        assert Floor(10, end) == footing.floor


class TestWriters:
    async def test_are_those_who_may_still_commit_a_change(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await feed.note(connection, feed.Kind.ARCHIVE, account="default", envelope_id="x")
            async with ledger.reading() as other:
                count = len(await feed.writers(other))

        async with ledger.reading() as connection:
            assert set() == await feed.writers(connection)
        # On SQLite nobody commits beside another one.
        assert (1 if ledger.database.is_postgresql else 0) == count


class TestBacklog:
    async def test_larger_than_one_transaction_is_placed_in_order(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "AT_ONCE", 4)
        for number in range(1, 11):
            await ledger.record(sequence=number)

        await Sequencer(ledger.database, holder="a").step()

        items = await items_of(ledger)
        assert [(n, n) for n in range(1, 11)] == [(i.position, i.sequence) for i in items]

    async def test_behind_an_outage_is_placed_in_ever_larger_steps(self, ledger: Ledger) -> None:
        for number in range(1, 16):
            await ledger.record(sequence=number)
        sequencer = Sequencer(ledger.database, holder="a")
        for _ in range(6):
            sequencer._fail(TimeoutError())

        await sequencer.step()

        # 1, 2, 4 and 8: one by one it might never come to an end.
        items = await items_of(ledger)
        assert 15 == len(items)
        assert 4 >= len({item.at for item in items})
