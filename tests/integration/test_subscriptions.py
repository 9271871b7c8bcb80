"""Who is owed an event, remembered between two looks at the table."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import structlog
from sqlalchemy import Table

from app.intake import Subscriptions
from app.store import callbacks
from app.store.callbacks import Subscription
from app.store.models import CallbackRow
from app.store.session import Database, DatabaseAddress
from tests.replicas import eventually, execute
from tests.said import said

CALLBACKS: Table = CallbackRow.__table__  # type: ignore[assignment]


@pytest.fixture(name="database")
async def _database(database_url: str) -> AsyncIterator[Database]:
    database = Database(DatabaseAddress(database_url))
    yield database
    await database.close()


async def register(database: Database, *subscriptions: Subscription) -> None:
    async with database.begin(limit=timedelta(seconds=5)) as connection:
        await callbacks.register(connection, subscriptions)


async def test_what_is_registered_is_owed_from_the_next_look_on(database: Database) -> None:
    known = Subscriptions(database)
    await known.refresh()
    assert () == known.names_for("envelope.signed", "acme")

    await register(
        database,
        Subscription("all", ("*",)),
        Subscription("one", ("envelope.signed",), "acme"),
        Subscription("own", ("receiver.*",)),
    )
    assert () == known.names_for("envelope.signed", "acme")
    await known.refresh()

    assert ("all", "one") == known.names_for("envelope.signed", "acme")
    assert ("all",) == known.names_for("envelope.signed", "globex")
    assert ("own",) == known.names_for("receiver.conflict", "acme")


async def test_an_unchanged_table_is_not_thought_over(database: Database) -> None:
    await register(database, Subscription("all", ("*",)))
    known = Subscriptions(database)
    await known.refresh()
    known.names_for("envelope.signed", "acme")

    await known.refresh()

    assert [("envelope.signed", "acme")] == list(known._state[1])


async def test_endless_types_do_not_fill_the_memory(database: Database) -> None:
    await register(database, Subscription("all", ("*",)))
    known = Subscriptions(database)
    await known.refresh()

    for n in range(5000):
        assert ("all",) == known.names_for(f"made.up.{n}", "acme")

    assert len(known._state[1]) <= 1024


async def test_the_loop_outlives_a_table_that_cannot_be_read(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Subscriptions(database, every=timedelta(milliseconds=10))
    refresh, looks = known.refresh, list[None]()

    async def counted() -> None:
        looks.append(None)
        await refresh()

    monkeypatch.setattr(known, "refresh", counted)
    with structlog.testing.capture_logs() as lines:
        await execute(database, "ALTER TABLE callbacks RENAME TO away")
        running = asyncio.create_task(known.run())
        await eventually(lambda: lines)
        before = len(looks)
        # Those between have failed as well, and are not told of.
        await eventually(lambda: len(looks) > before + 2)

        await execute(database, "ALTER TABLE away RENAME TO callbacks")
        await register(database, Subscription("all", ("*",)))
        await eventually(lambda: known.names_for("envelope.signed", "acme"))

    running.cancel()
    assert ["subscriptions.delayed"] == said(lines, "subscriptions")
