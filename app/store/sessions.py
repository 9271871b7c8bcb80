"""Sessions for the code of authors: writes that are committed with the end of a delivery.

The author's code neither begins nor ends the transaction. It begins with the first use of the
session, so that whatever was slow before cost no connection, and it is cut off soon after:
it holds locks, and on SQLite the one that all writers share.
"""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Timer
from typing import Any

from asyncpg import InterfaceError
from sqlalchemy import Connection, PoolProxiedConnection, Transaction, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from app.errors import GiveUp, TransactionRefused
from app.store.session import (
    DatabaseAddress,
    DatabaseError,
    Limits,
    postgresql_engine,
    session_settings,
    set_locally,
    sqlite_engine,
    sqlstate,
)

POSTGRESQL_LIMIT = timedelta(seconds=10)
SQLITE_LIMIT = timedelta(seconds=1)
# Connections for authors, of one event loop.
SIZE = 8
# Who waits for one of them has the time-out of its callback.
_PATIENCE = timedelta(days=1)
# After the cancellation, code has so long to end by itself.
_MERCY = timedelta(milliseconds=500)
_TIMEOUTS = (
    "synchronous_commit",
    "lock_timeout",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
)
_ABORTED = "25P02"

_BEFORE = r"(?:\s|;|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
_ENDS = re.compile(
    _BEFORE + r"(commit|end|abort|rollback(?!.*\bto\b))\b", re.IGNORECASE | re.DOTALL
)
# What outlives a transaction, and would be there for whoever has the connection next.
_LASTS = re.compile(
    _BEFORE + r"(?:set(?!\s+(?:local|transaction|constraints)\b)|reset|listen|discard|load)\b"
    r"|.*\bset_config\b",
    re.IGNORECASE | re.DOTALL,
)
_REMEDY = (
    "the service commits what a callback writes with its session, together with the end of "
    "the delivery: write, and return; raise to undo it"
)
_TOO_LATE = "the session was used after the callback had returned: await the tasks that use it"
# What undoes it.
_RESET = ("RESET ALL", "RESET ROLE", "UNLISTEN *")
# The key of a `_Transaction` in the `info` of its session and of its connection.
_OURS = "atlas_transaction"


class AuthorSession(AsyncSession):
    """What a callback is given: an `AsyncSession` without the right to end its transaction."""


@dataclass(slots=True)
class _Transaction:
    """What is known of the one transaction of a session."""

    # Those of SQLAlchemy, from the first use on.
    root: Transaction | None = None
    pooled: PoolProxiedConnection | None = None
    # What was done that must not be done; whoever catches the error has still lost.
    refusal: TransactionRefused | None = None
    # The task of the call: once it has returned, no other task of its callback goes on.
    task: asyncio.Task[Any] | None = None
    has_returned: bool = False
    is_ending: bool = False
    is_committed: bool = False
    has_ended: bool = False
    # True once something was set that outlives the transaction.
    is_marked: bool = False

    def refuse(self, what: str) -> TransactionRefused:
        """Make the error for an attempt to end what is not the callback's."""
        self.refusal = TransactionRefused(f"`{what}` in a session callback: {_REMEDY}")
        return self.refusal

    @property
    def driver(self) -> Any:
        """The connection of the driver."""
        assert self.pooled is not None  # it was begun
        return self.pooled.driver_connection

    @property
    def was_ended(self) -> bool:
        """True if the database has it no more, although the connection is there."""
        return self.root is not None and _is_in_transaction(self.driver) is False

    @property
    def is_intact(self) -> bool:
        """True if it is under way, as it was begun, or was not begun at all."""
        return self.root is None or (self.root.is_active and not self.was_ended)


class _GuardedSession(Session):
    """The synchronous half of it, where every way to an end comes by."""

    def get_bind(self, *arguments: Any, **options: Any) -> Any:
        """Give nothing any more once the call has ended: nobody would give it back."""
        ours = _of(self)
        if ours.has_ended or (ours.has_returned and asyncio.current_task() is not ours.task):
            raise TransactionRefused(_TOO_LATE)
        return super().get_bind(*arguments, **options)

    def begin(self, nested: bool = False) -> Any:  # noqa: FBT001, FBT002  # as the overridden one has it
        """Allow savepoints."""
        if nested:
            return super().begin(nested=True)
        raise _of(self).refuse("begin")

    def commit(self) -> None:
        """Refuse."""
        self._end("commit", super().commit)

    def rollback(self) -> None:
        """Refuse."""
        raise _of(self).refuse("rollback")

    def close(self) -> None:
        """Refuse, also at the end of `async with session`."""
        self._end("close", super().close)

    def invalidate(self) -> None:
        """Refuse."""
        self._end("invalidate", super().invalidate)

    def reset(self) -> None:
        """Refuse."""
        raise _of(self).refuse("reset")

    def _end(self, what: str, end: Callable[[], None]) -> None:
        if not _of(self).is_ending:
            raise _of(self).refuse(what)
        end()


def _of(session: Session) -> _Transaction:
    transaction: _Transaction = session.info[_OURS]
    return transaction


class AuthorSessions:
    """A pool of connections for the callbacks of one event loop, made when one is wanted."""

    def __init__(self, address: DatabaseAddress, *, limit: timedelta | None = None) -> None:
        self._address = address
        self._limit = limit or (POSTGRESQL_LIMIT if address.is_postgresql else SQLITE_LIMIT)
        self._settings = session_settings(address.schema, Limits())
        self._engine: AsyncEngine | None = None

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AuthorSession]:
        """Lend a session; commit at the end what was written, or nothing of it.

        Raises `TransactionRefused` for code that ends the transaction or keeps it open for
        too long, and `GiveUp` for code that has ended it and then failed.
        """
        if self._engine is None:
            self._engine = self._new_engine()
        ours = _Transaction(task=asyncio.current_task())
        session = AuthorSession(
            self._engine,
            sync_session_class=_GuardedSession,
            expire_on_commit=False,
            info={_OURS: ours},
        )
        timer = asyncio.timeout(None)
        try:
            async with timer:
                with self._guarding(session, ours, timer):
                    yield session
                    await _commit(session, ours, is_postgresql=self._address.is_postgresql)
        except DatabaseError as error:
            # Among these is the TimeoutError of the timer itself.
            if timer.expired():
                raise self._late() from error
            raise
        except Exception as error:
            if ours.was_ended:
                raise _beyond_repair(error) from error
            raise
        finally:
            ours.is_ending = ours.has_ended = True
            await asyncio.shield(self._take_back(session, ours))

    async def own_connection(self, session: AsyncSession) -> AsyncConnection:
        """Write out what the session holds; give its connection, for statements of ours."""
        ours = _of(session.sync_session)
        ours.has_returned = True
        _require_intact(ours)
        await session.flush()
        connection = await session.connection()
        if self._address.is_postgresql:
            # The author's statements run as the role is set up; ours find their tables.
            await _set_up(connection, self._settings)
        return connection

    async def close(self) -> None:
        """Close every connection."""
        if self._engine is not None:
            await self._engine.dispose()

    def _new_engine(self) -> AsyncEngine:
        engine = (
            self._new_postgresql_engine()
            if self._address.is_postgresql
            # A pool of one: whoever comes next waits here, not at the lock of the file.
            else sqlite_engine(
                self._address, limits=Limits(), size=1, is_shared=True, wait=_PATIENCE
            )
        )
        event.listen(engine.sync_engine, "before_cursor_execute", _watch_words)
        event.listen(engine.sync_engine, "commit", _refuse_alone)
        return engine

    def _new_postgresql_engine(self) -> AsyncEngine:
        return postgresql_engine(
            self._address, settings=self._kept, size=SIZE, limits=self._limits, wait=_PATIENCE
        )

    @property
    def _limits(self) -> Limits:
        return Limits(
            lock=self._limit / 2,
            statement=self._limit,
            # For a callback that blocks its event loop, on which nothing here would fire.
            idle=self._limit + timedelta(seconds=1),
        )

    @property
    def _kept(self) -> dict[str, str]:
        """The settings of an author's transaction; the rest is up to the role."""
        settings = session_settings(self._address.schema, self._limits)
        return {name: settings[name] for name in _TIMEOUTS}

    @contextmanager
    def _guarding(
        self, session: AuthorSession, ours: _Transaction, timer: asyncio.Timeout
    ) -> Iterator[None]:
        """Cut off a transaction that stays open for too long, from its beginning on."""
        loop = asyncio.get_running_loop()
        cancels: list[Callable[[], object]] = []

        def started(_: Session, transaction: SessionTransaction, connection: Connection) -> None:
            if transaction.nested:
                return
            if ours.has_ended:
                # It was on its way when the call ended, and nobody else knows of it.
                connection.invalidate()
                connection.close()
                raise TransactionRefused(_TOO_LATE)
            if ours.root is not None:
                raise ours.refuse("end of the transaction")
            ours.root = connection.get_transaction()
            ours.pooled = connection.connection
            connection.info[_OURS] = ours
            timer.reschedule(loop.time() + self._limit.total_seconds())
            # Code that swallows the cancellation, or blocks, keeps its locks no longer.
            cancels.append(self._cutting(loop, ours.driver))
            if self._address.pgbouncer:
                connection.exec_driver_sql(set_locally(self._kept))

        event.listen(session.sync_session, "after_begin", started)
        try:
            yield
        finally:
            for cancel in cancels:
                cancel()

    def _cutting(self, loop: asyncio.AbstractEventLoop, driver: Any) -> Callable[[], object]:
        seconds = (self._limit + _MERCY).total_seconds()
        if self._address.is_postgresql:
            return loop.call_later(seconds, self._cut, driver).cancel
        # In a thread: the event loop may be what is blocked.
        timer = Timer(seconds, self._cut, [driver])
        timer.daemon = True
        timer.start()
        return timer.cancel

    async def _take_back(self, session: AuthorSession, ours: _Transaction) -> None:
        """Close the session; a connection that is no more to be trusted is given up."""
        is_sound = ours.is_committed or (ours.refusal is None and ours.is_intact)
        try:
            await (session.close() if is_sound else session.invalidate())
        except Exception:  # noqa: BLE001  # a task of the callback may be in the middle of using it
            if ours.pooled is not None:
                self._cut(ours.driver)
            # What that task holds of the pool, it may never give back.
            retired, self._engine = self._engine, None
            if retired is not None:
                await retired.dispose()

    def _cut(self, driver: Any) -> None:
        if self._address.is_postgresql:
            driver.terminate()
        else:
            _close_sqlite(driver)

    def _late(self) -> TransactionRefused:
        return TransactionRefused(
            f"the transaction of the session was open for more than {self._limit.total_seconds():g}"
            " s: do what is slow before the first use of `session`, or in a callback of its own"
        )


def _is_in_transaction(driver: Any) -> bool | None:
    """Ask the driver; None if the connection is gone, and the transaction with it."""
    try:
        if driver is None:
            return None
        # asyncpg has a method, aiosqlite a property.
        if hasattr(driver, "is_in_transaction"):
            return bool(driver.is_in_transaction())
        return bool(driver.in_transaction)
    except (InterfaceError, ValueError, sqlite3.Error):
        return None


def _close_sqlite(driver: Any) -> None:
    """Free the one lock of all writers, whatever the thread of the connection is doing."""
    with suppress(ValueError, sqlite3.Error):
        connection: sqlite3.Connection = driver._conn  # noqa: SLF001  # the driver has no way to end one from outside
        connection.interrupt()
        connection.close()


async def _set_up(connection: AsyncConnection, settings: dict[str, str]) -> None:
    try:
        await connection.exec_driver_sql(set_locally(settings))
    except DatabaseError as error:
        if sqlstate(error) != _ABORTED:
            raise
        raise TransactionRefused(
            "a statement of the callback had failed, and with it the transaction: let the error "
            "pass, or put the statement into `async with session.begin_nested()`"
        ) from error


async def _commit(session: AuthorSession, ours: _Transaction, *, is_postgresql: bool) -> None:
    _require_intact(ours)
    ours.is_ending = True
    if ours.is_marked and is_postgresql:
        connection = await session.connection()
        for statement in _RESET:
            await connection.exec_driver_sql(statement)
    await session.commit()
    ours.is_committed = True


def _require_intact(ours: _Transaction) -> None:
    if ours.refusal is not None:
        raise ours.refusal
    if not ours.is_intact:
        raise ours.refuse("end of the transaction")


def _beyond_repair(error: Exception) -> GiveUp:
    return GiveUp(
        "the callback has ended the transaction of its session by itself, and then failed "
        f"({type(error).__name__}): another try might do twice what is committed. {_REMEDY}"
    )


def _watch_words(connection: Connection, *said: Any) -> None:
    statement: str = said[1]
    ours: _Transaction | None = connection.info.get(_OURS)
    if ours is None or ours.is_ending:
        return
    if (match := _ENDS.match(statement)) is not None:
        raise ours.refuse(match[1].upper())
    ours.is_marked = ours.is_marked or _LASTS.match(statement) is not None


def _refuse_alone(connection: Connection) -> None:
    ours: _Transaction | None = connection.info.get(_OURS)
    if ours is not None and not ours.is_ending:
        raise ours.refuse("commit")
