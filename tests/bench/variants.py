"""The service in other circumstances: at work, in two replicas, with a past, on SQLite."""

import asyncio
import hashlib
import secrets
import shutil
import sqlite3
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import psutil

from app.events.identity import Relation
from app.intake.ledger import Judged
from app.intake.projection import Projection
from app.intake.submission import understand
from app.store import deliveries, envelopes, events
from app.store.session import prepare_sqlite
from tests.bench.load import Maker, Order
from tests.bench.machine import Crowd
from tests.bench.measurement import Measurement, Started
from tests.bench.processes import python, run, running, wait_until_ready
from tests.bench.receivers import Service
from tests.postgres import Postgres, free_port

KNOWN = 10_000_000
WARM_UP = 0.5
# Keys as long as those of real events. Built first and indexed then, as it is quickest.
_KNOWN = """
ALTER TABLE identities DROP CONSTRAINT identities_pkey;
INSERT INTO identities (account, key, event_id)
SELECT 'default', 'id:evt_' || md5(n::text), gen_random_uuid() FROM generate_series(1, {known}) n;
ALTER TABLE identities ADD CONSTRAINT identities_pkey PRIMARY KEY (account, key);
"""
# The same three writes as tests/bench/reference.sql, on the same columns and indexes.
_SQLITE_SCHEMA = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY, dedup_key TEXT NOT NULL UNIQUE, type TEXT NOT NULL,
    envelope_id TEXT NOT NULL, occurred_at TEXT, received_at TEXT, body BLOB NOT NULL
);
CREATE INDEX events_envelope ON events (envelope_id, id);
CREATE TABLE envelopes (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, fields_status TEXT, metadata TEXT,
    updated_at TEXT, last_event_at TEXT
);
CREATE INDEX envelopes_updated ON envelopes (updated_at);
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY, event_id INTEGER NOT NULL REFERENCES events (id),
    callback TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'pending',
    attempts INTEGER NOT NULL DEFAULT 0, next_at TEXT DEFAULT current_timestamp
);
CREATE INDEX deliveries_due ON deliveries (next_at) WHERE state = 'pending';
"""
_SQLITE_EVENT = (
    "INSERT INTO events (dedup_key, type, envelope_id, received_at, body) "
    "VALUES (?, 'envelope.signed', ?, current_timestamp, ?) ON CONFLICT DO NOTHING"
)
_SQLITE_ENVELOPE = (
    "INSERT INTO envelopes (id, status, fields_status, metadata, updated_at) "
    """VALUES (?, 'signed', 'ready', '{"external_id":"crm-1"}', current_timestamp) """
    "ON CONFLICT (id) DO UPDATE SET status = excluded.status, updated_at = current_timestamp"
)
_SQLITE_DELIVERY = (
    "INSERT INTO deliveries (event_id, callback) SELECT id, 'slack' FROM events WHERE dedup_key = ?"
)


class AtWork(Service):
    """With a callback at work in the same process."""

    name = "callbacks at work"
    connections: Sequence[int] | None = (32,)

    def command(self) -> Sequence[str]:
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        return python("-m", "app", "serve", "--only", "webhooks", *where)

    def environment(self, url: str) -> dict[str, str]:
        return {**super().environment(url), "CALLBACKS": "tests.bench.noop:drained"}


class Replicas(Service):
    """Two processes on one database; connections are shared out between them."""

    name = "two replicas"
    connections: Sequence[int] | None = (128,)

    def __init__(self, postgres: Postgres, scratch: Path) -> None:
        super().__init__(postgres, scratch)
        self._other_port = free_port()
        self._other: subprocess.Popen[bytes] | None = None

    @contextmanager
    def company(self, url: str) -> Iterator[None]:
        command = [word.replace(str(self._port), str(self._other_port)) for word in self.command()]
        log = self._scratch / "replica.log"
        with running(command, environment=self.environment(url), log=log) as self._other:
            wait_until_ready(self._other, self._other_port, log)
            yield

    def receivers(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        assert self._other is not None  # started before the one that is measured
        return [*super().receivers(process), psutil.Process(self._other.pid)]

    def _fire(self, order: Order, process: subprocess.Popen[bytes]) -> Measurement:
        return super()._fire(replace(order, other_port=self._other_port), process)


class Grown(Service):
    """With the identities of ten million events that came before."""

    name = f"{KNOWN // 1_000_000} million known"
    connections: Sequence[int] | None = (32,)

    def prepare(self) -> None:
        super().prepare()
        asyncio.run(_grow(self._postgres.url(self.template)))


async def _grow(url: str) -> None:
    connection = await asyncpg.connect(url, server_settings={"search_path": "atlas_receiver"})
    try:
        await connection.execute(_KNOWN.format(known=KNOWN))
        await connection.execute("VACUUM (ANALYZE) identities")
    finally:
        await connection.close()


class OnSqlite(Service):
    """On a file."""

    name = "service on SQLite"
    connections: Sequence[int] | None = (32, 128)

    def prepare(self) -> None:
        self.template_file.unlink(missing_ok=True)
        url = f"sqlite:///{self.template_file}"
        run(python("-m", "app", "migrate"), environment=self.environment(url))
        with closing(sqlite3.connect(self.template_file)) as file:
            file.execute(
                "INSERT INTO callbacks (name, patterns, options, first_seen_at, last_seen_at, "
                "swept_at) SELECT 'bench', '[\"*\"]', '{}', now, now, now FROM "
                "(SELECT strftime('%Y-%m-%d %H:%M:%f000', 'now') AS now)"
            )
            file.commit()

    @property
    def template_file(self) -> Path:
        """A file with the service's tables, and nothing in them."""
        return self._scratch / "template.db"

    @property
    def _file(self) -> Path:
        return self._scratch / "bench.db"

    def create_database(self) -> str:
        self._discard()
        shutil.copy(self.template_file, self._file)
        return f"sqlite:///{self._file}"

    def _settle(self, url: str) -> None:
        """A new file has nothing behind it."""

    def _discard(self) -> None:
        for end in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + end).unlink(missing_ok=True)

    async def _ask(self, url: str) -> tuple[list[bytes], dict[str, int]]:
        del url
        with closing(sqlite3.connect(self._file)) as file:
            file.create_function("sha256", 1, lambda body: hashlib.sha256(body).digest())
            stored = [row[0] for row in file.execute(self.digests.replace("atlas_receiver.", ""))]
            rows = {
                table: int(file.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608
                for table in self.tables
            }
        return stored, rows


# A statement, and what it is run with.
Step = tuple[str, Sequence[object]]


class OneByOne(ABC):
    """One connection to a file, one transaction for each event, and nothing else."""

    name: str
    connections: Sequence[int] | None = (1,)
    # More events a second than any disk takes.
    MOST = 8_000

    def __init__(self, scratch: Path) -> None:
        self._file = scratch / "one_by_one.db"

    def prepare(self) -> None:  # noqa: B027  # nothing to do is what both have to do
        """It makes its file itself."""

    @abstractmethod
    def open(self) -> sqlite3.Connection:
        """Open a file that has the tables, and is as durable as the service wants it."""

    @abstractmethod
    def event(self, number: int) -> Sequence[Step]:
        """Give what has to be written for one event."""

    def measure(self, connections: int, seconds: float) -> Measurement:
        for end in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + end).unlink(missing_ok=True)
        # Made before the window opens: who writes does nothing else.
        events = [self.event(number) for number in range(int(self.MOST * (seconds + WARM_UP)))]
        with closing(self.open()) as file:
            _write(file, events, WARM_UP)
            crowd, used, began = Crowd(), time.process_time(), time.monotonic()
            done = _write(file, events, seconds)
            took = time.monotonic() - began
            used = time.process_time() - used
        return Measurement(
            contender=self.name,
            connections=connections,
            rate=done / took,
            database_cpu=used / max(1, done) * 1e6,
            crowd=crowd.share(used),
        )


def _write(file: sqlite3.Connection, events: list[Sequence[Step]], seconds: float) -> int:
    done, end = 0, time.monotonic() + seconds
    while events and time.monotonic() < end:
        done += 1
        file.execute("BEGIN IMMEDIATE")
        for statement, values in events.pop():
            file.execute(statement, values)
        file.execute("COMMIT")
    return done


class SameRows(OneByOne):
    """What the service writes, on the file that it has: its statements, a row at a time."""

    name = "SQLite, one by one"

    def __init__(self, service: OnSqlite, scratch: Path) -> None:
        super().__init__(scratch)
        self._service = service
        self._maker = Maker(secrets.token_hex(32))

    def open(self) -> sqlite3.Connection:
        shutil.copy(self._service.template_file, self._file)
        file = sqlite3.connect(self._file, isolation_level=None)
        prepare_sqlite(file, None)
        return file

    def event(self, number: int) -> Sequence[Step]:
        del number  # its ids are random, as real ones are
        now = datetime.now(UTC)
        body = self._maker.body()
        submission = understand(body, account="default", key_label="bench", received_at=now)
        projection = Projection({}, lambda *_: ["bench"], now)
        projection.take(Judged(submission, Relation.NEW), conflicts={})
        claims = [(*claim, submission.event_id) for claim in submission.claims]
        return [
            *_steps(events.CLAIM.one_of_sqlite, events.IDENTITIES.tuples(claims)),
            *_steps(envelopes.SQLITE_WRITE.text(1), envelopes.tuples(projection.held.values())),
            *_steps(events.INSERT.one_of_sqlite, events.COLUMNS.tuples(projection.events)),
            *_steps(events.INSERT_BODIES.one_of_sqlite, events.BODIES.tuples(projection.bodies)),
            *_steps(
                deliveries.SQLITE_ENQUEUE.text(1),
                deliveries.OWED.tuples(deliveries.numbered(projection.deliveries)),
            ),
        ]


def _steps(statement: str, rows: Sequence[Sequence[object]]) -> list[Step]:
    return [(statement, row) for row in rows]


class ThreeWrites(OneByOne):
    """The reference's three writes, on its tables."""

    name = "SQLite, three writes"

    def open(self) -> sqlite3.Connection:
        file = sqlite3.connect(self._file, isolation_level=None)
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("PRAGMA synchronous=FULL")
        file.executescript(_SQLITE_SCHEMA)
        return file

    def event(self, number: int) -> Sequence[Step]:
        event, envelope = f"evt_{number}", f"env-{number * 7919 % 1_000_003}"
        return [
            (_SQLITE_EVENT, (event, envelope, b"\xab" * 704)),
            (_SQLITE_ENVELOPE, (envelope,)),
            (_SQLITE_DELIVERY, (event,)),
        ]


class Start:
    """From nothing to the first 200 of `/readyz`: on SQLite, with a schema that fits."""

    name = "start on SQLite"

    def __init__(self, service: OnSqlite) -> None:
        self._service = service

    def measure(self, seconds: float) -> Started:
        del seconds  # it takes what it takes
        url, log = self._service.create_database(), self._service.log
        environment = self._service.environment(url)
        crowd, began = Crowd(), time.monotonic()
        with running(self._service.command(), environment=environment, log=log) as process:
            wait_until_ready(process, self._service.port, log)
            took = time.monotonic() - began
        return Started(self.name, took, crowd.share(took))
