"""Dead letters by their cause: shown as groups, tried again with care, or given up."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from app.dispatch.control import LIMIT, describe_hold, is_served, require_callback
from app.errors import NotAllowed, NotFound
from app.store import callbacks, deliveries, failures, pauses
from app.store.deliveries import DEAD, DONE, EVERYTHING, PENDING, RUNNING
from app.store.failures import Cause, Extent, Group, Letter
from app.store.pauses import Flow
from app.store.session import Database, DatabaseError
from app.store.sight import Sight

RATE = 10.0
# Between two looks at what came of it.
TICK = timedelta(milliseconds=250)
# Of the last so many that ended, half may not have failed again, once there are a few.
RECENT, FEW = 20, 5
# More is not made due before something of it has ended.
MOST_WAITING = 1000
BLOCK = 10_000
DISCARDED_AT_ONCE = 500
# To count is to read all that is dead.
COUNTING = timedelta(seconds=30)
FIRST = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the retry of a group has come.

    `waiting` are due, but have not been tried to the end; `failed` are tried again by
    themselves, as usual. `stopped` says why the rest stays dead.
    """

    total: int
    retried: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    stopped: str | None = None


async def list_groups(
    database: Database,
    *,
    callback: str | None = None,
    sight: Sight = EVERYTHING,
    limit: int = 100,
) -> list[Group]:
    """Give the causes of which there are dead letters, the latest first."""
    async with database.begin(limit=COUNTING, is_reading=True) as connection:
        found = await failures.groups(connection, callback=callback, sight=sight, limit=limit)
        if callback is not None and not found:
            require_callback(await callbacks.read(connection), callback, sight=sight)
    return found


async def discard_group(database: Database, cause: Cause, *, reason: str, actor: str) -> int:
    """Owe the dead letters of one cause no longer; say how many there were.

    Those that die meanwhile stay. Cut off in the middle, it can be said again.
    """
    details: dict[str, object] = {"reason": reason}
    extent = await _begin(database, cause, "failures.discarded", actor=actor, details=details)
    after, discarded = FIRST, 0
    while True:
        async with database.begin(limit=LIMIT) as connection:
            given_up = await failures.give_up(
                connection, cause, after=after, last=extent.last, limit=DISCARDED_AT_ONCE
            )
        if not given_up:
            return discarded
        after, discarded = given_up[-1], discarded + len(given_up)


async def retry_group(
    database: Database,
    cause: Cause,
    *,
    actor: str,
    rate: float = RATE,
    patience: timedelta = timedelta(minutes=1),
) -> AsyncGenerator[Progress, None]:
    """Make the dead letters of one cause due, at most `rate` a second, and watch what comes.

    Ends once each was tried; or before, and then says why: the failures return, nothing is
    delivered to the callback now, or nothing was tried for `patience`. Whoever ends it, and
    however, what was not made due is a dead letter still: call it again to go on. Several
    at once share the work.
    """
    if not rate > 0:
        raise NotAllowed("a rate is how many a second, so it must be above 0")
    details: dict[str, object] = {"rate": rate}
    extent = await _begin(database, cause, "failures.retried", actor=actor, details=details)
    run = _Retry(database, cause, extent, rate=rate, patience=patience)
    try:
        yield run.progress()
        while not await run.is_over():
            yield run.progress()
            await asyncio.sleep(TICK.total_seconds())
        yield run.progress()
    finally:
        with suppress(*DatabaseError):
            await _write_result(database, cause, run.progress(), actor=actor)


async def _begin(
    database: Database, cause: Cause, action: str, *, actor: str, details: dict[str, object]
) -> Extent:
    """Find what there is to do, and write down that somebody does it."""
    async with database.begin(limit=COUNTING) as connection:
        extent = await failures.measure(connection, cause)
        if extent is None:
            raise NotFound(
                f"there are no dead letters of {_name(cause)}: `deliveries failures` lists "
                "those there are"
            )
        noted = {"callback": extent.callback, "count": extent.count, **details}
        if cause.sight != EVERYTHING:
            noted |= {"accounts": cause.sight.accounts, "tenant": cause.sight.tenant}
        await deliveries.audit(
            connection, actor=actor, action=action, subject=_subject(cause), details=noted
        )
    return extent


async def _write_result(
    database: Database, cause: Cause, progress: Progress, *, actor: str
) -> None:
    is_cut_off = progress.stopped is None and progress.retried < progress.total
    details = {
        "retried": progress.retried,
        "done": progress.done,
        "failed": progress.failed,
        "waiting": progress.waiting,
        "stopped": "interrupted" if is_cut_off else progress.stopped,
    }
    async with database.begin(limit=LIMIT) as connection:
        await deliveries.audit(
            connection,
            actor=actor,
            action="failures.retry_ended",
            subject=_subject(cause),
            details=details,
        )


def _subject(cause: Cause) -> str:
    return f"failure:{cause.fingerprint or '-'}"


def _name(cause: Cause) -> str:
    if cause.fingerprint is None:
        return f"callback {cause.callback!r} without a fingerprint"
    return f"fingerprint {cause.fingerprint!r}"


class _Retry:
    """One retry of one group, while it goes on: what is left, due, and ended."""

    def __init__(
        self,
        database: Database,
        cause: Cause,
        extent: Extent,
        *,
        rate: float,
        patience: timedelta,
    ) -> None:
        self._database = database
        self._cause = cause
        self._extent = extent
        self._pace = Pace(rate, now=_clock())
        self._most_waiting = min(MOST_WAITING, max(50, math.ceil(5 * rate)))
        self._patience = patience.total_seconds()
        self._moved_at = _clock()
        self._after = FIRST
        self._is_read = False
        self._left: deque[Letter] = deque()
        # Each with the attempts it had: one more means that it was tried.
        self._waiting: dict[UUID, int] = {}
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._total, self._retried, self._done, self._failed = extent.count, 0, 0, 0
        self._stopped: str | None = None

    def progress(self) -> Progress:
        return Progress(
            total=self._total,
            retried=self._retried,
            done=self._done,
            failed=self._failed,
            waiting=len(self._waiting),
            stopped=self._stopped,
        )

    async def is_over(self) -> bool:
        """Look what came of it, and go on a little unless something speaks against it."""
        flow = await self._look()
        self._stopped = _obstacle(self._extent, flow) or self._returning() or self._untried()
        if self._stopped is None:
            await self._take()
        return self._stopped is not None or not (self._waiting or self._left)

    async def _look(self) -> Flow | None:
        async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
            flows = await pauses.read(connection)
            found = await failures.look(connection, self._waiting)
        for id_, attempts in list(self._waiting.items()):
            self._note(id_, attempts, *found.get(id_, ("gone", 0)))
        return flows.get(self._extent.callback)

    def _note(self, id_: UUID, attempts: int, state: str, tried: int) -> None:
        if state == RUNNING:
            self._moved_at = _clock()
        elif state != PENDING or tried > attempts:
            # Discarded or parked meanwhile, it is nobody's failure.
            del self._waiting[id_]
            self._moved_at = _clock()
            if state in {DONE, DEAD, PENDING}:
                self._recent.append(state == DONE)
                self._done += state == DONE
                self._failed += state != DONE

    def _returning(self) -> str | None:
        """Say so if the failures have returned."""
        failed = self._recent.count(False)
        if len(self._recent) < FEW or 2 * failed < len(self._recent):
            return None
        return f"{failed} of the last {len(self._recent)} failed again: the cause is still there"

    def _untried(self) -> str | None:
        if not self._waiting or _clock() - self._moved_at < self._patience:
            return None
        return f"nothing was tried for {self._patience:.0f} s: see that a worker runs"

    async def _take(self) -> None:
        """Make the next ones due, as many as the pace allows."""
        count = min(self._pace.allowed(_clock()), self._most_waiting - len(self._waiting))
        if not self._left and not self._is_read:
            await self._read()
        letters = [self._left.popleft() for _ in range(min(count, len(self._left)))]
        if not letters:
            return
        async with self._database.begin(limit=LIMIT) as connection:
            ours = set(await failures.revive(connection, letters))
        if not self._waiting:
            self._moved_at = _clock()
        self._waiting |= {letter.id: letter.attempts for letter in letters if letter.id in ours}
        self._retried += len(ours)
        self._total -= len(letters) - len(ours)

    async def _read(self) -> None:
        async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
            found = await failures.page(
                connection, self._cause, after=self._after, last=self._extent.last, limit=BLOCK
            )
        if found:
            self._after = found[-1].id
        # The earlier event of an envelope goes first, whichever of them died first.
        self._left.extend(sorted(found, key=lambda letter: (letter.sequence or 0, letter.id)))
        if len(found) < BLOCK:
            # Somebody else may have taken some since they were counted.
            self._is_read, self._total = True, self._retried + len(self._left)


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _obstacle(extent: Extent, flow: Flow | None) -> str | None:
    """Say what keeps everything from this callback, if anything does."""
    if flow is None or not is_served(flow):
        return f"no process serves {extent.callback!r} any more"
    return describe_hold(flow)


class Pace:
    """So many a second; what was not used is not saved up."""

    def __init__(self, rate: float, *, now: float) -> None:
        self._rate = rate
        self._longest = TICK.total_seconds() + 1 / rate
        self._since = now - 1 / rate

    def allowed(self, now: float) -> int:
        """Say how many may go now, and count them as gone."""
        self._since = max(self._since, now - self._longest)
        # The sum of many small steps falls short of a whole one by a hair.
        count = int((now - self._since) * self._rate + 1e-6)
        self._since += count / self._rate
        return count
