"""A database in trouble: the answer is a receipt or `NotDurable`, in time, and it is true.

After each fault: what was acknowledged is there, once; what was sent again is a duplicate.
"""

import asyncio
import os
import pwd
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest
from sqlalchemy import event

from app.intake import IntakeLimits
from app.store.migrations import migrate
from app.store.session import Database, DatabaseAddress
from tests.factories import make_body
from tests.faults.proxy import COMMIT, Cut, proxy
from tests.postgres import Postgres, replace_database
from tests.replicas import (
    DELIVERIES,
    ENVELOPES,
    EVENTS,
    NOT_DURABLE,
    Replica,
    eventually,
    execute,
    replica,
)

RECORDED, DUPLICATE = "recorded", "duplicate"
# Promised are 4.5 s to an answer, and 5 s from the server's return to the first receipt.
PROMISED, RETURNED = 9, 10
# As `journal_size_limit` says.
LOG_CAP = 64 * 1024 * 1024
KILLS = int(os.environ.get("SQLITE_KILLS", "5"))


@pytest.fixture(name="one")
async def _one(postgres_url: str) -> AsyncIterator[Replica]:
    async with replica(postgres_url) as one:
        yield one


@pytest.fixture(name="fragile", scope="module")
def _fragile() -> Iterator[Postgres]:
    """A server of this file's own, with a migrated database."""
    with Postgres() as server, ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, migrate(server.url())).result()
        yield server


@pytest.fixture(name="doomed")
async def _doomed(fragile: Postgres) -> AsyncIterator[Replica]:
    fragile.start()
    async with replica(fragile.url(), account=uuid.uuid4().hex, is_strict=True) as one:
        yield one
        fragile.resume()
        fragile.start()


def batched(bodies: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Give the bodies, so many at a time."""
    rest = list(bodies)
    while rest:
        taken, rest = rest[:size], rest[size:]
        yield taken


async def insisted(one: Replica, *bodies: bytes) -> list[object]:
    """Send all until each has a receipt, as Atlas does: on a busy machine one may be late."""
    told = dict.fromkeys(bodies, NOT_DURABLE)
    end = time.monotonic() + 60
    while (late := [body for body in bodies if told[body] == NOT_DURABLE]) and (
        time.monotonic() < end
    ):
        told.update(zip(late, await one.together(*late), strict=True))
    return [told[body] for body in bodies]


async def timed(answer: Awaitable[object]) -> object:
    """Await an answer; it must come in time."""
    return await asyncio.wait_for(answer, PROMISED)


async def recovers(one: Replica, *, within: float = RETURNED) -> None:
    """Wait for the first receipt, of an event that no test counts."""

    async def is_recorded() -> bool:
        return await one.outcome(make_body(), account="probe") == RECORDED

    await eventually(is_recorded, within=within)


class Load:
    """Senders that never stop, and what each of them was told."""

    def __init__(self, one: Replica, *, senders: int = 8) -> None:
        self._one = one
        self._senders = senders
        self._is_over = False
        self.told: dict[bytes, object] = {}
        self.slowest = 0.0

    async def _send(self) -> None:
        while not self._is_over:
            body = make_body(event_id=uuid.uuid4().hex)
            start = time.perf_counter()
            self.told[body] = await self._one.outcome(body)
            self.slowest = max(self.slowest, time.perf_counter() - start)
            await asyncio.sleep(0.002)

    async def during(self, fault: Callable[[], Awaitable[None]]) -> None:
        senders = [asyncio.create_task(self._send()) for _ in range(self._senders)]
        await eventually(lambda: len(self.told) >= 20)
        await fault()
        self._is_over = True
        await asyncio.gather(*senders)

    async def check(self) -> None:
        """Nothing lost, nothing double; and the senders' next tries make everything good."""
        assert {RECORDED} <= set(self.told.values()) <= {RECORDED, NOT_DURABLE}
        assert self.slowest < PROMISED
        acknowledged = {body for body, answer in self.told.items() if answer == RECORDED}
        again: dict[bytes, object] = {}
        # No more at once than are surely answered in time: each copy is counted by itself.
        for bodies in batched(self.told, 200):
            again.update(zip(bodies, await insisted(self._one, *bodies), strict=True))
        assert {DUPLICATE} == {again[body] for body in acknowledged}
        assert {DUPLICATE, RECORDED} >= set(again.values())
        assert len(self.told) == await self._one.count(EVENTS)
        assert len(self.told) == await self._one.count(ENVELOPES)
        assert 2 * len(self.told) == await self._one.count(DELIVERIES)


# What carries the commit: the statement that brings the bytes of the event, or, where no
# statement commits by itself, the word.
COMMITS = [
    pytest.param(b'"envelope_id"', "", id="of-one-statement"),
    pytest.param(COMMIT, "pooled", id="of-a-transaction-behind-a-pooler"),
]


class TestLostReplies:
    @pytest.mark.parametrize("to, pooled", COMMITS)
    async def test_a_commit_whose_reply_is_lost_is_found_by_the_next_try(
        self, postgres_url: str, to: bytes, pooled: str
    ) -> None:
        async with proxy(postgres_url) as (wire, url), replica(url, pgbouncer=bool(pooled)) as one:
            await one.record(make_body())
            body = make_body(event_id="e1")
            wire.swallow_reply(to=to, then=Cut.RESET)

            assert RECORDED == await timed(one.outcome(body))

            assert 1 == wire.swallowed
            assert DUPLICATE == await one.outcome(body)
            assert 2 == await one.count(EVENTS)
            assert 4 == await one.count(DELIVERIES)

    @pytest.mark.parametrize("to, pooled", COMMITS)
    async def test_a_commit_whose_reply_never_comes_is_not_durable_and_then_a_duplicate(
        self, postgres_url: str, to: bytes, pooled: str
    ) -> None:
        soon = IntakeLimits(transaction=timedelta(seconds=2))
        async with (
            proxy(postgres_url) as (wire, url),
            replica(url, pgbouncer=bool(pooled), limits=soon) as one,
        ):
            await one.record(make_body())
            body = make_body(event_id="e1")
            wire.swallow_reply(to=to, then=Cut.SILENCE)

            assert NOT_DURABLE == await timed(one.outcome(body))

            assert 1 == wire.swallowed
            assert [DUPLICATE] == await insisted(one, body)
            assert 2 == await one.count(EVENTS)


class TestSerialisation:
    @pytest.mark.parametrize("code", ["40001", "40P01"])
    @pytest.mark.parametrize("failures, answer, tries", [(3, RECORDED, 4), (9, NOT_DURABLE, 4)])
    async def test_three_more_tries_and_no_more(
        self, one: Replica, code: str, failures: int, answer: str, tries: int
    ) -> None:
        await plant(one, code=code, failures=failures)

        assert answer == await timed(one.outcome(make_body()))

        async with one.database.begin(limit=timedelta(seconds=5)) as connection:
            tried = (await connection.exec_driver_sql("SELECT last_value FROM tries")).scalar()
        assert tries == tried

    async def test_it_goes_on_afterwards(self, one: Replica) -> None:
        await plant(one, code="40001", failures=4)
        body = make_body()

        assert [NOT_DURABLE, RECORDED] == await one.in_turn(body, body)


async def plant(one: Replica, *, code: str, failures: int) -> None:
    """Let the first inserts fail; a sequence counts them, because it never rolls back."""
    await execute(one.database, "CREATE SEQUENCE tries")
    await execute(
        one.database,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('tries') <= {failures} THEN "
        f"RAISE EXCEPTION 'try again' USING ERRCODE = '{code}'; END IF; RETURN NULL; END $$",
    )
    each = "BEFORE INSERT ON events FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    await execute(one.database, f"CREATE TRIGGER fail {each}")


class TestConnections:
    async def test_sessions_terminated_under_load_lose_nothing(
        self, one: Replica, postgres: Postgres
    ) -> None:
        load = Load(one)

        async def terminate() -> None:
            name = one.database.address.url.rpartition("/")[2]
            admin = await asyncpg.connect(postgres.url())
            for _ in range(40):
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                    name,
                )
                await asyncio.sleep(0.02)
            await admin.close()

        await load.during(terminate)

        await recovers(one)
        await load.check()

    async def test_that_were_all_ended_cost_no_sender_a_try(
        self, one: Replica, postgres: Postgres
    ) -> None:
        """As after a restart: what the driver knows to be closed is given to nobody."""
        async with AsyncExitStack() as held:
            begin = one.database.begin
            connections = [
                await held.enter_async_context(begin(limit=timedelta(seconds=60))) for _ in range(4)
            ]
            drivers = [connection.info["driver"] for connection in connections]
        admin = await asyncpg.connect(postgres.url())
        name = one.database.address.url.rpartition("/")[2]
        ended = await admin.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
        )
        await admin.close()
        await eventually(lambda: all(driver.is_closed() for driver in drivers))

        assert RECORDED == await timed(one.outcome(make_body()))

        assert 4 == len(ended)

    async def test_without_a_free_connection_the_answer_comes_in_time(
        self, postgres_url: str
    ) -> None:
        async with replica(postgres_url, is_strict=True) as one:
            async with AsyncExitStack() as held:
                for _ in range(4):
                    begin = one.database.begin(limit=timedelta(seconds=60))
                    await held.enter_async_context(begin)

                assert NOT_DURABLE == await timed(one.outcome(make_body()))

            await recovers(one)

    async def test_a_locked_role_is_not_durable_and_nothing_else(self, doomed: Replica) -> None:
        """Without its role the service is down; it must not look like a refusal of the sender."""
        admin = await asyncpg.connect(doomed.database.address.url)
        role = f"role_{uuid.uuid4().hex}"
        await admin.execute(f"CREATE ROLE {role} SUPERUSER LOGIN")
        url = doomed.database.address.url.replace("postgres@", f"{role}:old@")
        async with replica(url, is_strict=True) as locked:
            assert [RECORDED] == await insisted(locked, make_body())
            await admin.execute(f"ALTER ROLE {role} NOLOGIN")
            await admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", role
            )

            answers = [await timed(locked.outcome(make_body())) for _ in range(3)]

            await admin.execute(f"ALTER ROLE {role} LOGIN")
            assert [NOT_DURABLE] * 3 == answers
            await recovers(locked)
        await admin.execute(f"DROP ROLE {role}")
        await admin.close()


class TestAWireThatForgets:
    """A NAT between the service and its database forgets connections that are idle."""

    async def test_costs_no_sender_a_try_if_it_says_so(self, postgres_url: str) -> None:
        async with proxy(postgres_url) as (wire, url), replica(url) as one:
            await one.together(*(make_body() for _ in range(20)))
            wire.forget_idle(after=0.2)
            await asyncio.sleep(0.3)

            assert RECORDED == await timed(one.outcome(make_body()))

    async def test_is_not_durable_and_then_found_out_if_it_does_not(
        self, postgres_url: str
    ) -> None:
        async with proxy(postgres_url) as (wire, url), replica(url, is_strict=True) as one:
            await recovers(one)
            wire.forget_idle(after=1.0, then=Cut.SILENCE)
            await asyncio.sleep(1.2)
            body = make_body(event_id="e1")

            assert NOT_DURABLE == await timed(one.outcome(body))

            wire.forget_idle(after=3600.0)
            assert [RECORDED] == await insisted(one, body)


class TestAFullServer:
    async def test_has_no_connection_left_for_us(self) -> None:
        """A sender is told to come again; nobody is told that the service is broken."""
        settings = {"max_connections": "8", "superuser_reserved_connections": "0"}
        with Postgres(settings=settings) as tight:
            await migrate(tight.url())
            async with AsyncExitStack() as others, replica(tight.url(), is_strict=True) as one:
                await fill(tight, others)

                answers = [await timed(one.outcome(make_body())) for _ in range(3)]

                await others.aclose()
                assert [NOT_DURABLE] * 3 == answers
                await recovers(one)

    async def test_has_no_room_left_for_the_tables(self, postgres: Postgres) -> None:
        with small_disk() as disk:
            url = await on_a_tablespace(postgres, disk)
            async with replica(url) as one:
                await one.record(make_body())
                (disk / "filler").write_bytes(b"")
                with suppress(OSError), (disk / "filler").open("ab", buffering=0) as filler:
                    while filler.write(b"x" * 4096):
                        pass
                # What there is room for in pages that are there already is taken.
                bodies = [make_body(filler=random.randbytes(100_000).hex()) for _ in range(5)]

                answers = [await timed(one.outcome(body)) for body in bodies]
                kept = await one.count(EVENTS)
                (disk / "filler").unlink()

                assert NOT_DURABLE in answers
                assert {NOT_DURABLE, RECORDED} >= set(answers)
                assert 1 + answers.count(RECORDED) == kept
                await recovers(one)
                assert {RECORDED, DUPLICATE} >= set(await one.in_turn(*bodies))
            postgres.drop_database(url.rpartition("/")[2])
            admin = await asyncpg.connect(postgres.url())
            await admin.execute("DROP TABLESPACE small")
            await admin.close()


async def fill(server: Postgres, others: AsyncExitStack) -> None:
    """Take every connection that the server has."""
    with suppress(asyncpg.TooManyConnectionsError):
        while True:
            connection = await asyncpg.connect(server.url())
            others.push_async_callback(connection.close)


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system that is soon full; to mount one takes root and a kernel that lets it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system to be filled")
    with tempfile.TemporaryDirectory() as name:
        # Where PostgreSQL runs as, in place of root.
        owner = pwd.getpwnam("nobody")
        options = f"size=32m,uid={owner.pw_uid},gid={owner.pw_gid},mode=0700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", name], check=False
        )
        if mounted.returncode != 0:
            pytest.skip("no file system may be mounted here")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


async def on_a_tablespace(server: Postgres, place: Path) -> str:
    """Make a migrated database whose tables are there; what is written ahead is elsewhere."""
    admin = await asyncpg.connect(server.url())
    await admin.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
    name = f"receiver_{uuid.uuid4().hex}"
    await admin.execute(f"CREATE DATABASE {name} TABLESPACE small")
    await admin.close()
    await migrate(server.url(name))
    return server.url(name)


class TestTheServer:
    async def test_a_frozen_server_is_answered_for_and_recovers(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        assert [RECORDED] == await insisted(doomed, make_body())
        bodies = [make_body() for _ in range(10)]
        fragile.suspend()

        answers = await timed(doomed.together(*bodies))
        fragile.resume()

        assert [NOT_DURABLE] * 10 == answers
        await recovers(doomed)
        assert {RECORDED, DUPLICATE} >= set(await insisted(doomed, *bodies))
        assert 11 == await doomed.count(EVENTS)

    async def test_an_immediate_stop_under_load_loses_nothing(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        load = Load(doomed)

        async def restart() -> None:
            await asyncio.to_thread(fragile.stop, "immediate")
            told = len(load.told)
            await eventually(lambda: len(load.told) > told)
            await asyncio.to_thread(fragile.start)
            await recovers(doomed)

        await load.during(restart)

        assert NOT_DURABLE in load.told.values()
        await load.check()

    async def test_restarts_at_random_moments_leave_nothing_behind(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        """Whatever was opened for what was cut off is closed again."""
        dice = random.Random(89)
        await recovers(doomed)
        process = psutil.Process()
        load = Load(doomed)

        async def restart() -> None:
            for _ in range(4):
                await asyncio.sleep(dice.uniform(0.0, 0.5))
                await asyncio.to_thread(fragile.stop, dice.choice(["immediate", "fast"]))
                await asyncio.sleep(dice.uniform(0.0, 0.3))
                await asyncio.to_thread(fragile.start)
                await recovers(doomed)

        before = len(asyncio.all_tasks()), process.num_fds()
        await load.during(restart)
        await load.check()

        pool: Any = doomed.database.engine.pool
        # More than these are not kept by intake. What was cut off last may still be closing.
        await eventually(lambda: pool.checkedout() <= IntakeLimits().transactions)
        await eventually(lambda: before[0] >= len(asyncio.all_tasks()))
        # The pool has four connections; at the beginning one was open.
        await eventually(lambda: process.num_fds() <= before[1] + 4)

    async def test_a_server_that_is_away_is_not_durable_at_once(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        await recovers(doomed)
        await asyncio.to_thread(fragile.kill)

        assert [NOT_DURABLE] * 3 == [await timed(doomed.outcome(make_body())) for _ in range(3)]

        await asyncio.to_thread(fragile.start)
        await recovers(doomed)

    async def test_a_frozen_server_is_left_all_the_same(self, fragile: Postgres) -> None:
        """It is told goodbye, and not waited for: a stop would never end."""
        fragile.start()
        database = Database(DatabaseAddress(fragile.url()))
        await database.ping(limit=timedelta(seconds=20))
        fragile.suspend()
        try:
            async with asyncio.timeout(20):
                await database.close()
        finally:
            fragile.resume()

    async def test_two_tries_fit_into_the_time_of_one_answer(self, fragile: Postgres) -> None:
        """Connecting to a frozen server takes its full time-out, and is tried twice."""
        fragile.start()
        async with replica(fragile.url(), is_strict=True) as one:
            fragile.suspend()
            try:
                assert NOT_DURABLE == await timed(one.outcome(make_body()))
            finally:
                fragile.resume()
            await recovers(one)


@pytest.fixture(name="path")
def _path(sqlite_url: str) -> Path:
    return Path(sqlite_url.removeprefix("sqlite:///"))


WRITER = """
import asyncio, sys
from tests.factories import make_body
from tests.replicas import replica

async def main(url, pace, count):
    async with replica(url) as one:
        print("ready", flush=True)
        sys.stdin.readline()
        pending = []
        for _ in range(count):
            pending.append(asyncio.create_task(one.record(make_body())))
            await asyncio.sleep(pace)
        await asyncio.gather(*pending)

asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
"""

# Says which events are acknowledged, as soon as they are.
TELLER = """
import asyncio, sys, uuid
import structlog
from tests.factories import make_body
from tests.replicas import replica

async def tell(one):
    while True:
        event_id = uuid.uuid4().hex
        await one.record(make_body(event_id=event_id))
        print(event_id, flush=True)

async def main(url):
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    async with replica(url) as one:
        print("ready", flush=True)
        sys.stdin.readline()
        await asyncio.gather(*(tell(one) for _ in range(8)))

asyncio.run(main(sys.argv[1]))
"""

HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python program, and wait for the line that says it is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def release(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()


class TestSqlite:
    async def test_two_processes_and_a_reader_see_no_lock_errors(
        self, sqlite_url: str, path: Path
    ) -> None:
        """Two hundred events a second together; any error ends its process."""
        writers = [
            await asyncio.to_thread(start, WRITER, sqlite_url, "0.01", "200") for _ in range(2)
        ]
        with closing(sqlite3.connect(path, timeout=0)) as reader:
            # Whoever is the first to open a file has it for itself for a moment.
            seen = [reader.execute("SELECT count(*) FROM events").fetchone()[0]]
            for writer in writers:
                release(writer)
            while any(writer.poll() is None for writer in writers):
                seen.append(reader.execute("SELECT count(*) FROM events").fetchone()[0])
                await asyncio.sleep(0.01)

            assert (400,) == reader.execute("SELECT count(*) FROM events").fetchone()

        for writer in writers:
            with writer:
                assert 0 == writer.wait()
        assert sorted(seen) == seen

    async def test_a_lock_held_for_nearly_three_seconds_is_waited_for(
        self, sqlite_url: str, path: Path
    ) -> None:
        answer: object = NOT_DURABLE
        async with replica(sqlite_url, is_strict=True) as one:
            # On a busy machine it may be held for longer than is meant here.
            for _ in range(5):
                with await asyncio.to_thread(start, HOLDER, str(path)) as holder:
                    waiting = asyncio.create_task(one.outcome(make_body()))
                    asyncio.get_running_loop().call_later(2.8, release, holder)
                    answer = await timed(waiting)
                if answer == RECORDED:
                    break

        assert RECORDED == answer

    async def test_a_lock_that_stays_held_is_not_durable_in_time(
        self, sqlite_url: str, path: Path
    ) -> None:
        async with replica(sqlite_url, is_strict=True) as one:
            with await asyncio.to_thread(start, HOLDER, str(path)) as holder:
                assert NOT_DURABLE == await timed(one.outcome(make_body()))
                # Readers are not in the way of anybody, and nobody is in theirs.
                await one.database.ping(limit=timedelta(seconds=20))
                release(holder)

            await recovers(one)

    async def test_a_file_that_became_read_only_is_not_durable(self, sqlite_url: str) -> None:
        """The same error as on a read-only file system, for which one would have to be root."""
        async with replica(sqlite_url) as one:

            def forbid(connection: sqlite3.Connection, *_: object) -> None:
                connection.execute("PRAGMA query_only = ON").close()

            event.listen(one.database.writer.engine, "checkout", forbid)
            assert NOT_DURABLE == await timed(one.outcome(make_body()))

            event.remove(one.database.writer.engine, "checkout", forbid)
            await one.database.close()
            assert RECORDED == await timed(one.outcome(make_body()))

    async def test_a_full_disk_is_not_durable(self, sqlite_url: str) -> None:
        """The same error as on a disk without room: the file may have no further page."""
        async with replica(sqlite_url) as one:
            await one.record(make_body())
            body = make_body(filler="x" * 200_000)

            def fill(connection: sqlite3.Connection, *_: object) -> None:
                connection.execute("PRAGMA max_page_count = 1").close()

            def clear(connection: sqlite3.Connection, *_: object) -> None:
                connection.execute("PRAGMA max_page_count = 1000000").close()

            event.listen(one.database.writer.engine, "checkout", fill)
            assert NOT_DURABLE == await timed(one.outcome(body))
            assert 1 == await one.count(EVENTS)

            event.remove(one.database.writer.engine, "checkout", fill)
            event.listen(one.database.writer.engine, "checkout", clear)
            assert RECORDED == await timed(one.outcome(body))

    async def test_a_directory_that_is_gone_is_not_durable(self, tmp_path: Path) -> None:
        async with replica(f"sqlite:///{tmp_path}/gone/receiver.db") as one:
            assert NOT_DURABLE == await timed(one.outcome(make_body()))

    async def test_a_database_without_tables_is_not_durable(self, tmp_path: Path) -> None:
        async with replica(f"sqlite:///{tmp_path}/new.db") as one:
            assert NOT_DURABLE == await timed(one.outcome(make_body()))

    async def test_a_reader_who_stays_does_not_leave_a_large_log_behind(
        self, sqlite_url: str, path: Path
    ) -> None:
        """While it reads, the log must keep everything; afterwards it is as small as it was."""
        log = path.with_name(f"{path.name}-wal")
        async with replica(sqlite_url) as one:
            with closing(sqlite3.connect(path, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM events").fetchone()
                while log.stat().st_size < LOG_CAP + 1024 * 1024:
                    assert RECORDED == await one.outcome(make_body(filler="x" * 4_000_000))
                reader.execute("ROLLBACK")

            for _ in range(4):
                assert RECORDED == await one.outcome(make_body())

            assert log.stat().st_size <= LOG_CAP

    async def test_kills_in_the_middle_of_commits_lose_nothing(
        self, sqlite_url: str, path: Path
    ) -> None:
        dice = random.Random(142)
        acknowledged: set[str] = set()
        for _ in range(KILLS):
            teller = await asyncio.to_thread(start, TELLER, sqlite_url)
            with teller:
                release(teller)
                assert teller.stdout is not None
                told = await asyncio.to_thread(teller.stdout.readline)
                await asyncio.sleep(dice.uniform(0.0, 0.3))
                teller.kill()
                told += await asyncio.to_thread(teller.stdout.read)
            # What was cut off in the middle of its line was not said.
            acknowledged.update(told.rpartition("\n")[0].split())

        with closing(sqlite3.connect(path)) as reader:
            assert [("ok",)] == reader.execute("PRAGMA integrity_check").fetchall()
            assert [] == reader.execute("PRAGMA foreign_key_check").fetchall()
            stored = {row[0] for row in reader.execute("SELECT atlas_event_id FROM events")}
        assert acknowledged
        assert acknowledged <= stored


async def test_a_missing_database_is_not_durable(postgres_url: str) -> None:
    async with replica(replace_database(postgres_url, "nowhere")) as one:
        assert NOT_DURABLE == await timed(one.outcome(make_body()))
