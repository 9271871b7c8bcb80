"""Give every change its place in the feed, after its commit, one process at a time."""

import asyncio
from datetime import timedelta

from app.store import feed, leases
from app.store.session import Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("feed")

LIMIT = timedelta(seconds=3)
# Who holds it and falls silent is followed by another one after so long.
LEASE = timedelta(seconds=2)
# Between two looks: by who holds the lease or finds it free, and by the others.
TICK, OTHERS_TICK = timedelta(milliseconds=50), timedelta(milliseconds=500)
AT_ONCE = 1000


class Sequencer:
    """Looks for changes without a place, for ever."""

    def __init__(self, database: Database, *, holder: str) -> None:
        self._database = database
        self._holder = holder

    async def run(self) -> None:
        """Place what is committed; a database that is away is waited for."""
        is_failing = False
        while True:
            wait = TICK
            try:
                wait = await self.step()
                is_failing = False
            except DatabaseError as error:
                if not is_failing:
                    log.warning("feed.delayed", error=type(error).__name__)
                is_failing, wait = True, OTHERS_TICK
            await asyncio.sleep(wait.total_seconds())

    async def step(self) -> timedelta:
        """Place what there is, if that is this process's affair; say when to look again."""
        if not await self._is_wanted():
            return TICK
        while True:
            async with self._database.begin(limit=LIMIT) as connection:
                placed = await feed.place(
                    connection, holder=self._holder, span=LEASE, limit=AT_ONCE
                )
            if placed is None:
                return OTHERS_TICK
            if placed < AT_ONCE:
                return TICK

    async def _is_wanted(self) -> bool:
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            return await feed.pending_since(connection) is not None

    async def stop(self) -> None:
        """Let another process go on at once."""
        async with self._database.begin(limit=LIMIT) as connection:
            await leases.release(connection, feed.LEASE, holder=self._holder)
