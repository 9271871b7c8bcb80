"""What PostgreSQL can do by itself: the same writes, by pgbench."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg

from tests.bench.machine import Crowd, cpu_seconds
from tests.bench.measurement import Measurement
from tests.bench.processes import run
from tests.postgres import Postgres, PostgresUnavailableError, find_binaries

HERE = Path(__file__).parent
SCHEMA = HERE / "reference_schema.sql"

_TPS = re.compile(r"^tps = ([0-9.]+) ", re.MULTILINE)
_DONE = re.compile(r"actually processed: (\d+)")


class Reference:
    """One SQL file, fired by as many pgbench clients as there would be connections."""

    connections: Sequence[int] | None = None

    def __init__(self, postgres: Postgres, name: str, script: Path, schema: Path = SCHEMA) -> None:
        self.name = name
        self._postgres = postgres
        self._script = script
        self._schema = schema

    def prepare(self) -> None:
        find_pgbench()

    def measure(self, connections: int, seconds: float) -> Measurement:
        url = self._postgres.create_database("bench")
        try:
            asyncio.run(_execute(url, self._schema.read_text()))
            # As the receivers have their warm-up, so has the reference.
            self._pgbench(connections, 1)
            crowd, before, client = Crowd(), cpu_seconds(self._postgres.family()), _client_seconds()
            said = self._pgbench(connections, max(1, round(seconds)))
            used = cpu_seconds(self._postgres.family()) - before
            others = crowd.share(used + _client_seconds() - client)
            measured = self._read(said, connections, used)
            return replace(measured, crowd=others, rows=asyncio.run(_count(url)))
        finally:
            self._postgres.drop_database("bench")

    def _pgbench(self, connections: int, seconds: int) -> str:
        where = ["-h", "127.0.0.1", "-p", str(self._postgres.port), "-U", "postgres"]
        how = ["-n", "-M", "simple", "-j", "1", "-c", str(connections), "-T", str(seconds)]
        return run([str(find_pgbench()), *where, *how, "-f", str(self._script), "bench"])

    def _read(self, said: str, connections: int, used: float) -> Measurement:
        tps, done = _TPS.search(said), _DONE.search(said)
        if tps is None or done is None:
            raise RuntimeError(f"pgbench answered something else:\n{said}")
        return Measurement(
            contender=self.name,
            connections=connections,
            rate=float(tps[1]),
            database_cpu=used / max(1, int(done[1])) * 1e6,
        )


def references(postgres: Postgres) -> Sequence[Reference]:
    return [
        Reference(postgres, "reference", HERE / "reference.sql"),
        Reference(postgres, "one-statement", HERE / "reference_one_statement.sql"),
    ]


def find_pgbench() -> Path:
    """Return pgbench: the one beside the server's binaries, or one on PATH."""
    beside = find_binaries() / "pgbench"
    if beside.exists():
        return beside
    found = shutil.which("pgbench")
    if found is None:
        raise PostgresUnavailableError(
            f"There is no pgbench, neither in {beside.parent} nor on PATH, and without it there "
            "is no reference. Install it (Debian: apt install postgresql-contrib), or leave the "
            "reference out: --only service,textbook"
        )
    return Path(found)


def pgbench_version() -> str:
    """Return pgbench's version, and whether it is one from PATH."""
    program = find_pgbench()
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    place = "" if program.parent == find_binaries() else " (from PATH)"
    return done.stdout.strip() + place


def _client_seconds() -> float:
    """Return the processor time of every program that we started and that has ended."""
    times = os.times()
    return times.children_user + times.children_system


async def _execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


async def _count(url: str) -> dict[str, int]:
    connection = await asyncpg.connect(url)
    try:
        return {
            table: await connection.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608
            for table in ("events", "envelopes", "deliveries")
        }
    finally:
        await connection.close()
