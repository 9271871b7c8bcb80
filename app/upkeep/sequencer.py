"""Give every change its place in the feed, after its commit, one process at a time."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from app.store import feed, leases
from app.store.feed import Floor, Placed
from app.store.session import Database, DatabaseError, sqlstate
from app.telemetry import get_logger

log = get_logger("feed")

LIMIT, STOP_LIMIT = timedelta(seconds=3), timedelta(seconds=1)
# Who holds it and falls silent is followed by another one after so long.
LEASE = timedelta(seconds=2)
# Between two looks: by who holds the lease or finds it free, and by the others.
TICK, OTHERS_TICK = timedelta(milliseconds=50), timedelta(milliseconds=500)
# Who has placed something looks often for so long, and then less.
BUSY, IDLE_TICK = timedelta(seconds=5), timedelta(milliseconds=200)
# However much is committed, so long is waited for more of it; longer while senders wait.
REST, CROWDED_REST = timedelta(milliseconds=10), timedelta(milliseconds=200)
AT_ONCE = 1000
_LOCK_NOT_AVAILABLE = "55P03"
# How the names of transactions begin that no session has any more.
PREPARED = "-1/"


class Footing:
    """Finds out below which id nothing can wait any more, without waiting for anybody.

    A change that is in sight proves that every lower id was given before, to a transaction
    that holds a lock on the table from then until its end. Once all those are gone that held
    it at some time after, what they left is in sight, too, and the next look that comes so
    far takes it. Nobody's clock, snapshot or number of a transaction is asked: a long reader
    or a long writer of something else holds nothing up.
    """

    # So many changes that are gone may lie in the way of each look.
    WORTH_IT = 5000

    def __init__(self) -> None:
        self.floor: Floor | None = None
        self._id = feed.BEGINNING
        self._highest = feed.BEGINNING
        self._placed = 0
        # Those that may hold ids up to this one.
        self._watched: tuple[int, set[str]] | None = None
        self._settled: int | None = None

    @property
    def wants_writers(self) -> bool:
        """Whether it is worth while to ask who writes."""
        return self._placed >= self.WORTH_IT and self._settled is None

    def watch(self, writers: set[str]) -> None:
        """Learn who writes, some time after the last look."""
        highest, suspects = self._watched or (self._highest, writers)
        # One that is prepared for a commit in two phases goes on under another name.
        suspects = {name for name in writers if name in suspects or name.startswith(PREPARED)}
        self._watched = (highest, suspects) if suspects else None
        if not suspects:
            self._settled = highest

    def note(self, placed: Placed, *, is_all: bool) -> None:
        """Learn what a look has placed; `is_all` if it left nothing that was in sight."""
        self._placed += placed.count
        self._highest = max(self._highest, placed.last)
        if self._settled is not None and (is_all or placed.last > self._settled):
            self._id, self._placed, self._settled = self._settled + 1, 0, None
        self.floor = Floor(self._id, placed.end)


class Sequencer:
    """Looks for changes without a place, for ever; at once, if it is told of some."""

    def __init__(
        self,
        database: Database,
        *,
        holder: str,
        is_pressed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._holder = holder
        self._is_pressed = is_pressed
        self._hint, self._closed = asyncio.Event(), asyncio.Event()
        self._footing = Footing()
        self._at_once = AT_ONCE
        self._is_failing = False
        self._busy_until = 0.0
        self._is_waiting = False
        # When nothing waited, as far as this process has seen.
        self._clear_at: float | None = None
        # For how long the first change without a place had waited when this process looked;
        # None if that is another one's affair, or not known.
        self.lag: timedelta | None = None

    def wake(self) -> None:
        """Say that something was committed."""
        self._hint.set()

    async def run(self) -> None:
        """Place what is committed, until `close`; a database that is away is waited for."""
        while not self._closed.is_set():
            wait = await self._try()
            await self._rest(wait)

    def close(self) -> None:
        """End the loop behind what it is doing: half a transaction helps nobody."""
        self._closed.set()
        self._hint.set()

    async def _try(self) -> timedelta:
        try:
            wait = await self.step()
        except DatabaseError as error:
            self._fail(error)
            return OTHERS_TICK
        self._is_failing = False
        return wait

    def _fail(self, error: Exception) -> None:
        # What was sent may be committed or not; and it may have been too much.
        self._footing, self.lag = Footing(), None
        self._at_once = max(1, self._at_once // 4)
        # Somebody else has the lease's row just now, and goes on.
        if self._is_failing or sqlstate(error) == _LOCK_NOT_AVAILABLE:
            return
        self._is_failing = True
        log.warning("feed.delayed", error=type(error).__name__)

    async def _rest(self, wait: timedelta) -> None:
        """Wait for the next look: a hint makes it sooner, but for those who leave it to others."""
        if wait >= OTHERS_TICK:
            await _wait_for(self._closed, wait)
            return
        await _wait_for(self._closed, CROWDED_REST if self._is_pressed() else REST)
        await _wait_for(self._hint, wait - REST)

    async def step(self) -> timedelta:
        """Place what there is, if that is this process's affair; say when to look again."""
        if not self._hint.is_set():
            if await self._is_done_by_another():
                return OTHERS_TICK
            if not self._is_waiting:
                return TICK if self._is_busy() else IDLE_TICK
        self._hint.clear()
        return await self._place_all()

    def _is_busy(self) -> bool:
        """Whether this process has placed something lately."""
        return asyncio.get_running_loop().time() < self._busy_until

    async def _is_done_by_another(self) -> bool:
        """Look at who does it, and at what waits."""
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            if not self._is_busy():
                holder = await leases.holder_of(connection, feed.LEASE)
                if holder not in {None, self._holder}:
                    self._leave()
                    return True
            self._measure(await feed.lag(connection, self._footing.floor))
        return False

    def _measure(self, waited: timedelta | None) -> None:
        """Take over how long something has waited: not longer than since nothing did."""
        self._is_waiting = waited is not None
        now = asyncio.get_running_loop().time()
        if waited is None:
            self.lag, self._clear_at = timedelta(), now
        elif self._clear_at is None:
            self.lag = waited
        else:
            # It counts from a change's own time, at which nobody could see it yet: its
            # transaction may have been a long one.
            self.lag = min(waited, timedelta(seconds=now - self._clear_at))

    async def _place_all(self) -> timedelta:
        while True:
            limit = self._at_once
            async with self._database.begin(limit=LIMIT) as connection:
                placed = await feed.place(
                    connection,
                    holder=self._holder,
                    span=LEASE,
                    limit=limit,
                    floor=self._footing.floor,
                )
            if placed is None:
                self._leave()
                return OTHERS_TICK
            self._at_once = min(AT_ONCE, 2 * limit)
            await self._learn(placed, is_all=placed.count < limit)
            if placed.count < limit:
                self._measure(None)
                return TICK

    def _leave(self) -> None:
        """Know that it is another one's affair."""
        self.lag = self._clear_at = None
        self._busy_until = 0.0

    async def _learn(self, placed: Placed, *, is_all: bool) -> None:
        if placed.count:
            now = asyncio.get_running_loop().time()
            self._busy_until = now + BUSY.total_seconds()
        if not placed.is_floored:
            self._footing = Footing()
        self._footing.note(placed, is_all=is_all)
        if self._footing.wants_writers:
            async with self._database.begin(
                limit=LIMIT, is_reading=True, is_split=True
            ) as connection:
                self._footing.watch(await feed.writers(connection))

    async def stop(self) -> None:
        """Let another process go on at once; if that cannot be said, it does after a while."""
        if not self._is_busy():
            return
        with suppress(*DatabaseError):
            async with self._database.begin(limit=STOP_LIMIT) as connection:
                await leases.release(connection, feed.LEASE, holder=self._holder)


async def _wait_for(happened: asyncio.Event, limit: timedelta) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit.total_seconds()):
            await happened.wait()
