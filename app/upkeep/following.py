"""Give followers of the feed what is new, beside the path: each in one process at a time."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from app.store import feed, followers
from app.store.session import Connection, Database
from app.telemetry import described, get_logger

log = get_logger("feed")

LIMIT = timedelta(seconds=3)
TICK = timedelta(milliseconds=500)
# How long one is left alone that has failed: twice as long each time.
PAUSE, LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=1)
# How long work waits for a moment without pressure; then it does one batch all the same.
PATIENCE, LULL = timedelta(seconds=2), timedelta(milliseconds=20)
AT_ONCE = 200


class Follower(Protocol):
    """Work that is done for each item of the feed, off the path of a webhook."""

    name: str

    async def follow(self, connection: Connection, items: Sequence[feed.Item]) -> None:
        """Do it, in the transaction that writes down how far it has come.

        So what is written to this database is written once. The items are in the order of
        the feed, and never none.
        """


class _Course:
    """How it goes with one follower in this process."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.failures = 0
        self.not_before = 0.0

    @property
    def at_once(self) -> int:
        """How many items it is given: fewer while it fails, it may be that they are too many."""
        return max(1, AT_ONCE >> self.failures)

    def fail(self, error: Exception) -> None:
        if not self.failures:
            log.warning("follower.delayed", follower=self.follower.name, **described(error))
        pause = min(LONGEST_PAUSE, PAUSE * 2 ** min(self.failures, 10))
        self.failures += 1
        self.not_before = asyncio.get_running_loop().time() + pause.total_seconds()

    def succeed(self) -> None:
        if self.failures:
            log.info("follower.resumed", follower=self.follower.name, failures=self.failures)
        self.failures = 0


class Following:
    """Runs some followers in turn, for ever."""

    def __init__(
        self,
        database: Database,
        *,
        followers: Sequence[Follower],
        is_pressed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._courses = [_Course(follower) for follower in followers]
        self._is_pressed = is_pressed
        self._is_known = False
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """Go on while there is more, and look again now and then, until `close`."""
        while not self._closed.is_set():
            if not await self.step():
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK.total_seconds()):
                        await self._closed.wait()

    def close(self) -> None:
        """End the loop behind what it is doing."""
        self._closed.set()

    async def step(self) -> bool:
        """Give each who is behind one batch; True if there may be more for some."""
        now = asyncio.get_running_loop().time()
        courses = [course for course in self._courses if course.not_before <= now]
        try:
            names = await self._behind([course.follower.name for course in courses])
        except Exception as error:  # noqa: BLE001  # the fence: no error ends the loop
            for course in courses:
                course.fail(error)
            return False
        is_more = [
            await self._advance(course) for course in courses if course.follower.name in names
        ]
        return any(is_more)

    async def _behind(self, names: Sequence[str]) -> set[str]:
        if not self._is_known:
            async with self._database.begin(limit=LIMIT) as connection:
                await followers.add(connection, [each.follower.name for each in self._courses])
            self._is_known = True
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            return await followers.behind(connection, names)

    async def _advance(self, course: _Course) -> bool:
        await self._wait_for_a_lull()
        try:
            given = await self._give(course.follower, course.at_once)
        except Exception as error:  # noqa: BLE001  # one that fails stops neither feed nor others
            course.fail(error)
            return False
        if given:
            course.succeed()
        return given

    async def _wait_for_a_lull(self) -> None:
        end = asyncio.get_running_loop().time() + PATIENCE.total_seconds()
        while self._is_pressed() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110  # asked, not told
            await asyncio.sleep(LULL.total_seconds())

    async def _give(self, follower: Follower, limit: int) -> bool:
        """Give one batch, and write down how far that is; False if there was none to give."""
        async with self._database.begin(limit=LIMIT) as connection:
            position = await followers.take(connection, follower.name)
            if position is None:
                return False
            items = await feed.read(connection, position, limit=limit)
            if items:
                await follower.follow(connection, items)
                await followers.move(connection, follower.name, items[-1].position)
        return bool(items)
