"""From no tables to all of them and back, by several processes at once, and killed half-way."""

import asyncio
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Table, inspect, text

from app import __version__
from app.errors import ConfigError, SchemaMismatch
from app.store.base import Base
from app.store.migrations import command_line_connection, downgrade, migrate
from app.store.models import ReleaseRow
from app.store.schema import Fit, SchemaState, read_state
from app.store.session import DEFAULT_SCHEMA, Database, DatabaseAddress
from tests.factories import make_body
from tests.postgres import create_database, drop_database, replace_database
from tests.replicas import eventually, execute, replica

ROOT = Path(__file__).resolve().parents[2]
RELEASES: Table = ReleaseRow.__table__  # type: ignore[assignment]
TABLES = set(Base.metadata.tables) | {"alembic_version"}


@pytest.fixture(name="empty_postgres_url")
def _empty_postgres_url(server: str) -> Iterator[str]:
    name = f"receiver_{uuid.uuid4().hex}"
    create_database(server, name)
    yield replace_database(server, name)
    drop_database(server, name)


@pytest.fixture(name="empty_url", params=["sqlite", "postgres"])
def _empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/empty.db"
    url: str = request.getfixturevalue("empty_postgres_url")
    return url


async def look(url: str, question: Any, *, schema: str = DEFAULT_SCHEMA) -> Any:
    """Ask a synchronous question of the database."""
    database = Database(DatabaseAddress(url, schema=schema))
    try:
        async with database.engine.connect() as connection:
            return await connection.run_sync(question)
    finally:
        await database.close()


async def tables(url: str, *, schema: str = DEFAULT_SCHEMA) -> set[str]:
    names = await look(url, lambda c: inspect(c).get_table_names(), schema=schema)
    return set(names)


async def state(url: str) -> SchemaState:
    database = Database(DatabaseAddress(url))
    try:
        return await read_state(database)
    finally:
        await database.close()


class TestUpAndDown:
    async def test_up_down_and_up_again(self, empty_url: str) -> None:
        assert Fit.ABSENT is (await state(empty_url)).fit

        for _ in range(2):
            assert Fit.EQUAL is (await migrate(empty_url)).fit
            assert TABLES == await tables(empty_url)

            await downgrade(empty_url)
            assert {"alembic_version"} == await tables(empty_url)
            assert Fit.ABSENT is (await state(empty_url)).fit

    async def test_a_second_run_changes_nothing(self, database_url: str) -> None:
        async with replica(database_url) as one:
            receipt = await one.record(make_body())

            assert Fit.EQUAL is (await migrate(database_url)).fit

            assert [receipt.event_id] == [row.id for row in await one.said_by_atlas()]

    async def test_the_models_say_what_the_migrations_made(self, database_url: str) -> None:
        def differences(connection: Connection) -> list[Any]:
            options = {"compare_type": True, "compare_server_default": True}
            context = MigrationContext.configure(connection, opts=options)
            found: list[Any] = compare_metadata(context, Base.metadata)
            return found

        assert [] == await look(database_url, differences)


MIGRATE = """
import asyncio, sys
from datetime import timedelta
from app.store.migrations import migrate
print((asyncio.run(migrate(sys.argv[1], wait=timedelta(seconds=60)))).fit)
"""
DIE = """
import asyncio, os, signal, sys
from alembic import op
from app.store.migrations import migrate

create, made = op.create_table, []

def create_some(*arguments, **options):
    if len(made) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(arguments)
    return create(*arguments, **options)

op.create_table = create_some
asyncio.run(migrate(sys.argv[1]))
"""


def start(program: str, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestProcesses:
    async def test_of_two_at_once_one_works_and_one_waits(self, empty_url: str) -> None:
        both = [start(MIGRATE, empty_url) for _ in range(2)]

        said = await asyncio.gather(*(asyncio.to_thread(p.communicate) for p in both))

        assert [("equal\n", ""), ("equal\n", "")] == said
        assert TABLES == await tables(empty_url)

    async def test_one_killed_half_way_can_be_run_again(self, empty_url: str) -> None:
        killed = start(DIE, empty_url)
        await asyncio.to_thread(killed.communicate)
        assert -signal.SIGKILL == killed.returncode
        assert Fit.ABSENT is (await state(empty_url)).fit

        assert Fit.EQUAL is (await migrate(empty_url)).fit

        assert TABLES == await tables(empty_url)

    async def test_one_killed_before_its_release_was_noted_notes_it_then(
        self, database_url: str
    ) -> None:
        async with replica(database_url) as one:
            await execute(one.database, RELEASES.delete())

            await migrate(database_url)

            rows = await one.rows(RELEASES.select())
            assert {"0.1.0"} == {row.min_release for row in rows}

    async def test_who_waits_too_long_gives_up(self, database_url: str) -> None:
        async def wait() -> None:
            await migrate(database_url, wait=timedelta(seconds=0.3))

        database = Database(DatabaseAddress(database_url))
        if database.is_postgresql:
            holder = await asyncpg.connect(database_url)
            await holder.execute(f"SELECT pg_advisory_lock({0x41544C41})")
            with pytest.raises(TimeoutError):
                await wait()
            await holder.close()
        else:
            handle = os.open(f"{database.address.sqlite_path}.migrate.lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(TimeoutError):
                await wait()
            os.close(handle)
        await database.close()
        await wait()

    async def test_a_directory_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not a directory"):
            await migrate(f"sqlite:///{tmp_path}/nowhere/receiver.db")


INVALID = """
SELECT count(*) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'atlas_receiver' AND NOT i.indisvalid
"""
# As a server that restarts would; it waits until they are gone.
TERMINATE = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = current_database() AND pid NOT IN (pg_backend_pid(), $1)
"""


class TestIndexBesideWriters:
    async def test_that_was_left_half_built_is_built_anew(self, empty_postgres_url: str) -> None:
        """Built concurrently, an index outlives a build that dies, and is never used."""
        url = empty_postgres_url
        await migrate(url, revision="20261122_0501")
        admin = await asyncpg.connect(url)
        writer = await asyncpg.connect(url)
        transaction = writer.transaction()
        await transaction.start()
        await writer.execute("LOCK TABLE atlas_receiver.envelopes IN ROW EXCLUSIVE MODE")

        killed = start(MIGRATE, url)
        await eventually(lambda: admin.fetchval(INVALID), within=60)
        killed.kill()
        await asyncio.to_thread(killed.communicate)
        await admin.fetch(TERMINATE, writer.get_server_pid())
        await transaction.rollback()
        was_left = await admin.fetchval(INVALID)

        assert Fit.EQUAL is (await migrate(url)).fit

        assert was_left > 0
        assert 0 == await admin.fetchval(INVALID)
        await writer.close()
        await admin.close()


class TestFit:
    async def _pretend(self, url: str, *, revision: str, min_release: str) -> SchemaState:
        async with replica(url) as one:
            found = text("UPDATE alembic_version SET version_num = :found")
            await execute(one.database, found.bindparams(found=revision))
            row = {"revision": revision, "min_release": min_release}
            now = datetime.now(UTC)
            await execute(one.database, RELEASES.insert().values(**row, migrated_at=now))
            return await read_state(one.database)

    async def test_a_newer_schema_that_allows_this_release_is_served(
        self, database_url: str
    ) -> None:
        found = await self._pretend(database_url, revision="later", min_release=__version__)

        found.require()
        assert (Fit.COMPATIBLE, True, "later") == (found.fit, found.is_servable, found.found)
        assert found == await migrate(database_url)

    async def test_a_newer_schema_that_does_not_is_refused(self, database_url: str) -> None:
        """`9.10` is later than `9.9`; as text it would not be."""
        found = await self._pretend(database_url, revision="later", min_release="9.10.0")

        assert (Fit.TOO_NEW, False) == (found.fit, found.is_servable)
        with pytest.raises(SchemaMismatch, match="deploy the newer release"):
            found.require()
        assert found == await migrate(database_url)

    @pytest.mark.parametrize(
        "fit, remedy",
        [
            (Fit.ABSENT, "no tables yet: run `python -m app migrate`"),
            (Fit.OLDER, "schema is at a, this release needs b: run `python -m app migrate`"),
        ],
    )
    def test_an_older_schema_is_refused_with_the_remedy(self, fit: Fit, remedy: str) -> None:
        with pytest.raises(SchemaMismatch, match=remedy):
            SchemaState(fit, "a", "b").require()

    async def test_the_schema_is_read_while_somebody_writes(self, sqlite_url: str) -> None:
        """A probe must not fail, nor wait, because of SQLite's one write lock."""
        path = sqlite_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")

            assert Fit.EQUAL is (await asyncio.wait_for(state(sqlite_url), 2)).fit


class TestSchema:
    async def test_our_tables_stand_beside_those_of_others(self, empty_postgres_url: str) -> None:
        """A stranger's `events` in `public` is neither used nor touched."""
        url, schema = empty_postgres_url, "our_own"
        admin = await asyncpg.connect(url)
        await admin.execute("CREATE TABLE public.events AS SELECT 1 AS theirs")
        await admin.execute("CREATE TABLE public.alembic_version (version_num text)")
        await admin.execute("INSERT INTO public.alembic_version VALUES ('theirs')")

        assert Fit.EQUAL is (await migrate(url, schema=schema)).fit

        assert TABLES == await tables(url, schema=schema)
        assert [1] == [row["theirs"] for row in await admin.fetch("SELECT * FROM public.events")]
        await downgrade(url, schema=schema)
        assert {"alembic_version"} == await tables(url, schema=schema)
        await admin.fetch("SELECT theirs FROM public.events")
        assert "theirs" == await admin.fetchval("SELECT version_num FROM public.alembic_version")
        await admin.close()

    async def test_a_schema_that_is_there_needs_no_right_to_make_one(
        self, empty_postgres_url: str
    ) -> None:
        admin = await asyncpg.connect(empty_postgres_url)
        role = f"owner_{empty_postgres_url[-8:]}"
        await admin.execute(f"CREATE ROLE {role} LOGIN")
        await admin.execute(f"CREATE SCHEMA atlas_receiver AUTHORIZATION {role}")

        url = empty_postgres_url.replace("postgres@", f"{role}@")

        assert Fit.EQUAL is (await migrate(url)).fit
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


def test_a_migration_is_written_against_a_scratch_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "var").mkdir()
    monkeypatch.chdir(tmp_path)

    with command_line_connection() as connection:
        assert 1 == connection.execute(text("SELECT 1")).scalar()

    assert (tmp_path / "var" / "migration.db").exists()
