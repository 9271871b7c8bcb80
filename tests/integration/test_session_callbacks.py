"""Callbacks with a session: what they write happens exactly once, whatever dies when."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from app.callbacks import Callbacks, Event, GiveUp
from app.dispatch import transaction
from app.errors import TransactionRefused
from app.store.dialects import SQLITE_NOW
from app.store.session import DatabaseAddress
from app.store.sessions import AuthorSession, AuthorSessions
from tests.integration.ledger import Ledger, until
from tests.integration.test_dispatch import all_are, lines, working

SHORT = timedelta(milliseconds=300)
WRITE = "INSERT INTO notes (delivery_id) VALUES (:id)"

Write = Callable[[AsyncSession, Event], Awaitable[object]]


@pytest.fixture(autouse=True)
def _time_for_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a transaction of a second is too long, a few attempts are a minute of back-off."""
    monkeypatch.setattr("app.store.sessions.SQLITE_LIMIT", timedelta(seconds=20))


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    """With a table of the author's own, in the author's own schema."""
    ledger = Ledger(database_url)
    await run(ledger, "CREATE TABLE IF NOT EXISTS {public}notes (delivery_id text)")
    yield ledger
    await ledger.database.close()


@pytest.fixture(name="postgres_ledger")
async def _postgres_ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    await ledger.change("CREATE TABLE IF NOT EXISTS public.notes (delivery_id text)")
    yield ledger
    await ledger.database.close()


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    return Callbacks()


async def write(session: AsyncSession, event: Event) -> None:
    await session.execute(text(WRITE), {"id": event.delivery_id})


def on(callbacks: Callbacks, body: Write, **options: Any) -> None:
    @callbacks.on("*", name="note", **options)
    async def note(event: Event, session: AsyncSession) -> None:
        await body(session, event)


async def run(ledger: Ledger, statement: str) -> None:
    await ledger.change(written(ledger, statement))


def written(ledger: Ledger, statement: str) -> str:
    """Name the author's table from a session of ours, which looks in its own schema."""
    now = "now()" if ledger.database.is_postgresql else SQLITE_NOW
    return statement.format(public="public." if ledger.database.is_postgresql else "", now=now)


async def elsewhere(ledger: Ledger, statement: str) -> None:
    """Run a statement from the event loop of a callback, on a connection of its own."""
    another = Ledger(ledger.address.url)
    await run(another, statement)
    await another.database.close()


async def notes(ledger: Ledger) -> int:
    async with ledger.transaction() as connection:
        query = text(written(ledger, "SELECT count(*) FROM {public}notes"))
        return int((await connection.execute(query)).scalar_one())


async def error_of(ledger: Ledger) -> str:
    (delivery,) = await ledger.deliveries()
    return delivery.last_error or ""


async def is_running(ledger: Ledger, delivery_id: UUID) -> bool:
    return (await ledger.delivery(delivery_id)).state == "running"


class TestWrites:
    async def test_are_committed_with_the_end_of_the_delivery(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        on(callbacks, write)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)
        assert ["done"] == await ledger.verdicts()

    async def test_of_several_at_once_are_all_there(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        on(callbacks, write)
        for number in range(20):
            await ledger.owe("note", envelope=f"env_{number}")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 20 == await notes(ledger)

    async def test_of_a_failed_attempt_never_happened(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def fail_once(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            if event.attempt == 1:
                raise ValueError("not yet")

        on(callbacks, fail_once, backoff=0.01)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)
        assert ["failed", "done"] == await ledger.verdicts()

    async def test_of_one_that_gives_up_never_happened(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def give_up(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            raise GiveUp("no customer")

        on(callbacks, give_up)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert 0 == await notes(ledger)

    async def test_a_session_that_nobody_used_is_settled_all_the_same(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def nothing(_: AsyncSession, __: Event) -> None: ...

        on(callbacks, nothing)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert ["done"] == await ledger.verdicts()

    async def test_what_where_leaves_out_opens_no_session(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        on(callbacks, write, where=lambda _: False)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert ["skipped"] == await ledger.verdicts()
        assert 0 == await notes(ledger)

    async def test_a_savepoint_may_be_rolled_back(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def try_twice(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            nested = await session.begin_nested()
            await write(session, event)
            await nested.rollback()
            await session.execute(text("SAVEPOINT mine"))
            await write(session, event)
            await session.execute(text("ROLLBACK TO SAVEPOINT mine"))

        on(callbacks, try_twice)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)

    async def test_a_statement_that_fails_undoes_all(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def stumble(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            if event.attempt == 1:
                await session.execute(text("INSERT INTO no_such_table VALUES (1)"))

        on(callbacks, stumble, backoff=0.01)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)

    async def test_a_connection_that_is_lost_undoes_all(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def lose(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            if event.attempt == 1:
                pid = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
                await elsewhere(postgres_ledger, f"SELECT pg_terminate_backend({pid})")

        on(callbacks, lose, backoff=0.01)
        await postgres_ledger.owe("note")

        with postgres_ledger.dispatching(callbacks):
            await until(lambda: all_are(postgres_ledger, "done"))

        assert 1 == await notes(postgres_ledger)

    async def test_the_next_of_the_envelope_comes_at_once(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """The wake-up of what waits behind it is part of the same transaction."""
        seen: list[int | None] = []

        async def note(_: AsyncSession, event: Event) -> None:
            seen.append(event.sequence)

        on(callbacks, note)
        for sequence in (1, 2, 3):
            await ledger.owe_one("note", sequence=sequence)

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert [1, 2, 3] == seen


async def commit(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.commit()


async def roll_back(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.rollback()


async def begin(session: AsyncSession, event: Event) -> None:
    async with session.begin():
        await write(session, event)


async def commit_in_words(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.execute(text(" Commit"))


async def commit_the_connection(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await (await session.connection()).commit()


async def commit_and_catch(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    try:
        await session.commit()
    except TransactionRefused:
        return


async def leave(session: AsyncSession, event: Event) -> None:
    async with session:
        await write(session, event)


async def close(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.close()


async def reset(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.reset()


async def invalidate(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.invalidate()


async def close_and_catch(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    with suppress(TransactionRefused):
        await session.close()


async def roll_its_transaction_back(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.rollback()


async def roll_back_and_begin_another(session: AsyncSession, event: Event) -> None:
    await roll_its_transaction_back(session, event)
    with suppress(TransactionRefused):
        await write(session, event)


async def commit_behind_a_comment(session: AsyncSession, event: Event) -> None:
    await write(session, event)
    await session.execute(text("/* all of it */ -- now\n ; COMMIT"))


async def commit_past_all(session: AsyncSession, event: Event) -> None:
    """As no guard of ours can see it coming."""
    await write(session, event)
    connection = (await session.connection()).sync_connection
    assert connection is not None
    driver: Any = connection.connection.driver_connection
    await driver.execute("COMMIT")


class TestTheEndOfTheTransaction:
    @pytest.mark.parametrize(
        "body, word",
        [
            (leave, "close"),
            (close, "close"),
            (close_and_catch, "close"),
            (reset, "reset"),
            (invalidate, "invalidate"),
            (roll_its_transaction_back, "end of the transaction"),
            (roll_back_and_begin_another, "end of the transaction"),
            (commit_behind_a_comment, "COMMIT"),
            (commit, "commit"),
            (roll_back, "rollback"),
            (begin, "begin"),
            (commit_in_words, "COMMIT"),
            (commit_the_connection, "commit"),
            (commit_and_catch, "commit"),
        ],
    )
    async def test_is_not_the_callbacks_to_decide(
        self, ledger: Ledger, callbacks: Callbacks, body: Write, word: str
    ) -> None:
        on(callbacks, body, max_attempts=1)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert f"TransactionRefused: `{word}` in a session callback" in await error_of(ledger)
        assert 0 == await notes(ledger)

    async def test_by_a_callback_that_then_returns_is_a_failure(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        on(callbacks, commit_past_all, max_attempts=1)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert "another try might do twice" in await error_of(ledger)

    async def test_by_a_callback_that_then_fails_is_not_tried_again(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """What is committed would be done twice."""

        async def fail(session: AsyncSession, event: Event) -> None:
            await commit_past_all(session, event)
            raise ValueError("too late")

        on(callbacks, fail, backoff=0.01)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert 1 == await notes(ledger)
        assert "another try might do twice" in await error_of(ledger)

    async def test_of_a_savepoint_does_not_make_it_longer(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction, "AuthorSessions", impatient)

        async def save_again_and_again(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            while True:
                async with session.begin_nested():
                    await asyncio.sleep(0.05)

        on(callbacks, save_again_and_again, max_attempts=1)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert "open for more than 0.3 s" in await error_of(ledger)

    async def test_is_told_apart_from_a_statement_whose_error_was_swallowed(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def swallow(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            with suppress(DBAPIError):
                await session.execute(text("INSERT INTO no_such_table VALUES (1)"))

        on(callbacks, swallow, max_attempts=1)
        await postgres_ledger.owe("note")

        with postgres_ledger.dispatching(callbacks):
            await until(lambda: all_are(postgres_ledger, "dead"))

        assert "a statement of the callback had failed" in await error_of(postgres_ledger)
        assert 0 == await notes(postgres_ledger)

    async def test_comes_by_force_if_it_stays_open(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction, "AuthorSessions", impatient)

        async def linger(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            await asyncio.sleep(3600)

        on(callbacks, linger, max_attempts=1)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert "open for more than 0.3 s" in await error_of(ledger)
        assert 0 == await notes(ledger)

    async def test_comes_by_force_if_the_callback_swallows_its_cancellation(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Time enough for the other one, also where a commit takes long.
        limit = timedelta(seconds=2)
        patient = partial(AuthorSessions, limit=limit)
        monkeypatch.setattr(transaction, "AuthorSessions", patient)
        others: list[str] = []

        async def cling(session: AsyncSession, event: Event) -> None:
            if event.envelope_id == "other":
                others.append(event.delivery_id)
                await write(session, event)
                return
            await write(session, event)
            end = time.monotonic() + 6
            while time.monotonic() < end:
                try:
                    await asyncio.sleep(end - time.monotonic())
                except asyncio.CancelledError:
                    continue

        on(callbacks, cling, max_attempts=1, ordered=False)
        clinging = await ledger.owe_one("note", envelope="clinging")

        with ledger.dispatching(callbacks):
            await until(lambda: is_running(ledger, clinging))
            await ledger.owe_one("note", envelope="other")
            await until(lambda: all_are_ended(ledger))

        assert ["dead", "done"] == sorted(await ledger.states())
        assert 1 == await notes(ledger)

    async def test_comes_by_force_if_the_callback_blocks_its_event_loop(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On SQLite it holds the lock of all writers, those of the door among them."""
        monkeypatch.setattr(transaction, "AuthorSessions", impatient)

        async def block(session: AsyncSession, event: Event) -> None:
            await write(session, event)
            time.sleep(3)  # noqa: ASYNC251  # the fault under test

        on(callbacks, block, max_attempts=1)
        delivery_id = await ledger.owe_one("note")

        with ledger.dispatching(callbacks):
            await until(lambda: is_running(ledger, delivery_id))
            await run(ledger, "INSERT INTO {public}notes (delivery_id) VALUES ('other')")
            await until(lambda: all_are(ledger, "dead"))

        assert 1 == await notes(ledger)

    async def test_slow_work_before_the_first_use_does_not_count(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction, "AuthorSessions", impatient)

        async def fetch_and_write(session: AsyncSession, event: Event) -> None:
            await asyncio.sleep(0.6)
            await write(session, event)

        on(callbacks, fetch_and_write)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)


def impatient(address: DatabaseAddress) -> AuthorSessions:
    return AuthorSessions(address, limit=SHORT)


async def all_are_ended(ledger: Ledger) -> bool:
    return set(await ledger.states()) <= {"done", "dead"}


class TestTheToken:
    async def test_of_somebody_else_undoes_the_writes(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """The lease ran out, and another worker has claimed the delivery meanwhile."""

        async def lose(session: AsyncSession, event: Event) -> None:
            await asyncio.sleep(0)
            if event.attempt == 1:
                await elsewhere(ledger, "UPDATE deliveries SET token = token + 1, due_at = {now}")
            await write(session, event)

        on(callbacks, lose)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)

    async def test_of_a_discarded_delivery_undoes_the_writes(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        async def discarded(session: AsyncSession, event: Event) -> None:
            await elsewhere(
                ledger,
                "UPDATE deliveries SET state = 'discarded', due_at = NULL, token = token + 1",
            )
            await write(session, event)

        on(callbacks, discarded)
        await ledger.owe("note")

        with ledger.dispatching(callbacks) as dispatcher:
            await until(lambda: dispatcher.counts().get("ended"))

        assert 0 == await notes(ledger)
        assert ["discarded"] == await ledger.states()


class TestTheConnection:
    async def test_is_not_given_to_a_task_that_outlives_the_call(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """It would hold its locks for ever: on SQLite, that of all writers."""
        tasks: list[asyncio.Task[None]] = []

        async def hurry(session: AsyncSession, event: Event) -> None:
            async def later() -> None:
                await asyncio.sleep(0.05)
                await write(session, event)

            tasks.append(asyncio.create_task(later()))

        on(callbacks, hurry)
        await ledger.owe("note")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))
            await until(tasks[0].done)
            await run(ledger, "INSERT INTO {public}notes (delivery_id) VALUES ('other')")

        assert isinstance(tasks[0].exception(), TransactionRefused)
        assert 1 == await notes(ledger)

    async def test_is_given_up_if_a_task_is_just_using_it(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def hurry(session: AsyncSession, event: Event) -> None:
            tasks.append(asyncio.create_task(write(session, event)))
            await asyncio.sleep(0)

        on(callbacks, hurry, max_attempts=1, breaker=None)
        for number in range(12):
            await ledger.owe("note", envelope=f"env_{number}")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are_ended(ledger))
            await run(ledger, "INSERT INTO {public}notes (delivery_id) VALUES ('other')")
            await until(lambda: all(task.done() for task in tasks))

        assert len(await ledger.deliveries()) == len(tasks)
        done = (await ledger.states()).count("done")
        assert done <= await notes(ledger) - 1 <= 12
        for task in tasks:
            task.exception()

    async def test_is_given_up_if_a_task_has_only_asked_for_it(self, ledger: Ledger) -> None:
        """It comes when the call has ended, and nobody would give it back."""
        sessions = AuthorSessions(ledger.address)
        sessions._engine = sessions._new_engine()
        is_asked, may_have_it = asyncio.Event(), asyncio.Event()

        def hesitate(*_: object) -> None:
            is_asked.set()
            await_only(may_have_it.wait())

        event.listen(sessions._engine.sync_engine, "checkout", hesitate)
        asking: list[asyncio.Task[Any]] = []

        async def ask_and_leave() -> None:
            async with sessions.begin() as session:
                asking.append(asyncio.create_task(session.execute(text(WRITE), {"id": "late"})))
                await is_asked.wait()
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await ask_and_leave()
        may_have_it.set()

        with pytest.raises(TransactionRefused):
            await asking[0]
        assert 0 == await notes(ledger)
        await sessions.close()

    async def test_of_two_that_cannot_be_closed_is_left_once(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sessions = AuthorSessions(ledger.address)

        async def fail(_: AuthorSession) -> None:
            raise RuntimeError("another task is in the middle of it")

        async def fail_with_both() -> None:
            async with sessions.begin(), sessions.begin():
                monkeypatch.setattr(AuthorSession, "close", fail)
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await fail_with_both()

        assert sessions._engine is None

    @pytest.mark.parametrize("is_used", [True, False])
    async def test_that_cannot_be_closed_is_cut(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, *, is_used: bool
    ) -> None:
        sessions = AuthorSessions(ledger.address)

        async def fail(_: AuthorSession) -> None:
            raise RuntimeError("another task is in the middle of it")

        async def use_and_fail() -> None:
            async with sessions.begin() as session:
                if is_used:
                    await session.execute(text(WRITE), {"id": "never"})
                monkeypatch.setattr(AuthorSession, "close", fail)
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await use_and_fail()

        monkeypatch.undo()
        await run(ledger, "INSERT INTO {public}notes (delivery_id) VALUES ('other')")
        assert 1 == await notes(ledger)
        await sessions.close()

    async def test_has_nothing_of_the_one_before(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[str] = []

        async def change(session: AsyncSession, _: Event) -> None:
            seen.append((await session.execute(text("SHOW work_mem"))).scalar_one())
            await session.execute(text("SET work_mem = '77MB'"))

        on(callbacks, change, concurrency=1)
        for number in range(3):
            await postgres_ledger.owe("note", envelope=f"env_{number}")

        with postgres_ledger.dispatching(callbacks):
            await until(lambda: all_are(postgres_ledger, "done"))

        assert 1 == len(set(seen))
        assert "77MB" not in seen

    async def test_has_limits_on_the_server_also_through_a_pooler(
        self, postgres_ledger: Ledger
    ) -> None:
        """A callback that blocks its event loop is cut off by the server only."""
        address = replace(postgres_ledger.address, pgbouncer=True)
        sessions = AuthorSessions(address)
        query = text("SHOW idle_in_transaction_session_timeout")

        async with sessions.begin() as session:
            limit = (await session.execute(query)).scalar_one()

        await sessions.close()
        assert "11s" == limit


POINTS = ["before", "written", "returned", "settled", "committed"]


class TestKill:
    @pytest.mark.parametrize("point", POINTS)
    async def test_at_any_point_leaves_one_write(
        self, ledger: Ledger, tmp_path: Path, point: str
    ) -> None:
        """The process is killed at this point of the first attempt; another one goes on."""
        journal = tmp_path / "journal"
        await ledger.owe("file")

        with working(ledger, journal, "--session", "--die", point, "--lease", "2") as process:
            await until(lambda: process.poll() is not None)
        with working(ledger, journal, "--session"):
            await until(lambda: all_are(ledger, "done"))

        assert 1 == await notes(ledger)
        attempts = 1 if point == "committed" else 2
        assert attempts == len(lines(journal))
