"""Try a small transaction again for as long as others are in its way."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

from app.store.envelopes import EnvelopesBusy
from app.store.session import DatabaseError, sqlstate

T = TypeVar("T")

PATIENCE, PAUSE = timedelta(seconds=20), timedelta(milliseconds=100)
# Serialisation, deadlock, lock not available: another try may help.
_PASSING = ("40001", "40P01", "55P03")


async def patiently(act: Callable[[], Awaitable[T]], *, patience: timedelta = PATIENCE) -> T:
    """Run `act`, which is one transaction; again if it only came at the wrong moment."""
    clock = asyncio.get_running_loop().time
    end = clock() + patience.total_seconds()
    while True:
        try:
            return await act()
        except EnvelopesBusy:
            if clock() > end:
                raise
        except DatabaseError as error:
            if clock() > end or not _is_passing(error):
                raise
        await asyncio.sleep(PAUSE.total_seconds())


def _is_passing(error: BaseException) -> bool:
    # SQLite has one lock for all who write, and no codes.
    return sqlstate(error) in _PASSING or "database is locked" in str(error)
