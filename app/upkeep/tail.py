"""The newest items of the feed, read once for all in this process who wait for some.

A waiter holds no connection, and is woken by what it waits for: what many want alike is looked
for once, and nobody is woken by what others want. While nobody waits, nothing is read.
"""

import asyncio
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from app.store import feed
from app.store.feed import Item, Place
from app.store.session import Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("feed")

LIMIT = timedelta(seconds=3)
TICK, PAUSE = timedelta(milliseconds=50), timedelta(seconds=1)
AT_ONCE = 1000
# What is kept for readers who are a little behind; others read from the database. A little
# more is kept for a while, so that not every new item moves all the others.
KEPT, SLACK = 5000, 1000

# Before the first item of any feed.
START: Final = Place(0, datetime.fromtimestamp(0, UTC))


class Wanted(Protocol):
    """What somebody waits for; what compares equal is looked for together."""

    def takes(self, item: Item) -> bool:
        """Whether an item is wanted: by its account, its tenant and its type alone."""

    def __hash__(self) -> int:
        """Be found among what others want."""


class _Round:
    """Those who wait for the same, until an item of it comes."""

    def __init__(self) -> None:
        self.waiters = 0
        self.woken = asyncio.Event()
        # Up to here there was nothing for them; None if nobody can say that.
        self.place: Place | None = None


class Tail:
    """Follows the feed's end: items behind `first` are kept, and `end` is the newest."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._items: list[Item] = []
        self._first = self._last = START
        self._is_begun = False
        # Whether what is kept was compared with the database since somebody waits again.
        self._is_fresh = False
        # How often the feed turned out to be another one than it was.
        self._breaks = 0
        self.is_closed = False
        self._waiters = 0
        self._wanted = asyncio.Event()
        # Set, and replaced by a new one, whenever something has come for anybody.
        self._more = asyncio.Event()
        self._closing = asyncio.Event()
        self._rounds: defaultdict[Wanted, _Round] = defaultdict(_Round)
        self._about: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @property
    def first(self) -> int:
        """The position behind which every item is kept."""
        return self._first.position

    @property
    def end(self) -> int:
        """The position of the newest item that is known here."""
        return self._last.position

    @property
    def newest(self) -> Place | None:
        """The place of the newest item; None if that is not known just now."""
        return self._last if self._is_fresh else None

    async def run(self) -> None:
        """Follow the feed while somebody waits, for ever."""
        while True:
            await self._wanted.wait()
            try:
                await self._resume()
                while self._waiters:
                    is_behind = await self._read()
                    self._refresh()
                    await asyncio.sleep(0 if is_behind else TICK.total_seconds())
                # While nobody looks, the database may be restored.
                self._is_fresh = False
                self._wanted.clear()
            except DatabaseError as error:
                log.warning("tail.delayed", error=type(error).__name__)
                await asyncio.sleep(PAUSE.total_seconds())

    async def _resume(self) -> None:
        """Go on where it was; if that is too far back, or nowhere, at the end of today.

        Those who wait look for themselves at what was before.
        """
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            head = await feed.head(connection) or START
        if self._is_begun and head.position - self.end <= AT_ONCE:
            return
        self._is_begun = True
        self._items.clear()
        self._first = self._last = head
        self._wake_all()

    async def _read(self) -> bool:
        """Take over what is new; True if there may be more of it already."""
        known = [self._last] if self.end else []
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            # The last one comes along, to see that this is still the same feed.
            items = await feed.read(connection, self.end - len(known), limit=AT_ONCE + len(known))
        if known != [place_of(item) for item in items[: len(known)]]:
            await self._begin_anew()
            return False
        new = items[len(known) :]
        if new:
            before = self._last
            self._keep(new)
            self._wake(new, before)
        return len(new) == AT_ONCE

    async def _begin_anew(self) -> None:
        """Forget a feed that is not there any more: somebody has restored the database."""
        log.warning("tail.broken", position=self.end)
        self._is_begun = False
        self._breaks += 1
        await self._resume()

    def _refresh(self) -> None:
        if not self._is_fresh:
            self._is_fresh = True
            self._tell_everybody()

    def _tell_everybody(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    def _keep(self, items: list[Item]) -> None:
        self._items.extend(items)
        self._last = place_of(items[-1])
        surplus = len(self._items) - KEPT
        if surplus > SLACK:
            self._first = place_of(self._items[surplus - 1])
            del self._items[:surplus]

    def _wake(self, items: list[Item], before: Place) -> None:
        self._tell_everybody()
        # Whatever tells what is wanted from what is not; of a thousand items they are few.
        kinds = list({(item.account, item.tenant, item.type): item for item in items}.values())
        for wanted in [each for each in self._rounds if any(map(each.takes, kinds))]:
            self._end_round(wanted, before)
        for envelope_id in {item.envelope_id for item in items} & self._about.keys():
            for waiter in self._about[envelope_id or ""]:
                waiter.set()

    def _end_round(self, wanted: Wanted, place: Place | None) -> None:
        ended = self._rounds.pop(wanted)
        ended.place = place
        ended.woken.set()

    def _wake_all(self) -> None:
        self._tell_everybody()
        for wanted in list(self._rounds):
            self._end_round(wanted, None)
        for waiters in self._about.values():
            for waiter in waiters:
                waiter.set()

    def after(self, position: int) -> list[Item] | None:
        """Give what is kept behind a position; None if some of it is not kept any more."""
        if position < self.first:
            return None
        return self._items[position - self.first :]

    def behind(self, place: Place) -> list[Item] | None:
        """Give what is kept behind a place; None if that is not known here, or not as such.

        Then only the database can tell what is there.
        """
        if not self._is_fresh or not self.first <= place.position <= self.end:
            return None
        index = place.position - self.first
        known = self._first if index == 0 else place_of(self._items[index - 1])
        return self._items[index:] if known == place else None

    async def more(self, place: Place, wanted: Wanted, *, until: float) -> Place:
        """Wait until something that is wanted may be behind a place.

        Gives the place up to which there is none of it: further on, perhaps, and so it is once
        it is `until`, a time of the running loop. At the end of the process everybody is told
        to look once more, and sees that it `is_closed`; so is everybody when the feed turns out
        to be another one.
        """
        breaks = self._breaks
        while not self.is_closed and breaks == self._breaks:
            if self._is_fresh and place == self._last:
                return await self._quiet(place, wanted, until)
            if self._is_fresh and place.position < self.end:
                return place
            # What is not known here yet, the next look finds; or that it is not there.
            if not await self._wait(self._more, until):
                return place
        return place

    async def _quiet(self, place: Place, wanted: Wanted, until: float) -> Place:
        """Wait at the end of the feed until an item that is wanted comes behind it."""
        this = self._rounds[wanted]
        this.waiters += 1
        try:
            if await self._wait(this.woken, until):
                return this.place or place
            return self._last
        finally:
            this.waiters -= 1
            if not this.waiters and not this.woken.is_set():
                del self._rounds[wanted]

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

    async def pause(self, *, until: float) -> None:
        """Wait for a time; the end of the process ends it."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._closing.wait()

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
        self._closing.set()
        self._wake_all()


def place_of(item: Item) -> Place:
    """Give the place of an item."""
    return Place(item.position, item.at)
