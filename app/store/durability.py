"""What the database promises when it says that a transaction is committed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from app.store.session import Database

_LIMIT: Final = timedelta(seconds=5)

# Setting, what it must be, and what happens otherwise.
_POSTGRESQL: Final = (
    ("fsync", {"on"}, "a crash of the machine corrupts the database: set it to on"),
    (
        "full_page_writes",
        {"on"},
        "a torn page after a crash loses rows: set it to on, unless the file system forbids them",
    ),
    (
        "synchronous_commit",
        {"on", "remote_apply"},
        "a 200 is given before the event is on disk: something overrides what the session asks",
    ),
)
# PRAGMA synchronous: 2 is FULL, 3 is EXTRA.
_SQLITE: Final = (
    ("journal_mode", {"wal"}, "readers and the door would wait for each other"),
    ("synchronous", {"2", "3"}, "a 200 would be given before the event is on disk"),
)


@dataclass(frozen=True, slots=True)
class Promise:
    """One setting of the database, and whether a 200 of ours can rest on it."""

    name: str
    value: str
    remedy: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Server:
    """The server that answers, as a session of ours sees it."""

    version: str
    promises: tuple[Promise, ...]


async def inspect(database: Database) -> Server:
    """Ask the database what it promises, in a session like those that record events."""
    async with database.begin(limit=_LIMIT, is_reading=True) as connection:
        values = {}
        wanted = _POSTGRESQL if database.is_postgresql else _SQLITE
        verb = "SHOW" if database.is_postgresql else "PRAGMA"
        for name, _, _ in wanted:
            answer = await connection.exec_driver_sql(f"{verb} {name}")
            values[name] = str(answer.scalar())
        if not database.is_postgresql:
            version = await connection.exec_driver_sql("SELECT sqlite_version()")
            return Server(f"SQLite {version.scalar()}", judge(values, is_postgresql=False))
        version = await connection.exec_driver_sql("SHOW server_version")
        return Server(f"PostgreSQL {version.scalar()}", judge(values, is_postgresql=True))


async def timeline_of(database: Database) -> str | None:
    """Name the timeline of the server, which changes when another one takes its place.

    None if there is none to be told, as on SQLite.
    """
    if not database.is_postgresql:
        return None
    async with database.begin(limit=_LIMIT, is_reading=True) as connection:
        answer = await connection.exec_driver_sql(
            "SELECT CASE WHEN NOT pg_is_in_recovery() "
            "THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END"
        )
        name: str | None = answer.scalar()
    return name


def judge(values: Mapping[str, str], *, is_postgresql: bool) -> tuple[Promise, ...]:
    """Compare what the database says with what a 200 needs."""
    return tuple(
        Promise(name, values[name], remedy, values[name].lower() in wanted)
        for name, wanted, remedy in (_POSTGRESQL if is_postgresql else _SQLITE)
    )
