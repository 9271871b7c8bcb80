"""Bring the schema up to date, one process at a time."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import ConfigError
from app.store.models import ReleaseRow
from app.store.schema import ROOT, Fit, SchemaState, read_state
from app.store.session import DEFAULT_SCHEMA, Database, DatabaseAddress, Limits

POLL = timedelta(milliseconds=200)
# Any fixed number will do, as long as no other program picks the same.
_LOCK = 0x41544C41
# A migration may rewrite a table; it must not wait long behind somebody's lock, though.
_LIMITS = Limits(
    lock=timedelta(seconds=10), statement=timedelta(hours=2), idle=timedelta(minutes=5)
)


async def migrate(
    database_url: str,
    *,
    schema: str = DEFAULT_SCHEMA,
    revision: str = "head",
    wait: timedelta = timedelta(minutes=10),
) -> SchemaState:
    """Upgrade the schema to `revision`; of several processes one works and the others wait.

    Raises `TimeoutError` if the lock is not free within `wait`.
    """
    async with _locked(DatabaseAddress(database_url, schema=schema), wait=wait) as database:
        before = await read_state(database)
        if before.fit is Fit.COMPATIBLE or before.fit is Fit.TOO_NEW:
            return before
        await _run(database, lambda config: command.upgrade(config, revision))
        await _record_release(database)
        return await read_state(database)


async def downgrade(
    database_url: str, *, schema: str = DEFAULT_SCHEMA, revision: str = "base"
) -> None:
    """Take the schema back to `revision`."""
    address = DatabaseAddress(database_url, schema=schema)
    async with _locked(address, wait=timedelta(minutes=1)) as database:
        await _run(database, lambda config: command.downgrade(config, revision))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations").replace("%", "%%"))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


async def _run(database: Database, action: Callable[[Config], None]) -> None:
    def act(connection: Connection) -> None:
        config = _config()
        config.attributes["connection"] = connection
        action(config)

    async with database.engine.connect() as connection:
        await connection.run_sync(act)
        await connection.commit()


async def _record_release(database: Database) -> None:
    scripts = _scripts()
    async with database.engine.begin() as connection:
        recorded = set((await connection.execute(select(ReleaseRow.revision))).scalars())
        for script in scripts.walk_revisions():
            if script.revision not in recorded:
                await connection.execute(
                    ReleaseRow.__table__.insert().values(  # type: ignore[attr-defined]
                        revision=script.revision,
                        min_release=script.module.MIN_RELEASE,
                        migrated_at=datetime.now(UTC),
                    )
                )


@asynccontextmanager
async def _locked(address: DatabaseAddress, *, wait: timedelta) -> AsyncIterator[Database]:
    database = Database(address, size=2, limits=_LIMITS)
    try:
        lock = _postgresql_lock if database.is_postgresql else _sqlite_lock
        async with lock(database, wait=wait):
            yield database
    finally:
        await database.close()


@asynccontextmanager
async def _postgresql_lock(database: Database, *, wait: timedelta) -> AsyncIterator[None]:
    # Polled, on a connection outside any transaction: a waiting `pg_advisory_lock` would
    # hold a snapshot, on which `CREATE INDEX CONCURRENTLY` elsewhere would wait in turn.
    async with database.engine.connect() as plain:
        connection = await plain.execution_options(isolation_level="AUTOCOMMIT")

        async def is_taken() -> bool:
            answer = await connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_LOCK})")
            return bool(answer.scalar())

        await _poll(is_taken, wait=wait)
        await _create_schema(connection, database.address.schema)
        try:
            yield
        finally:
            await connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_LOCK})")


async def _create_schema(connection: AsyncConnection, schema: str) -> None:
    # Asked first, because a role without the right to create one may own a ready schema.
    query = "SELECT 1 FROM pg_namespace WHERE nspname = $1"
    if (await connection.exec_driver_sql(query, (schema,))).scalar() is None:
        quoted = schema.replace('"', '""')
        await connection.exec_driver_sql(f'CREATE SCHEMA IF NOT EXISTS "{quoted}"')


@asynccontextmanager
async def _sqlite_lock(database: Database, *, wait: timedelta) -> AsyncIterator[None]:
    path = database.address.sqlite_path
    if not path.parent.is_dir():
        message = f"DATABASE_URL names a file in {path.parent}, which is not a directory"
        raise ConfigError(message)
    handle = os.open(f"{path}.migrate.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:

        async def is_taken() -> bool:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        await _poll(is_taken, wait=wait)
        yield
    finally:
        os.close(handle)


async def _poll(is_taken: Callable[[], Awaitable[bool]], *, wait: timedelta) -> None:
    async with asyncio.timeout(wait.total_seconds()):
        # The lock belongs to another process: there is nothing here to be told by.
        while not await is_taken():  # noqa: ASYNC110
            await asyncio.sleep(POLL.total_seconds())


@contextmanager
def command_line_connection() -> Iterator[Any]:
    """Connect for `make migration`: a fresh SQLite file, migrated to the newest revision."""
    engine = create_engine("sqlite:///var/migration.db")
    with engine.connect() as connection:
        yield connection
    engine.dispose()
