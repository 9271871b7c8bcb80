"""Two servers: what a standby that takes over has, what it lacks, and who says so.

Nothing is ever decided by what a standby says: no connection of the service is to one.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pytest
import structlog

from app.store.migrations import migrate
from app.store.session import Database, DatabaseAddress, DatabaseError, takes_no_writes
from app.upkeep.succession import Succession
from tests.acceptance.service import KEY, Service, run
from tests.factories import make_body
from tests.faults.proxy import Proxy, proxy_aside
from tests.postgres import Postgres, Standby
from tests.replicas import EVENTS, NOT_DURABLE, Replica, eventually, replica

RECORDED, DUPLICATE = "recorded", "duplicate"
RETURNED = 20


class Pair:
    """A primary, a standby that follows it, and the wire between them."""

    def __init__(self, primary: Postgres, standby: Standby, wire: Proxy) -> None:
        self.primary = primary
        self.standby = standby
        self.wire = wire
        # As an operator names both: whoever takes writes is the one.
        both = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        self.url = f"postgresql://postgres@{both}/postgres"

    async def wait_for_commits(self) -> None:
        """Let a commit last until the standby has it, too."""
        admin = await asyncpg.connect(self.primary.url())
        await admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await admin.execute("SELECT pg_reload_conf()")
        query = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        await eventually(lambda: admin.fetchval(query))
        await admin.close()

    async def catch_up(self) -> None:
        """Wait until the standby has everything."""
        admin = await asyncpg.connect(self.primary.url())
        position = await admin.fetchval("SELECT pg_current_wal_lsn()")
        query = "SELECT 1 FROM pg_stat_replication WHERE replay_lsn >= $1::pg_lsn"
        await eventually(lambda: admin.fetchval(query, position))
        await admin.close()

    async def fail_over(self) -> None:
        """The primary dies, and the standby takes its place."""
        await asyncio.to_thread(self.primary.kill)
        await asyncio.to_thread(self.standby.promote)


@pytest.fixture(name="pair")
def _pair() -> Iterator[Pair]:
    with Postgres() as primary:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, migrate(primary.url())).result()
        with (
            proxy_aside(primary.url()) as (wire, _),
            Standby(primary, port=wire.port) as standby,
        ):
            yield Pair(primary, standby, wire)


@pytest.fixture(name="one")
async def _one(pair: Pair) -> AsyncIterator[Replica]:
    async with replica(pair.url, is_strict=True) as one:
        yield one


async def recovers(one: Replica) -> None:
    async def is_recorded() -> bool:
        return await one.outcome(make_body(), account="probe") == RECORDED

    await eventually(is_recorded, within=RETURNED)


class TestPromotion:
    async def test_of_one_that_lags_loses_what_it_lacks_and_a_second_try_brings_it_back(
        self, pair: Pair, one: Replica
    ) -> None:
        """The price of an asynchronous standby: a 200 for what only the dead server had."""
        early, late = [[make_body() for _ in range(3)] for _ in range(2)]
        assert [RECORDED] * 3 == await one.in_turn(*early)
        await pair.catch_up()
        pair.wire.stall()
        assert [RECORDED] * 3 == await one.in_turn(*late)

        await pair.fail_over()
        await recovers(one)

        assert 3 == await one.count(EVENTS)
        assert [DUPLICATE] * 3 + [RECORDED] * 3 == await one.in_turn(*early, *late)

    async def test_of_one_that_commits_wait_for_loses_nothing(
        self, pair: Pair, one: Replica
    ) -> None:
        early, late = [[make_body() for _ in range(3)] for _ in range(2)]
        await pair.wait_for_commits()
        assert [RECORDED] * 3 == await one.in_turn(*early)
        pair.wire.stall()
        assert [NOT_DURABLE] * 3 == await one.together(*late)

        await pair.fail_over()
        await recovers(one)

        assert [DUPLICATE] * 3 + [RECORDED] * 3 == await one.in_turn(*early, *late)
        assert 6 == await one.count(EVENTS)

    async def test_is_noticed(self, pair: Pair) -> None:
        """The tables look as they should: nothing else would say that something may be lost."""
        database = Database(DatabaseAddress(pair.url))
        succession = Succession(database)
        await succession.look()
        await pair.fail_over()
        await database.close()

        with structlog.testing.capture_logs() as lines:
            await succession.look()
            await succession.look()

        await database.close()
        said = [(line["event"], line["was"], line["timeline"]) for line in lines]
        assert [("database.succeeded", "00000001", "00000002")] == said
        assert 1 == succession.seen


class TestStandby:
    @pytest.mark.parametrize("asked", ["", "?target_session_attrs=any"])
    async def test_is_not_taken_for_the_database(self, pair: Pair, asked: str) -> None:
        """Neither by who connects, nor by who was led there, as behind a pooler."""
        database = Database(DatabaseAddress(pair.standby.url() + asked))

        with pytest.raises(DatabaseError) as refusal:
            await database.ping()

        await database.close()
        assert takes_no_writes(refusal.value)

    def test_means_not_ready_until_it_is_promoted(self, pair: Pair, tmp_path: Path) -> None:
        url = pair.standby.url()
        checked = run("check", DATABASE_URL=url)
        service = Service("serve", home=tmp_path, DATABASE_URL=url)
        try:
            service.start().wait_until(service.is_alive, "alive beside a standby")
            answer = service.get("/readyz")
            first = service.deliver(make_body(), KEY).status
            pair.standby.promote()
            service.wait_until_ready()
            then = service.deliver(make_body(), KEY).status
        finally:
            service.kill()

        assert 1 == checked.returncode
        assert "name the primary in DATABASE_URL" in checked.stdout
        assert (503, "takes no writes") == (answer.status, answer.json()["checks"]["database"])
        assert (503, 200) == (first, then)
        assert "standby" in service.lines("service.not_ready")[0]["obstacle"]


async def test_a_server_that_does_not_tell_its_timeline_is_asked_once(postgres_url: str) -> None:
    """Hosted servers may forbid the question; that must not make anybody unready."""
    admin = await asyncpg.connect(postgres_url)
    role = f"role_{uuid.uuid4().hex}"
    await admin.execute(f"CREATE ROLE {role} LOGIN")
    await admin.execute("REVOKE EXECUTE ON FUNCTION pg_current_wal_lsn() FROM PUBLIC")
    database = Database(DatabaseAddress(postgres_url.replace("postgres@", f"{role}@")))
    succession = Succession(database)

    await succession.look()

    await database.close()
    await admin.execute(f"DROP ROLE {role}")
    await admin.close()
    assert succession._is_untold
