"""What a connection is, whatever the server, the file or the URL would have it be."""

import asyncio
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from app.errors import ConfigError
from app.store.session import Database, DatabaseAddress, DatabaseError, is_disconnect, sqlstate
from tests.factories import make_body
from tests.postgres import Postgres, create_database, drop_database, replace_database
from tests.replicas import DELIVERIES, EVENTS, read, replica

SHORT = timedelta(seconds=5)


@pytest.fixture(name="quiet_url", scope="module")
def _quiet_url(server: str, postgres_template: str) -> Iterator[str]:
    """One database for all tests that leave nothing behind."""
    name = f"receiver_{uuid.uuid4().hex}"
    create_database(server, name, template=postgres_template)
    yield replace_database(server, name)
    drop_database(server, name)


@asynccontextmanager
async def opened(url: str, *, pgbouncer: bool = False, size: int = 2) -> AsyncIterator[Database]:
    database = Database(DatabaseAddress(url, pgbouncer=pgbouncer), size=size)
    try:
        yield database
    finally:
        await database.close()


async def ask(database: Database, query: str, *, limit: timedelta = SHORT) -> object:
    async with database.begin(limit=limit) as connection:
        return (await connection.exec_driver_sql(query)).scalar()


SETTINGS = {
    "synchronous_commit": "on",
    "search_path": '"atlas_receiver"',
    "TimeZone": "UTC",
    "lock_timeout": "1500ms",
    "statement_timeout": "2500ms",
    "idle_in_transaction_session_timeout": "5s",
    "transaction_isolation": "read committed",
}
ELSEWHERE = {
    "synchronous_commit": "off",
    "search_path": "pg_catalog",
    "TimeZone": "Asia/Tokyo",
    "lock_timeout": "0",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "serializable",
}


class TestSettings:
    @pytest.mark.parametrize("way", ["direct", "pooler"])
    async def test_the_defaults_of_the_database_do_not_reach_us(
        self, postgres_url: str, way: str
    ) -> None:
        name = postgres_url.rpartition("/")[2]
        admin = await asyncpg.connect(postgres_url)
        for setting, value in ELSEWHERE.items():
            await admin.execute(f"ALTER DATABASE \"{name}\" SET {setting} = '{value}'")
        await admin.close()

        async with opened(postgres_url, pgbouncer=way == "pooler") as database:
            found = {name: await ask(database, f"SHOW {name}") for name in SETTINGS}
            count = await ask(database, "SELECT count(*) FROM events")

        assert SETTINGS == found
        assert 0 == count

    async def test_sqlite_writes_ahead_and_syncs_fully(self, sqlite_url: str) -> None:
        async with opened(sqlite_url) as database:
            found = {
                name: await ask(database, f"PRAGMA {name}")
                for name in ("journal_mode", "synchronous", "foreign_keys", "journal_size_limit")
            }

        expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
        assert {**expected, "journal_size_limit": 64 * 1024 * 1024} == found

    async def test_whoever_only_reads_takes_no_write_lock(self, sqlite_url: str) -> None:
        path = sqlite_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            async with opened(sqlite_url) as database:
                # To wait for the lock would end in an error.
                await database.ping(limit=timedelta(seconds=20))


class TestPooler:
    """A transaction pooler: no session is ours, so nothing may be left in one."""

    async def test_nothing_of_a_transaction_survives_it(self, postgres_url: str) -> None:
        async with (
            opened(postgres_url, pgbouncer=True) as database,
            database._writing.connect() as connection,
        ):
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            before = await raw.fetch("SELECT name, setting FROM pg_settings")

            async with database.transact(connection, asyncio.get_running_loop().time() + 5):
                await connection.execute(select(EVENTS))
                await connection.execute(text("SELECT 1"))
                within = await connection.exec_driver_sql("SELECT name FROM pg_prepared_statements")
                assert [] == within.all()

            after = await raw.fetch("SELECT name, setting FROM pg_settings")
            assert before == after
            assert [] == await raw.fetch("SELECT name FROM pg_prepared_statements")

    async def test_intake_works_through_it(self, postgres_url: str) -> None:
        async with replica(postgres_url, pgbouncer=True) as one:
            bodies = [make_body(event_id=f"e{n}") for n in range(20)]

            assert ["recorded"] * 20 == await one.together(*bodies)
            assert ["duplicate"] * 20 == await one.together(*bodies)
            assert 40 == await one.count(DELIVERIES)


class TestUrls:
    @pytest.mark.parametrize(
        "query",
        [
            "sslmode=disable",
            "sslmode=prefer",
            "ssl=disable",
            "channel_binding=prefer&gssencmode=disable&connect_timeout=3&keepalives=1",
            "sslnegotiation=postgres",
            "target_session_attrs=read-write",
        ],
    )
    async def test_parameters_of_libpq_are_understood(self, quiet_url: str, query: str) -> None:
        async with opened(f"{quiet_url}?{query}") as database:
            assert 1 == await ask(database, "SELECT 1")

    @pytest.mark.parametrize("query", ["sslmode=require", "ssl=require", "sslmode=nonsense"])
    async def test_encryption_that_is_demanded_is_not_done_without(
        self, quiet_url: str, query: str
    ) -> None:
        async with opened(f"{quiet_url}?{query}") as database:
            with pytest.raises(DatabaseError):
                await database.ping()

    async def test_the_first_of_two_hosts_may_be_dead(self, quiet_url: str) -> None:
        url = quiet_url.replace("@", "@127.0.0.1:1,")

        async with opened(url) as database:
            assert 1 == await ask(database, "SELECT 1")

    @pytest.mark.parametrize(
        "query, name", [("", "atlas-receiver"), ("?application_name=mine", "mine")]
    )
    async def test_the_server_is_told_who_we_are(
        self, quiet_url: str, query: str, name: str
    ) -> None:
        async with opened(quiet_url + query) as database:
            assert name == await ask(database, "SHOW application_name")

    async def test_options_of_the_url_reach_the_server(self, quiet_url: str) -> None:
        async with opened(quiet_url + "?options=-c%20work_mem%3D5MB") as database:
            assert "5MB" == await ask(database, "SHOW work_mem")

    @pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
    async def test_every_spelling_of_postgresql_is_understood(
        self, quiet_url: str, scheme: str
    ) -> None:
        async with opened(quiet_url.replace("postgresql", scheme)) as database:
            await database.ping()

    @pytest.mark.parametrize("name", ["with blank.db", "100%.db", "a#b.db", "ünïcode.db"])
    async def test_a_sqlite_file_may_have_any_name(self, tmp_path: Path, name: str) -> None:
        async with opened(f"sqlite+aiosqlite:///{tmp_path}/{name}") as database:
            await database.ping()

        assert (tmp_path / name).exists()

    @pytest.mark.parametrize(
        "url",
        ["mysql://u@h/d", "postgresql+psycopg2://h/d", "sqlite3:///x", "", "://", "/var/r.db"],
    )
    def test_other_databases_are_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="speaks postgresql:// and sqlite:// only"):
            Database(DatabaseAddress(url))

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///?mode=memory"])
    def test_a_database_in_memory_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigError, match="would lose every event"):
            Database(DatabaseAddress(url))

    def test_a_password_is_in_no_message(self) -> None:
        with pytest.raises(ConfigError) as caught:
            Database(DatabaseAddress("mysql://user:canary@host/db"))

        assert "canary" not in str(caught.value)


class TestTransactions:
    async def test_an_error_rolls_everything_back(self, database_url: str) -> None:
        async with replica(database_url) as one:
            with pytest.raises(LookupError):
                await _insert_and_fail(one.database)

            assert not await read(one.database, select(EVENTS))

    async def test_a_transaction_is_cut_off_at_its_deadline(self, quiet_url: str) -> None:
        """By the client: the server could be frozen, and its own limits are longer."""
        async with opened(quiet_url) as database:
            start = time.perf_counter()
            with pytest.raises(DatabaseError) as caught:
                await ask(database, "SELECT pg_sleep(60)", limit=timedelta(seconds=0.3))

            assert time.perf_counter() - start < 20
            assert is_disconnect(caught.value)
            assert 1 == await ask(database, "SELECT 1")

    async def test_waiting_for_a_connection_counts(self, quiet_url: str) -> None:
        async with opened(quiet_url, size=1) as database, database.begin(limit=SHORT):
            start = time.perf_counter()
            with pytest.raises(TimeoutError):
                await ask(database, "SELECT 1", limit=timedelta(seconds=0.2))

            assert time.perf_counter() - start < 10

    async def test_the_pool_lets_nobody_wait_long(self, quiet_url: str) -> None:
        async with opened(quiet_url, size=1) as database, database.begin(limit=SHORT):
            start = time.perf_counter()
            with pytest.raises(SQLAlchemyError):
                await ask(database, "SELECT 1", limit=timedelta(seconds=20))

            assert time.perf_counter() - start < 10

    async def test_who_writes_on_sqlite_is_served_in_turn(self, sqlite_url: str) -> None:
        """However long the file's lock is wanted by others: it has no order of its own."""
        order: list[int] = []

        async with opened(sqlite_url) as database:

            async def write(number: int) -> None:
                async with database.begin(limit=timedelta(seconds=60)) as connection:
                    await connection.exec_driver_sql("UPDATE followers SET position = 0")
                    await asyncio.sleep(0.02)
                    order.append(number)

            await asyncio.gather(*map(write, range(20)))

        assert list(range(20)) == order

    async def test_who_reads_on_sqlite_waits_for_no_writer(self, sqlite_url: str) -> None:
        async with (
            opened(sqlite_url) as database,
            asyncio.TaskGroup() as group,
            database.begin(limit=SHORT),
        ):
            waiting = [group.create_task(ask(database, "SELECT 1")) for _ in range(10)]
            # Long enough for all of them to have taken what they would wait with.
            await asyncio.sleep(0.2)
            await database.ping(limit=timedelta(seconds=20))

            assert not any(task.done() for task in waiting)

    async def test_waiting_for_its_turn_counts(self, sqlite_url: str) -> None:
        async with opened(sqlite_url) as database, database.begin(limit=SHORT):
            with pytest.raises(TimeoutError):
                await ask(database, "SELECT 1", limit=timedelta(milliseconds=50))

    def test_a_database_that_was_closed_serves_another_loop(self, sqlite_url: str) -> None:
        database = Database(DatabaseAddress(sqlite_url))

        async def crowd() -> None:
            await asyncio.gather(*(ask(database, "SELECT 1") for _ in range(3)))
            await database.close()

        asyncio.run(crowd())
        asyncio.run(crowd())

    async def test_a_cancelled_caller_gives_its_connection_back(self, quiet_url: str) -> None:
        async with opened(quiet_url, size=1) as database:
            for _ in range(3):
                sleeper = asyncio.create_task(ask(database, "SELECT pg_sleep(2)"))
                await asyncio.sleep(0.05)
                sleeper.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sleeper

            assert 1 == await ask(database, "SELECT 1")

    async def test_a_session_that_was_terminated_is_replaced(
        self, quiet_url: str, postgres: Postgres
    ) -> None:
        """Who is in the middle of something hears of it; who comes later does not."""
        admin = await asyncpg.connect(postgres.url())
        async with opened(quiet_url, size=1) as database:

            async def be_cut_off() -> None:
                async with database.begin(limit=timedelta(seconds=10)) as connection:
                    pid = (await connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar()
                    await admin.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                    await connection.exec_driver_sql("SELECT 1")

            with pytest.raises(DatabaseError) as caught:
                await be_cut_off()
            assert is_disconnect(caught.value)
            pid = await ask(database, "SELECT pg_backend_pid()")
            await admin.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            await asyncio.sleep(0.2)
            assert pid != await ask(database, "SELECT pg_backend_pid()")
        await admin.close()

    async def test_an_error_of_the_server_has_its_code(self, quiet_url: str) -> None:
        async with opened(quiet_url) as database:
            with pytest.raises(DatabaseError) as caught:
                await ask(database, "SELECT 1 / 0")

        assert "22012" == sqlstate(caught.value)
        assert not is_disconnect(caught.value)


async def _insert_and_fail(database: Database) -> None:
    now = datetime.now(UTC)
    row = {"id": uuid.uuid4(), "account": "acme", "received_at": now, "effect": "applied"}
    async with database.begin(limit=SHORT) as connection:
        await connection.execute(EVENTS.insert().values(row))
        raise LookupError
