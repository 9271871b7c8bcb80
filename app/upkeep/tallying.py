"""Count what happens, and now and then add it to what all processes have counted."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from app.store import leases, tallies
from app.store.session import Database, DatabaseError, blames_data
from app.store.tallies import KEPT, Step, Tally
from app.telemetry import get_logger

log = get_logger("tallies")

EVERY = timedelta(seconds=10)
LIMIT = timedelta(seconds=2)
# Without a database for long, what is new is not counted any more.
MOST = 20_000
AT_ONCE = 1000
LEASE, TIDY_EVERY = "tallies", timedelta(hours=1)

# An account, what is counted, and its label.
Counted = tuple[str, str, str]


class Tallies:
    """What this process has counted and not told the database yet; for every thread."""

    def __init__(self, database: Database, *, holder: str) -> None:
        self._database = database
        self._holder = holder
        self._lock = threading.Lock()
        # By the minute since 1970, and what is counted in it.
        self._counts: Counter[tuple[int, Counted]] = Counter()
        self._tidied_at: datetime | None = None
        self._is_failing = False

    def count(self, counted: Mapping[Counted, int]) -> None:
        """Count what has happened just now; cheap, and never an error."""
        minute = int(time.time()) // 60
        with self._lock:
            for what, count in counted.items():
                key = minute, what
                if key in self._counts or len(self._counts) < MOST:
                    self._counts[key] += count

    async def run(self) -> None:
        """Tell the database, for ever; what it does not take is kept for the next time."""
        while True:
            await asyncio.sleep(EVERY.total_seconds())
            await self.flush()
            await self._tidy()

    async def flush(self) -> None:
        """Tell the database everything now, if it answers."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        left = sorted(counts)
        try:
            while left:
                await self._add({_tally(key): counts[key] for key in left[:AT_ONCE]})
                del left[:AT_ONCE]
            self._is_failing = False
        except DatabaseError as error:
            if not self._is_failing:
                log.warning("tallies.delayed", error=type(error).__name__)
            self._is_failing = True
        finally:
            with self._lock:
                self._counts.update({key: counts[key] for key in left})

    async def _add(self, counts: Mapping[Tally, int]) -> None:
        try:
            async with self._database.begin(limit=LIMIT) as connection:
                await tallies.add(connection, counts)
        except DatabaseError as error:
            # It would refuse them again and again, and with them everything else.
            if not blames_data(error):
                raise

    async def _tidy(self) -> None:
        """Once an hour, drop what is too old; one process does it."""
        now = datetime.now(UTC)
        if self._tidied_at is not None and now - self._tidied_at < TIDY_EVERY:
            return
        try:
            for step, kept in KEPT.items():
                while await self._drop(step, before=now - kept):
                    pass
            self._tidied_at = now
        except DatabaseError as error:
            log.warning("tallies.delayed", error=type(error).__name__)

    async def _drop(self, step: Step, *, before: datetime) -> bool:
        async with self._database.begin(limit=LIMIT) as connection:
            token = await leases.hold(connection, LEASE, holder=self._holder, span=TIDY_EVERY)
            return token is not None and await tallies.drop_old(connection, step, before=before)


def _tally(key: tuple[int, Counted]) -> Tally:
    minute, what = key
    return Tally(datetime.fromtimestamp(minute * 60, UTC), *what)
