"""What faults are made to: replicas, workers and a database of our own.

`callbacks.py` beside this is what the workers run. Two tables that only tests know stand beside
those of the service: one remembers every change of a status, into the other a callback writes
in the transaction that settles its delivery.
"""

import asyncio
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil

from tests.acceptance.service import BETA_KEY, KEY, Service
from tests.acceptance.tables import rows
from tests.postgres import Postgres

# Which key each account of the traffic signs with.
KEYS: Mapping[str, str] = {"default": KEY, "beta": BETA_KEY}
# Calls at once in one worker: so many may have happened unnoticed when it is killed.
SLOTS = 16
LEASE = 3.0

WATCHED_POSTGRESQL = """
CREATE SCHEMA watched;
CREATE TABLE watched.statuses (account text, envelope_id text, before text, after text);
CREATE TABLE watched.once (delivery_id text, event_id text);
CREATE FUNCTION watched.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO watched.statuses VALUES (NEW.account, NEW.id, OLD.status, NEW.status);
    RETURN NULL;
END $$;
CREATE TRIGGER watched AFTER UPDATE ON atlas_receiver.envelopes FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION watched.note();
"""
WATCHED_SQLITE = """
CREATE TABLE watched_statuses (account text, envelope_id text, before text, after text);
CREATE TABLE watched_once (delivery_id text, event_id text);
CREATE TRIGGER watched AFTER UPDATE ON envelopes FOR EACH ROW
    WHEN OLD.status IS NOT NEW.status BEGIN
    INSERT INTO watched_statuses VALUES (NEW.account, NEW.id, OLD.status, NEW.status);
END;
"""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a process holds of the system."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def of(cls, service: Service) -> "Vitals":
        process = psutil.Process(service.process.pid)
        with process.oneshot():
            return cls(process.num_fds(), process.num_threads(), process.memory_info().rss)


@dataclass(frozen=True, slots=True)
class Site:
    """The processes of one deployment, and where what they do can be read."""

    database_url: str
    notes: Path
    replicas: Sequence[Service]
    workers: Sequence[Service]
    server: Postgres | None = None

    @property
    def services(self) -> list[Service]:
        return [*self.replicas, *self.workers]

    @property
    def is_postgresql(self) -> bool:
        return not self.database_url.startswith("sqlite")

    def watched(self, table: str) -> str:
        """Name a table of ours in SQL."""
        return f"watched.{table}" if self.is_postgresql else f"watched_{table}"

    @property
    def logs(self) -> list[Path]:
        """Every file into which a process of this site has written, also while it crashed."""
        return sorted(self.notes.parent.glob("*.log")) + sorted(self.notes.parent.glob("*.err"))

    def is_quiet(self, *, deliveries: int) -> bool:
        """Whether so many deliveries are there, and all of them at their end.

        Some may come late: what was recorded before a callback was known is swept up.
        """
        query = "SELECT count(*), count(due_at) FROM deliveries"
        [(there, unfinished)] = rows(self.database_url, query)
        return bool(there >= deliveries and unfinished == 0)


@contextmanager
def on_postgresql(
    database_url: str, home: Path, *, server: Postgres | None = None, workers: int = 2
) -> Iterator[Site]:
    """Two replicas that only take webhooks, and some workers, on a migrated database.

    The workers are there first: who is owed an event is known once they were.
    """
    asyncio.run(_watch_postgresql(database_url))
    settings = _settings(database_url, home)
    replicas = [Service("serve", "--only", "webhooks", home=home, **settings) for _ in range(2)]
    working = [Service("work", home=home, **settings) for _ in range(workers)]
    with _started(working), _started(replicas):
        yield Site(database_url, home / "notes", replicas, working, server)


@contextmanager
def on_sqlite(database_url: str, home: Path, *, lease: float = LEASE) -> Iterator[Site]:
    """One process that does everything, on a migrated file."""
    path = database_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.executescript(WATCHED_SQLITE)
    service = Service("serve", home=home, **_settings(database_url, home, lease=lease))
    with _started([service]):
        yield Site(database_url, home / "notes", [service], [])


@contextmanager
def _started(services: Sequence[Service]) -> Iterator[None]:
    with ExitStack() as stack:
        for service in services:
            stack.push(service.start())
        for service in services:
            service.wait_until_ready()
        yield


def _settings(database_url: str, home: Path, *, lease: float = LEASE) -> dict[str, str]:
    is_postgresql = not database_url.startswith("sqlite")
    return {
        "DATABASE_URL": database_url,
        "CALLBACKS": "tests.faults.callbacks:callbacks",
        "DELIVERY_LEASE": f"{lease}s",
        "DELIVERY_CONCURRENCY": str(SLOTS),
        "NOTES": os.fspath(home / "notes"),
        "ONCE": "watched.once" if is_postgresql else "watched_once",
    }


async def _watch_postgresql(database_url: str) -> None:
    connection = await asyncpg.connect(database_url, timeout=30)
    try:
        await connection.execute(WATCHED_POSTGRESQL)
    finally:
        await connection.close()
