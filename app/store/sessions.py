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
from datetime import timedelta
from threading import Timer
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from app.errors import TransactionRefused
from app.store.session import (
    DatabaseAddress,
    DatabaseError,
    Limits,
    postgresql_engine,
    session_settings,
    set_locally,
    sqlite_engine,
)

POSTGRESQL_LIMIT = timedelta(seconds=10)
SQLITE_LIMIT = timedelta(seconds=1)
# Connections for authors, of one event loop.
SIZE = 8
# Who waits for one of them has the time-out of its callback.
_PATIENCE = timedelta(days=1)

_ENDS = re.compile(r"\s*(commit|end|abort|rollback(?!.*\bto\b))\b", re.IGNORECASE)
_REMEDY = (
    "the service commits what a callback writes with its session, together with the end of "
    "the delivery: write, and return; raise to undo it"
)


# Keys of the `info` of connections and sessions.
_OWNER, _REFUSED, _IS_ENDING = "atlas_owner", "atlas_refused", "atlas_ending"


class AuthorSession(AsyncSession):
    """What a callback is given: an `AsyncSession` without the right to end its transaction."""


class _GuardedSession(Session):
    """The synchronous half of it, where every way to a commit comes by."""

    def begin(self, nested: bool = False) -> Any:  # noqa: FBT001, FBT002  # as the overridden one has it
        """Allow savepoints."""
        if nested:
            return super().begin(nested=True)
        raise _refused(self.info, "begin")

    def commit(self) -> None:
        """Refuse."""
        raise _refused(self.info, "commit")

    def rollback(self) -> None:
        """Refuse."""
        raise _refused(self.info, "rollback")


def _refused(info: dict[Any, Any], what: str) -> TransactionRefused:
    # Whoever catches it has still lost the transaction.
    error = TransactionRefused(f"`{what}` in a session callback: {_REMEDY}")
    info[_REFUSED] = error
    return error


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
        too long.
        """
        if self._engine is None:
            self._engine = self._new_engine()
        session = AuthorSession(
            self._engine, sync_session_class=_GuardedSession, expire_on_commit=False
        )
        timer = asyncio.timeout(None)
        try:
            async with timer:
                with self._guarding(session, timer):
                    yield session
                    await _commit(session)
        except DatabaseError as error:
            # Among these is the TimeoutError of the timer itself.
            if timer.expired():
                raise self._late() from error
            raise
        finally:
            await asyncio.shield(_close(session))

    async def own_connection(self, session: AsyncSession) -> AsyncConnection:
        """Write out what the session holds; give its connection, for statements of ours."""
        _require_intact(session)
        await session.flush()
        connection = await session.connection()
        if self._address.is_postgresql:
            # The author's statements run as the role is set up; ours find their tables.
            await connection.exec_driver_sql(set_locally(self._settings))
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
        event.listen(engine.sync_engine, "before_cursor_execute", _refuse_in_words)
        event.listen(engine.sync_engine, "commit", _refuse_alone)
        return engine

    def _new_postgresql_engine(self) -> AsyncEngine:
        limits = Limits(
            lock=self._limit / 2,
            statement=self._limit,
            # For a callback that blocks its event loop, on which nothing here would fire.
            idle=self._limit + timedelta(seconds=1),
        )
        settings = session_settings(self._address.schema, limits)
        # Whose tables the author means, and how they are planned, is up to the role.
        kept = {name: settings[name] for name in _TIMEOUTS}
        return postgresql_engine(
            self._address, settings=kept, size=SIZE, limits=limits, wait=_PATIENCE
        )

    @contextmanager
    def _guarding(self, session: AuthorSession, timer: asyncio.Timeout) -> Iterator[None]:
        """Cut off a transaction that stays open for too long, from its beginning on."""
        loop = asyncio.get_running_loop()
        cancels: list[Callable[[], object]] = []

        def started(_: Session, __: Any, connection: Connection) -> None:
            connection.info[_OWNER] = session.info
            timer.reschedule(loop.time() + self._limit.total_seconds())
            # Code that swallows the cancellation, or blocks, keeps its locks no longer.
            cancels.append(self._cutting(loop, connection))

        event.listen(session.sync_session, "after_begin", started)
        try:
            yield
        finally:
            for cancel in cancels:
                cancel()

    def _cutting(
        self, loop: asyncio.AbstractEventLoop, connection: Connection
    ) -> Callable[[], object]:
        driver: Any = connection.connection.driver_connection
        seconds = (self._limit + _MERCY).total_seconds()
        if self._address.is_postgresql:
            return loop.call_later(seconds, driver.terminate).cancel
        timer = Timer(seconds, _close_sqlite, [driver])
        timer.daemon = True
        timer.start()
        return timer.cancel

    def _late(self) -> TransactionRefused:
        return TransactionRefused(
            f"the transaction of the session was open for more than {self._limit.total_seconds():g}"
            " s: do what is slow before the first use of `session`, or in a callback of its own"
        )


_TIMEOUTS = (
    "synchronous_commit",
    "lock_timeout",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
)
# After the cancellation, code has so long to end by itself.
_MERCY = timedelta(milliseconds=500)


def _close_sqlite(driver: Any) -> None:
    """Free the one lock of all writers, whatever the thread of the connection is doing."""
    with suppress(ValueError, sqlite3.Error):
        connection: sqlite3.Connection = driver._conn  # noqa: SLF001  # the driver has no way to end one from outside
        connection.interrupt()
        connection.close()


async def _commit(session: AuthorSession) -> None:
    _require_intact(session)
    session.info[_IS_ENDING] = True
    await session.run_sync(Session.commit)


def _require_intact(session: AsyncSession) -> None:
    if (error := session.info.get(_REFUSED)) is not None:
        raise error


async def _close(session: AuthorSession) -> None:
    try:
        # A connection that was used as it must not be is no more to be trusted.
        await (session.invalidate() if _REFUSED in session.info else session.close())
    except DatabaseError:
        await session.invalidate()


def _refuse_in_words(connection: Connection, *said: Any) -> None:
    statement: str = said[1]
    if (match := _ENDS.match(statement)) is not None:
        raise _refused(connection.info[_OWNER], match[1].upper())


def _refuse_alone(connection: Connection) -> None:
    owner = connection.info[_OWNER]
    if not owner.get(_IS_ENDING):
        raise _refused(owner, "commit")
