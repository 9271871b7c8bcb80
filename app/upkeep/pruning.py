"""Empty the bodies of events that are old enough: a few at a time, one process at a time."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from uuid import UUID

from app.errors import NotAllowed
from app.store import leases, pruning
from app.store.session import Connection, Database, DatabaseError
from app.telemetry import described, get_logger
from app.upkeep.patience import patiently

log = get_logger("retention")

NAME = "prune"
LIMIT, LONG_LIMIT = timedelta(seconds=8), timedelta(seconds=60)
# Who holds the lease and is killed is followed by another one after so long.
LEASE = timedelta(seconds=10)
AT_ONCE = 500
# Between two batches as long as the last one took, and no less than this: whoever records
# events has at least half of the time for himself.
PAUSE = timedelta(milliseconds=50)
# How often a process that works looks by itself, and how soon it does so at first.
EVERY, FIRST = timedelta(hours=1), timedelta(minutes=1)
_START = UUID(int=0)


class Occupied(NotAllowed):
    """Another process prunes just now; the text says which."""


@dataclass(slots=True)
class Pruned:
    """How far it has come: bodies looked at and emptied, and why others stayed."""

    total: int
    seen: int = 0
    emptied: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


async def prune(
    database: Database,
    age: timedelta,
    *,
    holder: str,
    is_dry: bool = False,
    is_counted: bool = True,
    at_once: int = AT_ONCE,
) -> AsyncGenerator[Pruned, None]:
    """Empty the bodies of events that were received longer than `age` ago.

    Ended in the middle, or killed, it can be said again, and goes on where it was. Raises
    `Occupied` while another process does it.
    """
    async with database.begin(limit=LONG_LIMIT, is_reading=True) as connection:
        before = await pruning.cutoff(connection, age)
        # To count is to read an index; whoever looks at no bar can do without.
        progress = Pruned(await pruning.count(connection, before) if is_counted else 0)
    run = _Run(database, before, holder=holder, is_dry=is_dry, at_once=at_once)
    yield progress
    try:
        async for aged in run.batches():
            progress.emptied += len(aged.free)
            progress.skipped.update(aged.skipped)
            progress.seen += len(aged.free) + sum(aged.skipped.values())
            progress.total = max(progress.total, progress.seen)
            yield progress
    finally:
        await run.end()


class _Run:
    """One walk over what is old, batch by batch."""

    def __init__(
        self, database: Database, before: datetime, *, holder: str, is_dry: bool, at_once: int
    ) -> None:
        self._database = database
        self._before = before
        self._holder = holder
        self._is_dry = is_dry
        self._at_once = at_once
        self._is_held = False

    async def batches(self) -> AsyncGenerator[pruning.Aged, None]:
        clock = asyncio.get_running_loop().time
        after = _START
        while True:
            begun = clock()
            aged = await patiently(partial(self._batch, after))
            if aged is None:
                return
            after = aged.last
            yield aged
            await asyncio.sleep(max(PAUSE.total_seconds(), clock() - begun))

    async def _batch(self, after: UUID) -> pruning.Aged | None:
        is_dry = self._is_dry
        async with self._database.begin(limit=LIMIT, is_reading=is_dry) as connection:
            if not is_dry:
                await self._hold(connection)
            aged = await pruning.page(
                connection,
                after=after,
                before=self._before,
                limit=self._at_once,
                is_locking=not is_dry,
            )
            if aged is not None and not is_dry:
                await pruning.digest(connection, aged.free)
                await pruning.empty(connection, aged.free)
        return aged

    async def _hold(self, connection: Connection) -> None:
        """Be the one who does this, until the transaction ends and a while longer."""
        if await leases.hold(connection, NAME, holder=self._holder, span=LEASE) is None:
            other = await leases.holder_of(connection, NAME)
            raise Occupied(
                f"{other or 'another process'} prunes just now; one at a time is enough. If it was "
                f"killed, say this again in {LEASE.total_seconds():.0f} seconds"
            )
        self._is_held = True

    async def end(self) -> None:
        """Let another process have it at once."""
        if not self._is_held:
            return
        # It ends by itself soon; what was done is done.
        with suppress(*DatabaseError):
            async with self._database.begin(limit=LIMIT) as connection:
                await leases.release(connection, NAME, holder=self._holder)


class Pruner:
    """Prunes now and then, for ever: whichever of the processes that work comes first."""

    def __init__(self, database: Database, age: timedelta, *, holder: str) -> None:
        self._database = database
        self._age = age
        self._holder = holder

    async def run(self) -> None:
        """Look every hour; a database that is away is no reason to stop."""
        wait = FIRST
        while True:
            await asyncio.sleep(wait.total_seconds())
            wait = EVERY
            try:
                await self.step()
            except DatabaseError as error:
                log.warning("prune.delayed", **described(error))

    async def step(self) -> Mapping[str, int] | None:
        """Prune once; None if another process does it."""
        done = None
        try:
            steps = prune(self._database, self._age, holder=self._holder, is_counted=False)
            async for step in steps:
                done = step
        except Occupied:
            return None
        assert done is not None  # it says at least where it begins
        if done.emptied:
            log.info("bodies.pruned", count=done.emptied, skipped=dict(done.skipped))
        return {"emptied": done.emptied, **done.skipped}
