"""Many writers, many readers and sequencers that die: everybody sees the same feed.

`python -m tests.acceptance.test_feed_races --seconds 60 --seed 7` does it at length, and
prints a table.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app.store import feed, leases
from app.store.feed import Item
from app.store.ids import new_id
from app.store.migrations import migrate
from app.store.session import DEFAULT_SCHEMA, Database, DatabaseAddress
from app.upkeep.sequencer import Sequencer
from tests.acceptance.service import START_DEADLINE, wait_for
from tests.integration.ledger import LIMITS, Ledger, until
from tests.postgres import Postgres

ROOT = Path(__file__).resolve().parents[2]
LIMIT = timedelta(seconds=30)
WRITERS, READERS, ENVELOPES = 8, 20, 24
# A long transaction stays open until the feed has gone on by so much.
MEANWHILE = 30
PATIENCE = 60.0


@contextmanager
def sequencing(url: str, holder: str, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.acceptance.sequencing", url, holder, *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@dataclass
class Notes:
    """What writers and readers saw."""

    # Of each envelope, in the order in which its row was locked.
    committed: list[tuple[UUID, str, int]] = field(default_factory=list)
    undone: set[UUID] = field(default_factory=set)
    seen: list[list[Item]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    is_over: bool = False
    is_placed: bool = False

    def has_seen_all(self) -> bool:
        """Whether a holder was killed, and a long transaction came to its end."""
        counts = self.counts
        return counts["killed"] > 0 and counts["long"] + counts["stalled"] > 0


class Writer:
    """Writes events by plain SQL, as any release or script might, in transactions of any kind."""

    def __init__(self, driver: Any, notes: Notes, dice: random.Random, *, is_long: bool) -> None:
        self._driver = driver
        self._notes = notes
        self._dice = dice
        self._is_long = is_long

    async def run(self) -> None:
        while not self._notes.is_over:
            transaction = self._driver.transaction()
            await transaction.start()
            written = await self._write()
            if self._is_long:
                await self._linger()
            else:
                await asyncio.sleep(self._dice.choice([0, 0, 0.005, 0.05]))
            await self._end(transaction, written)

    async def _write(self) -> list[tuple[UUID, str, int]]:
        # The long one has envelopes of its own, or everybody would wait for its locks.
        first, last = (0, 3) if self._is_long else (4, ENVELOPES - 1)
        names = {f"env_{self._dice.randint(first, last):02}" for _ in range(3)}
        written = []
        for name in sorted(names):
            written += await self._add(name, self._dice.randint(1, 4))
            if self._dice.random() < 0.2:
                with contextlib.suppress(asyncpg.RaiseError):
                    async with self._driver.transaction():
                        lost = await self._add(name, 2)
                        self._notes.undone |= {row[0] for row in lost}
                        raise asyncpg.RaiseError
        return written

    async def _add(self, name: str, count: int) -> list[tuple[UUID, str, int]]:
        sequence = await self._driver.fetchval(
            "UPDATE envelopes SET sequence = sequence + $2 WHERE id = $1 RETURNING sequence",
            name,
            count,
        )
        rows = [(new_id(), name, sequence - count + 1 + n) for n in range(count)]
        await self._driver.execute(
            "INSERT INTO events (id, account, envelope_id, sequence, received_at, effect) "
            "SELECT id, 'default', envelope_id, sequence, now(), 'applied' "
            "FROM unnest($1::uuid[], $2::text[], $3::int8[]) AS r (id, envelope_id, sequence)",
            *[list(column) for column in zip(*rows, strict=True)],
        )
        return rows

    async def _linger(self) -> None:
        """Hold what was written until others were placed meanwhile."""
        start, end = await self._head(), time.monotonic() + PATIENCE
        while await self._head() < start + MEANWHILE:
            if self._notes.is_over:
                return
            if time.monotonic() > end:
                self._notes.counts["stalled"] += 1
                return
            await asyncio.sleep(0.02)
        self._notes.counts["long"] += 1
        await asyncio.sleep(self._dice.uniform(0, 2))

    async def _head(self) -> int:
        return int(await self._driver.fetchval("SELECT coalesce(max(position), 0) FROM feed"))

    async def _end(self, transaction: Any, written: list[tuple[UUID, str, int]]) -> None:
        if self._dice.random() < 0.15:
            await transaction.rollback()
            self._notes.undone |= {row[0] for row in written}
            return
        await transaction.commit()
        self._notes.committed += written
        self._notes.counts["transactions"] += 1


class Reader:
    """Pages through the feed by its cursor, from the first item on."""

    def __init__(self, database: Database, notes: Notes, dice: random.Random) -> None:
        self._database = database
        self._notes = notes
        self._dice = dice
        self._seen: list[Item] = []
        notes.seen.append(self._seen)

    async def run(self) -> None:
        while True:
            is_last = self._notes.is_placed
            limit = self._dice.randint(1, 200)
            items = await self._read(limit)
            self._seen += items
            if is_last and not items:
                return
            await asyncio.sleep(0 if len(items) == limit else self._dice.uniform(0, 0.1))

    async def _read(self, limit: int) -> list[Item]:
        after = self._seen[-1].position if self._seen else 0
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            return await feed.read(connection, after, limit=limit)


class Killer:
    """Kills whoever gives places just now, and starts another one in its stead."""

    def __init__(self, url: str, database: Database, notes: Notes, pause: float) -> None:
        self._url = url
        self._database = database
        self._notes = notes
        self._pause = pause
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        name = f"holder-{self._notes.counts['killed']}-{len(self._running)}"
        self._running[name] = self._stack.enter_context(sequencing(self._url, name))

    async def run(self) -> None:
        """Kill one after each pause, as soon as somebody holds the lease.

        But not before something was placed since the last time: where a start takes longer
        than the pause, everybody would be killed at once, and the feed would stand still.
        """
        next_at, last = time.monotonic() + self._pause, 0
        while not self._notes.is_over:
            await asyncio.sleep(0.05)
            async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
                holder = await leases.holder_of(connection, feed.LEASE)
                head = await feed.head(connection)
            position = head.position if head is not None else 0
            if holder in self._running and time.monotonic() > next_at and position > last:
                self._running.pop(holder).kill()
                self._notes.counts["killed"] += 1
                self.start()
                next_at, last = time.monotonic() + self._pause, position

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
        self._stack.close()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    driver = await asyncpg.connect(url, server_settings={"search_path": DEFAULT_SCHEMA})
    try:
        yield driver
    finally:
        await driver.close()


@dataclass(frozen=True, slots=True)
class Result:
    """The counts of one run; the wrong ones must all be zero."""

    facts: dict[str, float]
    wrong: dict[str, int]

    @property
    def failures(self) -> list[str]:
        return [name for name, count in self.wrong.items() if count]

    def table(self) -> str:
        lines = [f"{name:<44}{value:>10,.2f}" for name, value in self.facts.items()]
        return "\n".join([*lines, *(f"{n:<44}{c:>10} (0)" for n, c in self.wrong.items())])


async def rehearse(url: str, *, seconds: float, seed: int) -> Result:
    """Run everything for a while, end the writers, and compare what everybody has seen."""
    notes, dice = Notes(), random.Random(seed)
    # Nobody here waits for a connection of somebody else.
    database = Database(DatabaseAddress(url), size=READERS + 4, limits=LIMITS)
    killer = Killer(url, database, notes, pause=seconds / 4)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(killer.close)
        stack.push_async_callback(database.close)
        await _make_envelopes(database)
        killer.start()
        killer.start()
        readers = [Reader(database, notes, random.Random(dice.random())) for _ in range(READERS)]
        writers = [
            Writer(
                await stack.enter_async_context(connected(url)),
                notes,
                random.Random(dice.random()),
                is_long=number == 0,
            )
            for number in range(WRITERS)
        ]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(reader.run())
            group.create_task(_watch(database, notes))
            async with asyncio.TaskGroup() as inner:
                inner.create_task(killer.run())
                for writer in writers:
                    inner.create_task(writer.run())
                await until(lambda: _has_begun(database), limit=START_DEADLINE)
                await asyncio.sleep(seconds)
                # A slow machine needs longer to come to everything that is to be seen.
                await until(notes.has_seen_all, limit=2 * PATIENCE)
                notes.is_over = True
            await until(lambda: _is_empty(database), limit=START_DEADLINE)
            notes.is_placed = True
    return judge(notes)


async def _make_envelopes(database: Database) -> None:
    async with database.begin(limit=LIMIT) as connection:
        await connection.exec_driver_sql(
            "INSERT INTO envelopes (account, id, version, sequence, first_seen_at, updated_at) "
            "SELECT 'default', 'env_' || lpad(n::text, 2, '0'), 1, 0, now(), now() "
            "FROM generate_series(0, $1::int4 - 1) AS n",
            (ENVELOPES,),
        )


async def _is_empty(database: Database) -> bool:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return await feed.pending_since(connection) is None


async def _has_begun(database: Database) -> bool:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return await feed.head(connection) is not None


async def _watch(database: Database, notes: Notes) -> None:
    """Note how long the first change in sight has waited, now and then."""
    while not notes.is_placed:
        async with database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            lag = await feed.lag(connection)
        notes.waits.append(lag.total_seconds() if lag is not None else 0.0)
        await asyncio.sleep(0.05)


def judge(notes: Notes) -> Result:
    """Count what must not be."""
    items = max(notes.seen, key=len)
    placed = Counter(item.event_id for item in items)
    committed = {row[0]: row for row in notes.committed}
    waits = sorted(notes.waits)
    return Result(
        {
            "events committed": len(committed),
            "transactions": notes.counts["transactions"],
            "rolled back events": len(notes.undone),
            "long transactions that others overtook": notes.counts["long"],
            "holders killed": notes.counts["killed"],
            "readers": len(notes.seen),
            "oldest change waiting, median (s)": waits[len(waits) // 2],
            "oldest change waiting, longest (s)": waits[-1],
        },
        {
            "missing": len(committed.keys() - placed.keys()),
            "there and never committed": len(placed.keys() - committed.keys()),
            "rolled back and there": len(notes.undone & placed.keys()),
            "there twice": sum(count > 1 for count in placed.values()),
            "gaps": sum(after - before != 1 for before, after in pairwise(_positions(items))),
            "out of order within an envelope": _disorder(items),
            "readers who saw something else": sum(seen != items for seen in notes.seen),
            "long transactions that held others up": notes.counts["stalled"],
        },
    )


def _positions(items: list[Item]) -> list[int]:
    return [0, *(item.position for item in items)]


def _disorder(items: list[Item]) -> int:
    last: Counter[str | None] = Counter()
    wrong = 0
    for item in items:
        assert item.sequence is not None
        wrong += item.sequence != last[item.envelope_id] + 1
        last[item.envelope_id] = item.sequence
    return wrong


# Where much else runs, processes take long to start, and everything waits for them.
@pytest.mark.timeout(400)
class TestRaces:
    async def test_every_reader_sees_the_same_whoever_writes_and_whoever_dies(
        self, postgres_url: str
    ) -> None:
        seconds = float(os.environ.get("FEED_RACE_SECONDS", "5"))

        result = await rehearse(postgres_url, seconds=seconds, seed=20261122)

        assert [] == result.failures, f"\n{result.table()}"
        assert result.facts["long transactions that others overtook"]
        assert result.facts["holders killed"]


@pytest.mark.timeout(400)
class TestHolders:
    async def test_one_killed_is_followed_by_another(self, postgres_url: str) -> None:
        ledger = Ledger(postgres_url)
        with sequencing(postgres_url, "first") as process:
            await ledger.record(sequence=1)
            await until(lambda: _is_empty(ledger.database), limit=START_DEADLINE)
            other = Sequencer(ledger.database, holder="second")
            task = asyncio.create_task(other.run())

            process.kill()
            process.wait()
            await ledger.record(sequence=2)

            await until(lambda: _is_empty(ledger.database))
        async with ledger.reading() as connection:
            assert [1, 2] == [item.sequence for item in await feed.read(connection, 0, limit=9)]
        other.close()
        await task
        await ledger.database.close()

    async def test_one_frozen_in_its_transaction_is_followed_and_leaves_nothing(
        self, postgres_url: str
    ) -> None:
        ledger = Ledger(postgres_url)
        event = await ledger.record()
        with sequencing(postgres_url, "frozen", "--freeze") as process:
            wait_for(lambda: is_stopped(process.pid), "a stopped process", seconds=START_DEADLINE)
            other = Sequencer(ledger.database, holder="second")
            task = asyncio.create_task(other.run())

            await until(lambda: _is_empty(ledger.database))
            os.kill(process.pid, signal.SIGCONT)

            assert await asyncio.to_thread(process.wait, 60)
        async with ledger.reading() as connection:
            items = await feed.read(connection, 0, limit=9)
        assert [(1, event)] == [(item.position, item.event_id) for item in items]
        other.close()
        await task
        await ledger.database.close()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write, read and kill, and compare.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    os.environ["ENV_FILE"] = ""
    print(f"seed {arguments.seed}")  # noqa: T201
    with Postgres() as postgres:
        url = postgres.create_database("receiver")
        asyncio.run(migrate(url))
        result = asyncio.run(rehearse(url, seconds=arguments.seconds, seed=arguments.seed))
    print(result.table())  # noqa: T201
    print("\n".join(f"WRONG: {name}" for name in result.failures) or "all as expected")  # noqa: T201
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
