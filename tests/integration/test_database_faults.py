"""A database in trouble: the answer is a receipt or `NotDurable`, in time, and it is true.

After each fault: what was acknowledged is there, once; what was sent again is a duplicate.
"""

import asyncio
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import event

from app.intake import IntakeLimits
from app.store.migrations import migrate
from tests.factories import make_body
from tests.postgres import Postgres, replace_database
from tests.proxy import Trap, proxy
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
    async with replica(fragile.url(), account=uuid.uuid4().hex) as one:
        yield one
        fragile.resume()
        fragile.start()


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
        again = await self._one.together(*self.told)
        for body, answer in zip(self.told, again, strict=True):
            assert answer == DUPLICATE if body in acknowledged else answer in {DUPLICATE, RECORDED}
        assert len(self.told) == await self._one.count(EVENTS)
        assert len(self.told) == await self._one.count(ENVELOPES)
        assert 2 * len(self.told) == await self._one.count(DELIVERIES)


class TestLostReplies:
    async def test_a_commit_whose_reply_is_lost_is_found_by_the_next_try(
        self, postgres_url: str
    ) -> None:
        async with proxy(postgres_url) as (wire, url), replica(url) as one:
            await one.record(make_body())
            body = make_body(event_id="e1")
            wire.trap = Trap.RESET

            assert RECORDED == await timed(one.outcome(body))

            assert 1 == wire.sprung
            assert DUPLICATE == await one.outcome(body)
            assert 2 == await one.count(EVENTS)
            assert 4 == await one.count(DELIVERIES)

    async def test_a_commit_whose_reply_never_comes_is_not_durable_and_then_a_duplicate(
        self, postgres_url: str
    ) -> None:
        soon = IntakeLimits(transaction=timedelta(seconds=1))
        async with proxy(postgres_url) as (wire, url), replica(url, limits=soon) as one:
            await one.record(make_body())
            body = make_body(event_id="e1")
            wire.trap = Trap.STALL

            assert NOT_DURABLE == await timed(one.outcome(body))

            assert 1 == wire.sprung
            assert DUPLICATE == await timed(one.outcome(body))
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

    async def test_without_a_free_connection_the_answer_comes_in_time(self, one: Replica) -> None:
        async with AsyncExitStack() as held:
            for _ in range(4):
                begin = one.database.begin(limit=timedelta(seconds=60))
                await held.enter_async_context(begin)

            assert NOT_DURABLE == await timed(one.outcome(make_body()))

        assert RECORDED == await timed(one.outcome(make_body()))

    async def test_a_locked_role_is_not_durable_and_nothing_else(self, doomed: Replica) -> None:
        """Without its role the service is down; it must not look like a refusal of the sender."""
        admin = await asyncpg.connect(doomed.database.address.url)
        role = f"role_{uuid.uuid4().hex}"
        await admin.execute(f"CREATE ROLE {role} SUPERUSER LOGIN")
        url = doomed.database.address.url.replace("postgres@", f"{role}:old@")
        async with replica(url) as locked:
            assert RECORDED == await locked.outcome(make_body())
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


class TestTheServer:
    async def test_a_frozen_server_is_answered_for_and_recovers(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        await doomed.record(make_body())
        bodies = [make_body() for _ in range(10)]
        fragile.suspend()

        answers = await timed(doomed.together(*bodies))
        fragile.resume()

        assert [NOT_DURABLE] * 10 == answers
        await recovers(doomed)
        assert {RECORDED, DUPLICATE} >= set(await doomed.together(*bodies))
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

    async def test_a_server_that_is_away_is_not_durable_at_once(
        self, doomed: Replica, fragile: Postgres
    ) -> None:
        await doomed.record(make_body())
        await asyncio.to_thread(fragile.kill)

        assert [NOT_DURABLE] * 3 == [await timed(doomed.outcome(make_body())) for _ in range(3)]

        await asyncio.to_thread(fragile.start)
        await recovers(doomed)

    async def test_two_tries_fit_into_the_time_of_one_answer(self, fragile: Postgres) -> None:
        """Connecting to a frozen server takes its full time-out, and is tried twice."""
        fragile.start()
        async with replica(fragile.url()) as one:
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
        for writer in writers:
            release(writer)

        seen = [0]
        with closing(sqlite3.connect(path, timeout=0)) as reader:
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
        async with replica(sqlite_url) as one:
            with await asyncio.to_thread(start, HOLDER, str(path)) as holder:
                waiting = asyncio.create_task(one.outcome(make_body()))
                asyncio.get_running_loop().call_later(2.8, release, holder)

                assert RECORDED == await timed(waiting)

    async def test_a_lock_that_stays_held_is_not_durable_in_time(
        self, sqlite_url: str, path: Path
    ) -> None:
        async with replica(sqlite_url) as one:
            with await asyncio.to_thread(start, HOLDER, str(path)) as holder:
                assert NOT_DURABLE == await timed(one.outcome(make_body()))
                # Readers are not in the way of anybody, and nobody is in theirs.
                await one.database.ping()
                release(holder)

            await recovers(one)

    async def test_a_file_that_became_read_only_is_not_durable(self, sqlite_url: str) -> None:
        """The same error as on a read-only file system, for which one would have to be root."""
        async with replica(sqlite_url) as one:

            def forbid(connection: sqlite3.Connection, *_: object) -> None:
                connection.execute("PRAGMA query_only = ON").close()

            event.listen(one.database.engine.sync_engine, "checkout", forbid)
            assert NOT_DURABLE == await timed(one.outcome(make_body()))

            event.remove(one.database.engine.sync_engine, "checkout", forbid)
            await one.database.close()
            assert RECORDED == await timed(one.outcome(make_body()))

    async def test_a_directory_that_is_gone_is_not_durable(self, tmp_path: Path) -> None:
        async with replica(f"sqlite:///{tmp_path}/gone/receiver.db") as one:
            assert NOT_DURABLE == await timed(one.outcome(make_body()))

    async def test_a_database_without_tables_is_not_durable(self, tmp_path: Path) -> None:
        async with replica(f"sqlite:///{tmp_path}/new.db") as one:
            assert NOT_DURABLE == await timed(one.outcome(make_body()))


async def test_a_missing_database_is_not_durable(postgres_url: str) -> None:
    async with replica(replace_database(postgres_url, "nowhere")) as one:
        assert NOT_DURABLE == await timed(one.outcome(make_body()))
