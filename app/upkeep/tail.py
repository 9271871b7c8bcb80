"""The newest items of the feed, read once for all in this process who wait for some.

A waiter holds no connection, and is woken by what it waits for. While nobody waits, nothing
is read.
"""

import asyncio
from collections import defaultdict, deque
from contextlib import suppress
from datetime import timedelta
from itertools import islice

from app.store import feed
from app.store.feed import Item
from app.store.session import Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("feed")

LIMIT = timedelta(seconds=3)
TICK, PAUSE = timedelta(milliseconds=50), timedelta(seconds=1)
AT_ONCE = 1000
# What is kept for readers who are a little behind; others read from the database.
KEPT = 5000


class Tail:
    """Follows the feed's end. Items behind `first` are kept, and `end` is the newest."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._items: deque[Item] = deque(maxlen=KEPT)
        self.end = 0
        self.is_closed = False
        self._waiters = 0
        self._wanted = asyncio.Event()
        # Set, and replaced by a new one, whenever something has come.
        self._more = asyncio.Event()
        self._about: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @property
    def first(self) -> int:
        """The position behind which every item is kept."""
        return self.end - len(self._items)

    async def run(self) -> None:
        """Follow the feed while somebody waits, for ever."""
        while True:
            await self._wanted.wait()
            try:
                await self._jump()
                while self._waiters:
                    is_behind = await self._read()
                    await asyncio.sleep(0 if is_behind else TICK.total_seconds())
                self._wanted.clear()
            except DatabaseError as error:
                log.warning("tail.delayed", error=type(error).__name__)
                await asyncio.sleep(PAUSE.total_seconds())

    async def _jump(self) -> None:
        """Begin at the end of today: those who wait look for themselves at what was before."""
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            head = await feed.head(connection)
        self._items.clear()
        self.end = head.position if head is not None else 0
        self._wake_all()

    async def _read(self) -> bool:
        """Take over what is new; True if there may be more of it already."""
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            items = await feed.read(connection, self.end, limit=AT_ONCE)
        if items:
            self._items.extend(items)
            self.end = items[-1].position
            self._wake(items)
        return len(items) == AT_ONCE

    def _wake(self, items: list[Item]) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()
        for envelope_id in {item.envelope_id for item in items} & self._about.keys():
            for waiter in self._about[envelope_id or ""]:
                waiter.set()

    def _wake_all(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()
        for waiters in self._about.values():
            for waiter in waiters:
                waiter.set()

    def after(self, position: int) -> list[Item] | None:
        """Give what is kept behind a position; None if some of it is not kept any more."""
        if position < self.first:
            return None
        return list(islice(self._items, position - self.first, None))

    async def more(self, position: int, *, until: float) -> bool:
        """Wait until there is something behind a position; False once it is `until`.

        `until` is a time of the running loop. At the end of the process everybody is told to
        look once more, and sees that it `is_closed`.
        """
        while self.end <= position and not self.is_closed:
            if not await self._wait(self._more, until):
                return False
        return True

    async def about(self, envelope_id: str, position: int, *, until: float) -> bool:
        """Wait until something may have happened to an envelope behind a position.

        Take `end` as the position first, and then look at the envelope: so nothing can come
        between. False once it is `until`.
        """
        waiter = asyncio.Event()
        self._about[envelope_id].add(waiter)
        try:
            items = self.after(position)
            if self.is_closed or items is None:
                return True
            if any(item.envelope_id == envelope_id for item in items):
                return True
            return await self._wait(waiter, until)
        finally:
            self._about[envelope_id].discard(waiter)
            if not self._about[envelope_id]:
                del self._about[envelope_id]

    async def _wait(self, happened: asyncio.Event, until: float) -> bool:
        self._waiters += 1
        self._wanted.set()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await happened.wait()
            return happened.is_set()
        finally:
            self._waiters -= 1

    def close(self) -> None:
        """End every wait: the process is about to stop."""
        self.is_closed = True
        self._wake_all()
