"""One process tells another that something is due: a hint that may be missed, never a fault."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import asyncpg
import pytest
import structlog

from app.callbacks import Callbacks, Event
from app.dispatch.listening import listen_for_ever
from app.intake import Announcer
from app.store import wakeups
from app.store.session import DatabaseAddress
from tests.integration.ledger import Ledger, until
from tests.integration.test_dispatch import all_are
from tests.said import said

NEVER = timedelta(minutes=10)


@pytest.fixture(name="ledger")
async def _ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    yield ledger
    await ledger.database.close()


class Ear:
    """Counts what is heard."""

    def __init__(self) -> None:
        self.heard = 0

    def __call__(self) -> None:
        self.heard += 1


@asynccontextmanager
async def running(task: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def announce(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        await wakeups.announce(connection, schema=ledger.address.schema)


async def end_sessions_that_listen(ledger: Ledger) -> None:
    await ledger.change(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND query LIKE 'LISTEN %'"
    )


class TestListening:
    async def test_hears_what_another_connection_announces(self, ledger: Ledger) -> None:
        ear = Ear()

        async with running(asyncio.create_task(listen_for_ever(ledger.address, ear))):
            await until(lambda: ear.heard >= 1)
            await announce(ledger)

            await until(lambda: ear.heard >= 2)

    async def test_looks_once_at_the_beginning(self, ledger: Ledger) -> None:
        """What was announced while nobody listened is due all the same."""
        ear = Ear()

        async with running(asyncio.create_task(listen_for_ever(ledger.address, ear))):
            await until(lambda: ear.heard >= 1)

    async def test_does_not_hear_another_installation(self, ledger: Ledger) -> None:
        ear = Ear()

        async with running(asyncio.create_task(listen_for_ever(ledger.address, ear))):
            await until(lambda: ear.heard >= 1)
            async with ledger.transaction() as connection:
                await wakeups.announce(connection, schema="another")
            await announce(ledger)
            await until(lambda: ear.heard >= 2)

        assert 2 == ear.heard

    async def test_begins_again_after_its_session_was_ended(self, ledger: Ledger) -> None:
        ear = Ear()
        listening = listen_for_ever(ledger.address, ear, pause=0.01)

        with structlog.testing.capture_logs() as lines:
            async with running(asyncio.create_task(listening)):
                await until(lambda: ear.heard >= 1)
                await end_sessions_that_listen(ledger)
                await until(lambda: ear.heard >= 2)

        assert ["wakeups.resumed"] == said(lines, "wakeups")

    async def test_says_once_that_it_cannot_and_goes_on_trying(self) -> None:
        nowhere = DatabaseAddress("postgresql://127.0.0.1:1/nowhere")
        ear = Ear()

        with structlog.testing.capture_logs() as lines:
            async with running(asyncio.create_task(listen_for_ever(nowhere, ear, pause=0.001))):
                await until(lambda: said(lines, "wakeups"))
                await asyncio.sleep(0.2)

        assert ["wakeups.interrupted"] == said(lines, "wakeups")
        assert 0 == ear.heard

    async def test_survives_an_error_of_who_is_woken(self, ledger: Ledger) -> None:
        """Fault 132: the driver calls us, and what we raise must not end its connection."""
        heard: list[str] = []

        def fail() -> None:
            heard.append("heard")
            if len(heard) == 2:
                raise RuntimeError("not now")

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        try:
            async with running(asyncio.create_task(listen_for_ever(ledger.address, fail))):
                await until(lambda: len(heard) == 1)
                await announce(ledger)
                await until(lambda: len(heard) == 2)
                await announce(ledger)
                await until(lambda: len(heard) == 3)
        finally:
            loop.set_exception_handler(None)

    async def test_survives_an_error_that_is_not_the_databases(self, ledger: Ledger) -> None:
        heard: list[str] = []

        def fail_at_first() -> None:
            heard.append("heard")
            if len(heard) < 4:
                raise RuntimeError("not now")

        listening = listen_for_ever(ledger.address, fail_at_first, pause=0.001)
        with structlog.testing.capture_logs() as lines:
            async with running(asyncio.create_task(listening)):
                await until(lambda: len(heard) == 4)

        assert ["wakeups.interrupted", "wakeups.resumed"] == said(lines, "wakeups")
        assert "RuntimeError: not now" in lines[0]["error"]

    async def test_asks_a_quiet_connection_whether_it_is_there(self, ledger: Ledger) -> None:
        ear = Ear()
        listening = wakeups.listen(ledger.address, ear, quiet=timedelta(milliseconds=20))

        async with running(asyncio.create_task(listening)):
            await until(lambda: was_asked(ledger))
            await announce(ledger)

            await until(lambda: ear.heard >= 2)


async def was_asked(ledger: Ledger) -> bool:
    connection = await asyncpg.connect(ledger.address.dsn)
    try:
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'SELECT 1' AND state = 'idle'"
        )
    finally:
        await connection.close()
    return bool(found)


class TestAnnouncer:
    async def test_tells_once_for_all_that_gather(self, ledger: Ledger) -> None:
        ear, announcer = Ear(), Announcer(ledger.database)

        async with (
            running(asyncio.create_task(listen_for_ever(ledger.address, ear))),
            running(asyncio.create_task(announcer.run())),
        ):
            await until(lambda: ear.heard >= 1)
            for _ in range(1000):
                announcer.announce()
            await until(lambda: ear.heard >= 2)
            announcer.announce()
            await until(lambda: ear.heard >= 3)

        assert 3 == ear.heard

    async def test_goes_on_after_a_database_that_was_away(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ear, announcer = Ear(), Announcer(ledger.database)
        failures = iter([TimeoutError(), OSError()])

        async def refuse(*_: object, **__: object) -> None:
            if (error := next(failures, None)) is not None:
                announcer.announce()
                raise error
            monkeypatch.undo()
            announcer.announce()

        monkeypatch.setattr("app.intake.announcement.announce", refuse)
        with structlog.testing.capture_logs() as lines:
            async with (
                running(asyncio.create_task(listen_for_ever(ledger.address, ear))),
                running(asyncio.create_task(announcer.run())),
            ):
                await until(lambda: ear.heard >= 1)
                announcer.announce()
                await until(lambda: ear.heard >= 2)

        assert ["wakeups.unsent"] == said(lines, "wakeups")


class TestDispatcher:
    async def test_delivers_at_once_what_another_process_made_due(self, ledger: Ledger) -> None:
        """With a poll that would come much too late."""
        callbacks, seen = Callbacks(), list[str]()

        @callbacks.on("*", name="file")
        async def file(event: Event) -> None:
            seen.append(event.delivery_id)

        with ledger.dispatching(
            callbacks, listens_at=ledger.address, poll=NEVER, sweep_every=NEVER
        ) as dispatcher:
            await until(lambda: dispatcher.counts().get("claimed") == 0)
            await ledger.owe("file")
            await until(lambda: announced_and_seen(ledger, seen))
            await until(lambda: all_are(ledger, "done"))

        assert 1 == len(seen)


async def announced_and_seen(ledger: Ledger, seen: list[str]) -> bool:
    # Again and again: the dispatcher may not be listening yet.
    await announce(ledger)
    return bool(seen)
