"""How many may wait at once: for each token, and in all; and for no longer than they are there."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from starlette.types import Receive, Scope

from app.errors import TooMany

# In the scope of a request that is not to be answered once its sender has closed its side.
WAITS: Final = "receiver.waits"
# In the scope of a request: what cuts its connection, with all that is still to be sent.
CUT: Final = "receiver.cut"


class Seats:
    """Seats for those who wait; nobody can take all of them."""

    def __init__(self, total: int, *, each: int) -> None:
        self._total = total
        self._each = each
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """How many wait just now."""
        return self._taken.total()

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Take a seat for the consumer of this name. Raises `TooMany`."""
        if self._taken[name] >= self._each:
            raise TooMany(
                f"{self._each} requests of this token wait already (API_WAITERS_PER_TOKEN)"
            )
        if self.taken >= self._total:
            raise TooMany(f"{self._total} requests wait already (API_WAITERS)")
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1


@asynccontextmanager
async def until_gone(scope: Scope, receive: Receive) -> AsyncIterator[None]:
    """End what is done inside as soon as the caller hangs up: nobody reads the answer.

    For requests whose body, if there is one, was read before.
    """
    scope[WAITS] = True
    stay = asyncio.timeout(None)
    try:
        async with stay:
            watching = asyncio.create_task(_watch(receive, stay))
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if not stay.expired():
            raise


async def _watch(receive: Receive, stay: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stay.reschedule(asyncio.get_running_loop().time())
