"""The contenders that speak HTTP: how each is started, fired at, and audited."""

import asyncio
import json
import secrets
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import asyncpg
import psutil

from tests.bench.load import Order, Result
from tests.bench.machine import Crowd, cpu_seconds, peak_memory
from tests.bench.measurement import Measurement
from tests.bench.owed import subscribe
from tests.bench.processes import (
    ROOT,
    clean_environment,
    end,
    python,
    run,
    running,
    wait_until_ready,
)
from tests.postgres import Postgres, free_port

DIGEST = 32


class Receiver(ABC):
    """Something that answers webhooks, on a database that is fresh for each window."""

    name: str
    # On how many connections it is fired at; None: on all that are asked for.
    connections: Sequence[int] | None = None
    # Give the digest of the bytes of each event that has everything it must have.
    digests: str
    tables: Mapping[str, str]

    def __init__(self, postgres: Postgres, scratch: Path) -> None:
        self._postgres = postgres
        self._scratch = scratch
        self._secret = secrets.token_hex(32)
        self._port = free_port()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def log(self) -> Path:
        """Where it writes what it has to say."""
        return self._scratch / "receiver.log"

    @abstractmethod
    def prepare(self) -> None:
        """Do once what every window needs."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command that serves on `self._port`."""

    @abstractmethod
    def create_database(self) -> str:
        """Make the empty database, and return its URL."""

    def measure(self, connections: int, seconds: float, rate: float | None = None) -> Measurement:
        """Start the receiver, fire at it, stop it, and look for every event."""
        url = self.create_database()
        log = self.log
        digests = self._scratch / "digests"
        order = Order(self._port, self._secret, connections, seconds, str(digests), rate)
        try:
            with (
                self.company(url),
                running(self.command(), environment=self.environment(url), log=log) as process,
            ):
                wait_until_ready(process, self._port, log)
                self._settle(url)
                measurement = self._fire(order, process)
            return asyncio.run(self._audit(url, measurement, digests.read_bytes()))
        finally:
            self._discard()

    def _settle(self, url: str) -> None:
        asyncio.run(_checkpoint(url))

    def _discard(self) -> None:
        self._postgres.drop_database("bench")

    def receivers(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return every process whose time is charged to the receiver."""
        return [psutil.Process(process.pid)]

    def company(self, url: str) -> AbstractContextManager[object]:
        """Return what has to run beside it."""
        del url
        return nullcontext()

    def watching(self, process: subprocess.Popen[bytes]) -> AbstractContextManager[object]:
        """Return what has to be done as the window opens, and as it closes."""
        del process
        return nullcontext()

    def environment(self, url: str) -> dict[str, str]:
        return {
            "ATLAS_API_KEY": self._secret,
            "DATABASE_URL": url,
            "ENV_FILE": "",
            "LOG_FORMAT": "json",
        }

    def _fire(self, order: Order, process: subprocess.Popen[bytes]) -> Measurement:
        receiver = self.receivers(process)
        load = subprocess.Popen(
            python("-m", "tests.bench.load"),
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _say(load, json.dumps(asdict(order)))
            _expect(load, "ready")
            before = cpu_seconds(receiver), cpu_seconds(self._postgres.family())
            crowd = Crowd()
            with self.watching(process):
                _say(load, "go")
                result = Result(**json.loads(_hear(load)))
            after = cpu_seconds(receiver), cpu_seconds(self._postgres.family())
            others = crowd.share(sum(after) - sum(before) + result.own_cpu)
            _expect(load, "done")
        finally:
            end(load)
        per_event = 1e6 / max(1, result.recorded)
        return Measurement(
            contender=self.name,
            connections=order.connections,
            rate=result.rate,
            p50=result.p50,
            p99=result.p99,
            p999=result.p999,
            cpu=(after[0] - before[0]) * per_event,
            database_cpu=(after[1] - before[1]) * per_event,
            load_cpu=result.own_cpu * per_event,
            memory=peak_memory(process.pid),
            crowd=others,
            began=result.began,
            acknowledged=result.acknowledged,
            failures=result.failures,
        )

    async def _audit(self, url: str, measured: Measurement, digests: bytes) -> Measurement:
        """Compare what was acknowledged with what is stored, byte for byte."""
        promised = [digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST)]
        stored, rows = await self._ask(url)
        measured.rows.update(rows)
        measured.faults.extend(find_faults(measured, promised, stored))
        return measured

    async def _ask(self, url: str) -> tuple[list[bytes], dict[str, int]]:
        """Return the digests of what is stored, and how many rows each table has."""
        connection = await asyncpg.connect(url)
        try:
            stored = [row[0] for row in await connection.fetch(self.digests)]
            rows = {
                table: int(await connection.fetchval(f"SELECT count(*) FROM {place}"))  # noqa: S608
                for table, place in self.tables.items()
            }
        finally:
            await connection.close()
        return stored, rows


def find_faults(
    measured: Measurement, promised: Sequence[bytes], stored: Sequence[bytes]
) -> list[str]:
    """Say, in sentences, which promises the database does not keep."""
    where = f"{measured.contender} at {measured.connections} connections"
    faults = []
    kept = set(stored)
    if missing := set(promised) - kept:
        first = ", ".join(sorted(digest.hex()[:16] for digest in missing)[:5])
        faults.append(
            f"{where}: {len(missing)} acknowledged events are lost, altered, or lack their "
            f"envelope or delivery (SHA-256 of the bodies: {first}…)"
        )
    if len(kept) != len(stored):
        faults.append(f"{where}: {len(stored) - len(kept)} events are stored twice")
    # An event without a 200 may be stored all the same: its answer was a failure.
    excess = len(kept - set(promised)) - sum(measured.failures.values())
    if excess > 0:
        faults.append(f"{where}: {excess} events are stored that nobody sent")
    for table, count in measured.rows.items():
        if count < len(promised):
            faults.append(f"{where}: {len(promised)} acknowledged, but {count} rows in {table}")
    return faults


class Service(Receiver):
    """This project, as it is run in production: the webhooks alone."""

    name = "service"
    digests = """
        SELECT sha256(b.body) FROM atlas_receiver.events e
        JOIN atlas_receiver.bodies b ON b.event_id = e.id
        JOIN atlas_receiver.envelopes v ON v.account = e.account AND v.id = e.envelope_id
        JOIN atlas_receiver.deliveries d ON d.event_id = e.id AND d.callback = 'bench'
    """
    tables = {  # noqa: RUF012
        name: f"atlas_receiver.{name}" for name in ("events", "envelopes", "deliveries")
    }

    @property
    def template(self) -> str:
        """The database that each window has a copy of."""
        return f"template of {self.name}"

    def prepare(self) -> None:
        url = self._postgres.create_database(self.template)
        run(python("-m", "app", "migrate"), environment=self.environment(url))
        asyncio.run(subscribe(url, "bench"))

    def command(self) -> Sequence[str]:
        what = ("-m", "app", "serve", "--only", "webhooks", "--no-work")
        return python(*what, "--host", "127.0.0.1", "--port", str(self._port))

    def create_database(self) -> str:
        return self._postgres.create_database("bench", template=self.template)


class Textbook(Receiver):
    """What the service is compared with: tests/bench/textbook.py, one worker."""

    name = "textbook"
    module = "tests.bench.textbook"
    digests = """
        SELECT sha256(e.body) FROM events e
        JOIN envelopes v ON v.id = e.envelope_id
        JOIN deliveries d ON d.event_id = e.id
    """
    tables = {name: name for name in ("events", "envelopes", "deliveries")}  # noqa: RUF012

    def prepare(self) -> None:
        """It makes its tables itself."""

    def command(self) -> Sequence[str]:
        what = ("-m", "uvicorn", f"{self.module}:app", "--no-access-log")
        return python(*what, "--log-level", "warning", "--port", str(self._port))

    def create_database(self) -> str:
        return self._postgres.create_database("bench")


class TextbookAsync(Textbook):
    """The same with `async` throughout: tests/bench/textbook_async.py."""

    name = "textbook-async"
    module = "tests.bench.textbook_async"


async def _checkpoint(url: str) -> None:
    """Let the writes of earlier windows be done with before the next."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def _say(load: subprocess.Popen[str], line: str) -> None:
    assert load.stdin is not None  # asked for when it was started
    load.stdin.write(line + "\n")
    load.stdin.flush()


def _hear(load: subprocess.Popen[str]) -> str:
    assert load.stdout is not None  # asked for when it was started
    line = load.stdout.readline()
    if not line:
        raise RuntimeError("the load generator ended before its time; see its message above")
    return line


def _expect(load: subprocess.Popen[str], word: str) -> None:
    if (said := _hear(load).strip()) != word:
        raise RuntimeError(f"the load generator said {said!r} instead of {word!r}")
