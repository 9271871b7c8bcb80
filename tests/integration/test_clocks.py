"""Clocks that jump, and zones with summer time: waits keep their length, times are UTC."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.callbacks import Callbacks, Event
from app.settings import Settings
from app.store.session import Database, DatabaseAddress
from app.wiring import Services
from tests.acceptance.service import KEY
from tests.acceptance.tables import rows
from tests.factories import make_body
from tests.faults import victims
from tests.integration.ledger import Ledger, until

TEN_MINUTES = timedelta(minutes=10)


class Clock:
    """The clock on the wall of this process; the database has a clock of its own."""

    def __init__(self) -> None:
        self.offset = timedelta()

    def jump(self, by: timedelta) -> None:
        self.offset += by


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every module of the service asks this clock; what measures waits does not."""
    clock, seconds, nanoseconds = Clock(), time.time, time.time_ns

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + clock.offset

    for name, module in list(sys.modules.items()):
        if name.startswith("app.") and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", Shifted)
    monkeypatch.setattr(time, "time", lambda: seconds() + clock.offset.total_seconds())
    shift = timedelta(microseconds=1)
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + clock.offset // shift * 1000)
    return clock


@pytest.fixture(name="services")
async def _services(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Services]:
    """A whole process, with callbacks that succeed, fail once, and fail for good."""
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    values: dict[str, Any] = {
        "database_url": database_url,
        "atlas_api_key": KEY,
        "callbacks": f"{victims.__name__}:callbacks",
    }
    services = Services(Settings(_env_file=None, **values), takes_webhooks=True, works=True)  # type: ignore[call-arg]
    await services.start()
    yield services
    await services.stop()


class TestAJump:
    async def test_stops_nothing_and_loses_nothing(
        self, services: Services, database_url: str, clock: Clock
    ) -> None:
        """Ten minutes back, and later twenty ahead, while events are taken and delivered."""
        await until(lambda: len(services.subscriptions._state[0]) == len(victims.callbacks))
        for by in (timedelta(), -TEN_MINUTES, 2 * TEN_MINUTES):
            clock.jump(by)
            bodies = [make_body() for _ in range(4)]
            taken = (services.record(b, account="default", key_label="main") for b in bodies)
            receipts = await asyncio.wait_for(asyncio.gather(*taken), 10)
            assert {"recorded"} == {receipt.outcome for receipt in receipts}

        expected = {("steady", "done", 12), ("shaky", "done", 12), ("hopeless", "dead", 12)}
        query = "SELECT callback, state, count(*) FROM deliveries GROUP BY callback, state"
        await until(lambda: expected == set(rows(database_url, query)))
        # Everything has its place in the feed, also what seems to be older than the rest.
        await until(lambda: [] == rows(database_url, "SELECT 1 FROM changes LIMIT 1"))

        async def is_ready() -> bool:
            return {"ok"} == set((await services.probe()).values())

        await until(is_ready)

    async def test_ends_no_lease_and_no_timeout(self, ledger: Ledger, clock: Clock) -> None:
        """A call that takes longer than its lease goes on, and is not run twice."""
        calls: list[int] = []
        callbacks = Callbacks()

        @callbacks.on("*", name="file", timeout=20)
        async def file(event: Event) -> None:
            calls.append(event.attempt)
            for by in (-TEN_MINUTES, 2 * TEN_MINUTES):
                clock.jump(by)
                await asyncio.sleep(2)

        await ledger.owe_one()

        # As long as a busy machine may take to renew it.
        with ledger.dispatching(callbacks, lease=timedelta(seconds=3)):
            await until(lambda: self.is_done(ledger))

        assert [1] == calls

    @staticmethod
    async def is_done(ledger: Ledger) -> bool:
        return ["done"] == await ledger.states()


@pytest.fixture(name="zone", params=["Europe/Berlin", "America/St_Johns"])
def _zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The zone of the host, whatever it is."""
    zone: str = request.param
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        yield zone
    time.tzset()


class TestAZone:
    async def test_of_the_host_changes_no_time(self, ledger: Ledger, zone: str) -> None:
        assert zone
        await ledger.register("file")
        delivery_id = await ledger.owe_one()

        (claim,) = await ledger.claim(lease=timedelta(hours=1))

        delivery = await ledger.delivery(delivery_id)
        assert delivery_id == claim.id
        assert delivery.due_at is not None
        left = delivery.due_at - datetime.now(UTC)
        assert timedelta(minutes=55) < left < timedelta(minutes=65)

    @pytest.mark.parametrize("way", ["direct", "pooler"])
    async def test_of_the_database_makes_no_day_longer(self, postgres_url: str, way: str) -> None:
        """In the night of the 25th a day in Berlin has 25 hours; a wait of a day has not."""
        name = postgres_url.rpartition("/")[2]
        admin = await asyncpg.connect(postgres_url)
        await admin.execute(f"ALTER DATABASE \"{name}\" SET timezone = 'Europe/Berlin'")
        await admin.close()
        address = DatabaseAddress(postgres_url)
        database = Database(replace(address, pgbouncer=way == "pooler"))
        noon = datetime(2026, 10, 24, 12, tzinfo=UTC)

        async with database.begin(limit=timedelta(seconds=10)) as connection:
            query = "SELECT $1::timestamptz + $2::interval"
            answer = await connection.exec_driver_sql(query, (noon, timedelta(days=1)))
            due = answer.scalar()

        await database.close()
        assert noon + timedelta(days=1) == due
