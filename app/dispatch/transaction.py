"""The transaction of a session callback: its writes and the end of its delivery, or neither."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from app.dispatch.attempt import COMMITTED, Call, Outcome
from app.dispatch.settling import settlement
from app.errors import AppError
from app.store import verdicts
from app.store.session import DatabaseAddress
from app.store.sessions import AuthorSessions


class Superseded(AppError):
    """The delivery is not ours any more, so nothing that was done for it counts."""


class Transactions:
    """Opens sessions for the calls of one event loop."""

    def __init__(self, address: DatabaseAddress, *, worker: str) -> None:
        self._sessions = AuthorSessions(address)
        self._worker = worker

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Any]:
        """Lend a session; when the callback returns, settle its delivery and commit both.

        The token is compared in the same transaction: if another worker has claimed the
        delivery meanwhile, nothing is committed.
        """
        began_at = datetime.now(UTC)
        async with self._sessions.begin() as session:
            yield session
            connection = await self._sessions.own_connection(session)
            outcome = Outcome(call, COMMITTED, began_at, datetime.now(UTC))
            row = settlement(outcome, noise=0.0)
            if not await verdicts.settle(connection, [row], worker=self._worker):
                raise Superseded("another worker has claimed this delivery meanwhile")

    async def close(self) -> None:
        """Close every connection."""
        await self._sessions.close()
