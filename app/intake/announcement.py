"""Tell the workers of other processes that events are owed: once for all that gather."""

import asyncio
from datetime import timedelta

from app.store.session import Database, DatabaseError
from app.store.wakeups import announce
from app.telemetry import get_logger

log = get_logger("intake")

LIMIT = timedelta(seconds=2)
# After an announcement, the next one waits for so long, and takes the place of all between.
PAUSE = timedelta(milliseconds=20)


class Announcer:
    """Sends announcements off the path of a webhook; one that fails is not repeated."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._is_wanted = asyncio.Event()

    def announce(self) -> None:
        """Say soon that something is owed; cheap, and never an error."""
        self._is_wanted.set()

    async def run(self) -> None:
        """Send what is wanted, for ever."""
        is_failing = False
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            try:
                await self._send()
                is_failing = False
            except DatabaseError as error:
                # The events are committed, and found by the poll of whoever is owed them.
                if not is_failing:
                    log.warning("wakeups.unsent", error=type(error).__name__)
                is_failing = True
            await asyncio.sleep(PAUSE.total_seconds())

    async def _send(self) -> None:
        async with self._database.begin(limit=LIMIT) as connection:
            await announce(connection, schema=self._database.address.schema)
