"""The contenders that work off a queue: each filled, drained by one process, and counted."""

import asyncio
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import psutil

from tests.bench import owed
from tests.bench.machine import Crowd, cpu_seconds, peak_memory
from tests.bench.measurement import Worked
from tests.bench.processes import python, run, running
from tests.postgres import Postgres, free_port

LOOK_EVERY = 0.005
START_DEADLINE = 30.0


@dataclass(frozen=True, slots=True)
class Filling:
    """How many jobs wait, and how many were done long ago."""

    waiting: int
    finished: int = 0


class Queue(ABC):
    """Something that works off jobs which do nothing, on a database filled beforehand."""

    name: str
    # How many jobs wait or run.
    count_left: str
    # How many jobs of this run have ended well, by the history that is kept of them.
    count_done: str

    def __init__(self, postgres: Postgres, scratch: Path, filling: Filling) -> None:
        self._postgres = postgres
        self._log = scratch / f"{self.name}-worker.log"
        self._notes = scratch / f"{self.name}-notes"
        self._filling = filling
        self._template = f"bench {self.name} {filling.waiting} {filling.finished}"

    @property
    def title(self) -> str:
        """Tell it from the same contender with another filling."""
        beside = f" beside {self._filling.finished:,}" if self._filling.finished else ""
        return f"{self.name}, {self._filling.waiting:,} waiting{beside}"

    @abstractmethod
    async def fill(self, url: str) -> None:
        """Make the tables, and put the jobs in."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command that runs one worker."""

    async def audit(self, connection: asyncpg.Connection) -> list[str]:
        """Say, in sentences, what is not as it has to be."""
        del connection
        return []

    def environment(self, url: str) -> dict[str, str]:
        return {
            "DATABASE_URL": url,
            "BENCH_NOTES": str(self._notes),
            "BENCH_JOBS": str(self._filling.waiting),
        }

    def prepare(self) -> None:
        asyncio.run(self.fill(self._postgres.create_database(self._template)))

    def measure(self, seconds: float) -> Worked:
        """Let one worker work until nothing is left, or the time is over."""
        url = asyncio.run(self._copy())
        self._notes.write_bytes(b"")
        try:
            with running(self.command(), environment=self.environment(url), log=self._log) as it:
                self._wait_for_the_first(it)
                return asyncio.run(self._watch(url, it, seconds))
        finally:
            self._postgres.drop_database("bench")

    async def _copy(self) -> str:
        connection = await asyncpg.connect(self._postgres.url())
        try:
            # File by file: it makes no log to be written later, and a checkpoint before.
            await connection.execute(
                f'CREATE DATABASE bench TEMPLATE "{self._template}" STRATEGY file_copy'
            )
        finally:
            await connection.close()
        return self._postgres.url("bench")

    def _wait_for_the_first(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_DEADLINE
        while not self._noted():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
                raise RuntimeError(f"{self.name} did not begin to work; its log ends:\n{tail}")
            time.sleep(0.001)

    def _noted(self) -> list[int]:
        """Give the times of the first and of the last call, as far as there were any."""
        return [int(line.split()[1]) for line in self._notes.read_text().splitlines()]

    async def _watch(self, url: str, process: subprocess.Popen[bytes], seconds: float) -> Worked:
        worker = [psutil.Process(process.pid)]
        before = cpu_seconds(worker), cpu_seconds(self._postgres.family())
        crowd, began = Crowd(), self._noted()[0]
        connection = await asyncpg.connect(url)
        try:
            left = await self._wait_until_done(connection, began + int(seconds * 1e9))
            took = (time.time_ns() - began) / 1e9
            after = cpu_seconds(worker), cpu_seconds(self._postgres.family())
            done = self._filling.waiting - left
            faults = await self._faults(connection, done)
        finally:
            await connection.close()
        per_job = 1e6 / max(1, done)
        return Worked(
            contender=self.name,
            waiting=self._filling.waiting,
            finished=self._filling.finished,
            rate=done / took,
            cpu=(after[0] - before[0]) * per_job,
            database_cpu=(after[1] - before[1]) * per_job,
            memory=peak_memory(process.pid),
            crowd=crowd.share(sum(after) - sum(before)),
            done=done,
            faults=faults,
        )

    async def _wait_until_done(self, connection: asyncpg.Connection, end: int) -> int:
        """Return how many jobs are left: none, unless the time is over."""
        # Before the last call there is nothing to ask, and questions cost the server time.
        while len(self._noted()) < 2 and time.time_ns() < end:  # noqa: ASYNC110  # a file
            await asyncio.sleep(LOOK_EVERY)
        left = await connection.fetchval(self.count_left)
        while left and time.time_ns() < end:
            await asyncio.sleep(LOOK_EVERY)
            left = await connection.fetchval(self.count_left)
        return int(left)

    async def _faults(self, connection: asyncpg.Connection, done: int) -> list[str]:
        faults = await self.audit(connection)
        if (kept := await connection.fetchval(self.count_done)) < done:
            faults.append(f"{done} jobs are gone, and the history knows of {kept}")
        return [f"{self.name}: {fault}" for fault in faults]


# Of two neighbours in the order of one envelope, the later one began before the other had ended.
_OUT_OF_ORDER = """
SELECT count(*) FROM (
    SELECT a.started_at, lag(a.finished_at) OVER
        (PARTITION BY d.account, d.envelope_id ORDER BY d.sequence) AS previous
    FROM atlas_receiver.deliveries d JOIN atlas_receiver.attempts a ON a.delivery_id = d.id
    WHERE a.worker <> 'bench:1'
) AS calls WHERE started_at < previous
"""
_NOT_ONCE = """
SELECT count(*) FROM atlas_receiver.deliveries d
WHERE d.state = 'done' AND (
    d.attempts <> 1
    OR 1 <> (SELECT count(*) FROM atlas_receiver.attempts a WHERE a.delivery_id = d.id)
)
"""


class Deliveries(Queue):
    """This project: `python -m app work`, one subscription that keeps the order."""

    name = "deliveries"
    count_left = "SELECT count(*) FROM atlas_receiver.deliveries WHERE due_at IS NOT NULL"
    count_done = "SELECT count(*) FROM atlas_receiver.attempts WHERE worker <> 'bench:1'"

    def __init__(self, postgres: Postgres, scratch: Path, filling: Filling) -> None:
        super().__init__(postgres, scratch, filling)
        self._port = free_port()

    async def fill(self, url: str) -> None:
        migrate = python("-m", "app", "migrate")
        await asyncio.to_thread(run, migrate, environment=self.environment(url))
        await owed.subscribe(url, "bench")
        filling = self._filling
        await owed.fill(url, callback="bench", owed=filling.waiting, finished=filling.finished)

    def command(self) -> Sequence[str]:
        return python("-m", "app", "work", "--port", str(self._port))

    def environment(self, url: str) -> dict[str, str]:
        return {
            **super().environment(url),
            "ATLAS_API_KEY": "it opens nothing: 0123456789",
            "CALLBACKS": "tests.bench.noop:drained",
            "ENV_FILE": "",
            "LOG_FORMAT": "json",
        }

    async def audit(self, connection: asyncpg.Connection) -> list[str]:
        faults = []
        if count := await connection.fetchval(_NOT_ONCE):
            faults.append(f"{count} deliveries are done without exactly one attempt in the history")
        if count := await connection.fetchval(_OUT_OF_ORDER):
            faults.append(f"{count} deliveries began before the one before them had ended")
        return faults


class Procrastinate(Queue):
    """procrastinate's own worker, jobs kept, as it does by default."""

    name = "procrastinate"
    count_left = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
    count_done = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"

    async def fill(self, url: str) -> None:
        from procrastinate import App, PsycopgConnector

        async with App(connector=PsycopgConnector(conninfo=url)).open_async() as app:
            await app.schema_manager.apply_schema_async()
            jobs = app.configure_task("noop", queue="default")
            await jobs.batch_defer_async(*({} for _ in range(self._filling.waiting)))
        await _vacuum(url)

    def command(self) -> Sequence[str]:
        return python("-m", "tests.bench.drain_procrastinate")


class PgQueuer(Queue):
    """PgQueuer's own worker; its tables are durable, as they are by default."""

    name = "pgqueuer"
    count_left = "SELECT count(*) FROM pgqueuer"
    count_done = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"

    async def fill(self, url: str) -> None:
        from pgqueuer import AsyncpgDriver, Queries

        count = self._filling.waiting
        connection = await asyncpg.connect(url)
        try:
            queries = Queries(AsyncpgDriver(connection))
            await queries.install()
            await queries.enqueue(["noop"] * count, [None] * count, [0] * count)
        finally:
            await connection.close()
        await _vacuum(url)

    def command(self) -> Sequence[str]:
        return python("-m", "tests.bench.drain_pgqueuer")


async def _vacuum(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()
