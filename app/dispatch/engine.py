"""The dispatch loop: claims, renews, settles, sweeps; it runs no code of an author.

Each duty is a step that is repeated for ever. A step that fails is repeated after a
pause; nothing that the database does ends the loop.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from app.dispatch import blame
from app.dispatch.attempt import Call, Dead, Outcome, exhausted
from app.dispatch.capacity import share
from app.dispatch.crew import Crew
from app.dispatch.guard import Guard
from app.dispatch.options import DispatchOptions
from app.dispatch.registry import Callback
from app.dispatch.settling import Attempted, Settler
from app.dispatch.transaction import Transactions
from app.store import callbacks as subscriptions
from app.store import claims, contents, deliveries
from app.store.claims import Claim, Held, Room
from app.store.contents import Content
from app.store.session import Database
from app.telemetry import get_logger

log = get_logger("dispatch")

PARKED_AT_ONCE = 1000
# Seconds for which a claim waits, if there is room for a few only.
GATHER = 0.005
# So often, for as long, a claim waits if webhooks are waiting in the same process.
DEFERENCES = 40
# Of the time to stop, what is kept for writing down how calls ended.
LAST_WORDS = timedelta(seconds=2)


class Engine:
    """Everything that happens on the dispatch loop, between `run` and its end."""

    def __init__(
        self,
        database: Database,
        callbacks: Sequence[Callback],
        *,
        options: DispatchOptions,
        worker: str,
        is_pressed: Callable[[], bool] = lambda: False,
        on_attempted: Attempted = lambda _: None,
    ) -> None:
        self._is_pressed = is_pressed
        self._database = database
        self._callbacks = {callback.name: callback for callback in callbacks}
        self._options = options
        self._worker = worker
        self._turn: Any = nullcontext() if database.is_postgresql else asyncio.Lock()
        self._work = asyncio.Event()
        self._is_registered = False
        self._is_idle = asyncio.Event()
        self._is_stopping = asyncio.Event()
        self._hungry: set[str] = set(self._callbacks)
        self._is_gathering = False
        self._turns = 0
        # By the monotonic clock; not before, it is looked for deliveries to postpone.
        self._postpone_at = 0.0
        # When the loop was last seen to turn, by the monotonic clock.
        self.turned = time.monotonic()
        self.troubles: dict[str, str] = {}
        self.totals: dict[str, int] = {"claimed": 0, "ended": 0, "released": 0}
        self.settler = Settler(
            self._begin, worker=worker, on_settled=self._work.set, on_attempted=on_attempted
        )
        self.guard = Guard(
            callbacks,
            self._begin,
            every=options.guard_every,
            lease=options.lease,
            on_shut=self._leave_alone,
        )
        self.crew = Crew(
            asyncio.get_running_loop(),
            options,
            transactions=lambda: Transactions(database.address, worker=worker),
            on_end=self._collect,
        )

    def wake(self) -> None:
        """Look for due deliveries now."""
        self._work.set()

    def stop(self) -> None:
        """Begin to end."""
        self._is_stopping.set()
        self._work.set()

    async def run(self, *, grace: Callable[[], timedelta]) -> None:
        """Work until `stop`, then give back or finish what was claimed, within `grace`."""
        claiming = asyncio.create_task(self._forever("claim", self._claim_step))
        duties = [
            asyncio.create_task(self._forever(name, step))
            for name, step in (
                ("settle", self.settler.step),
                ("guard", self.guard.step),
                ("renew", self._renew_step),
                ("watch", self._watch_step),
                ("tidy", self._tidy_step),
            )
        ]
        try:
            await self._supervise([claiming, *duties])
            await self._wind_up(claiming, grace())
        finally:
            # A duty outlives a stray cancellation, but not one at the end.
            self._is_stopping.set()
            await _cancel([claiming, *duties])
            self.crew.close(LAST_WORDS.total_seconds() / 2)

    async def _supervise(self, duties: Sequence[asyncio.Task[None]]) -> None:
        # No duty ends by itself. If one does, all end, and readiness shows it.
        stopping = asyncio.create_task(self._is_stopping.wait())
        await asyncio.wait([stopping, *duties], return_when=asyncio.FIRST_COMPLETED)
        await _cancel([stopping])

    @asynccontextmanager
    async def _begin(
        self, *, is_reading: bool = False, is_split: bool = False
    ) -> AsyncIterator[Any]:
        # SQLite's writers take turns; those of one loop better than by polling the file.
        async with self._turn:
            limit = self._options.database_limit
            begun = self._database.begin(limit=limit, is_reading=is_reading, is_split=is_split)
            async with begun as connection:
                yield connection

    async def _forever(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while not (self._is_stopping.is_set() and name == "claim"):
            try:
                await step()
            except asyncio.CancelledError:
                if self._is_stopping.is_set():
                    raise
                failures = await self._pause(name, "the step was cancelled", failures)
            except Exception as error:  # noqa: BLE001  # the fence: no error ends a duty
                failures = await self._pause(name, blame.summarise(error), failures)
            else:
                if self.troubles.pop(name, None):
                    log.info("dispatch.resumed", duty=name, failures=failures)
                failures = 0

    async def _pause(self, name: str, trouble: str, failures: int) -> int:
        if name not in self.troubles:
            log.warning("dispatch.interrupted", duty=name, error=trouble)
        self.troubles[name] = trouble
        longest = min(5.0, 0.1 * 2 ** min(failures, 10))
        await self._rest(longest * random.uniform(0.5, 1.0))  # noqa: S311  # spreads, hides nothing
        return failures + 1

    async def _rest(self, seconds: float) -> None:
        """Sleep; the beginning of the end cuts it short."""
        if self._is_stopping.is_set():
            await asyncio.sleep(seconds)
        else:
            await _wait(self._is_stopping, seconds)

    async def _claim_step(self) -> None:
        self._work.clear()
        await self._let_others_first()
        if not (self._is_registered and await self._claim()):
            await _wait(self._work, self._options.poll.total_seconds())

    async def _let_others_first(self) -> None:
        """Wait while webhooks wait for their answer, but not for ever."""
        for _ in range(DEFERENCES):
            if not self._is_pressed():
                return
            await self._rest(GATHER)

    async def _claim(self) -> bool:
        """Claim what there is room for; True if there is likely more, and room for it."""
        rooms = self._rooms()
        if not rooms or not await self._is_worth_it(rooms):
            return False
        rooms, claimed, found = await self._take(rooms)
        self._note_hunger(rooms, claimed)
        if self._is_stopping.is_set():
            await self._give_back([claim.held for claim in claimed])
            return False
        self._start(claimed, found)
        return await self._postpone(rooms) or (bool(self._hungry) and bool(claimed))

    async def _take(self, rooms: list[Room]) -> tuple[list[Room], list[Claim], dict[Any, Content]]:
        claimed: list[Claim] = []
        try:
            async with self._begin(is_split=True) as connection:
                rooms = await self.guard.admit(connection, rooms)
                claimed = await self._claim_into(connection, rooms)
                self.guard.probes.begin(claimed)
                await self.guard.probes.tell(connection)
                found = await contents.load(connection, [c.id for c in claimed]) if claimed else {}
        except BaseException:
            await self._undo([claim.held for claim in claimed])
            raise
        return rooms, claimed, found

    async def _undo(self, claimed: Sequence[Held]) -> None:
        """Let others have what a claim took that then failed."""
        self.guard.probes.begin([])
        self.guard.probes.release(claimed)
        # What was rolled back may be somebody else's by now, under the very same token.
        if self._database.splits:
            await self._give_back(claimed)

    async def _claim_into(self, connection: Any, rooms: Sequence[Room]) -> list[Claim]:
        if not rooms:
            return []
        return await claims.claim(
            connection,
            rooms,
            worker=self._worker,
            lease=self._options.lease,
            patience=self._options.order_max_wait,
        )

    async def _leave_alone(self, callbacks: set[str]) -> None:
        """Give back what was claimed for callbacks that are paused, or whose breaker is open."""
        await self._give_back(self.crew.withdraw(callbacks))

    async def _postpone(self, rooms: Sequence[Room]) -> bool:
        """Clear the way if a claim found too little; True if there may be more behind it."""
        short = [r for r in rooms if r.is_ordered and r.callback not in self._hungry]
        if not short or time.monotonic() < self._postpone_at:
            return False
        async with self._begin() as connection:
            postponed = await claims.postpone(
                connection, short, patience=self._options.order_max_wait
            )
        # A claim is often short because there is no more; that need not be asked each time.
        pause = 0.0 if postponed else self._options.poll.total_seconds()
        self._postpone_at = time.monotonic() + pause
        return bool(postponed)

    def _rooms(self) -> list[Room]:
        served = [
            callback
            for callback in self._callbacks.values()
            if self.guard.lets_through(callback.name)
            and not (callback.is_async and self.crew.is_blocked)
        ]
        self._turns += 1
        first = self._turns % len(served) if served else 0
        return share(served[first:] + served[:first], self.crew.load(self._hungry))

    async def _is_worth_it(self, rooms: Sequence[Room]) -> bool:
        if self._database.is_postgresql:
            return True
        async with self._begin(is_reading=True) as connection:
            return await claims.is_any_due(connection, [room.callback for room in rooms])

    def _note_hunger(self, rooms: Sequence[Room], claimed: Sequence[Claim]) -> None:
        taken: dict[str, int] = {}
        for claim in claimed:
            taken[claim.callback] = taken.get(claim.callback, 0) + 1
        for room in rooms:
            if taken.get(room.callback, 0) >= room.limit:
                self._hungry.add(room.callback)
            else:
                self._hungry.discard(room.callback)

    def _start(self, claimed: Sequence[Claim], found: dict[Any, Content]) -> None:
        calls = [Call(self._callbacks[c.callback], c, found.get(c.id)) for c in claimed]
        self.totals["claimed"] += len(calls)
        now = datetime.now(UTC)
        spent = [call for call in calls if _is_exhausted(call)]
        self.settler.put([Outcome(call, _used_up(call), None, now) for call in spent])
        self.guard.probes.release(call.claim.held for call in spent)
        self._is_idle.clear()
        self.crew.start(call for call in calls if not _is_exhausted(call))

    def _collect(self, outcomes: list[Outcome]) -> None:
        self.totals["ended"] += len(outcomes)
        self.settler.put(outcomes)
        self.guard.note(outcomes)
        if self._hungry:
            self._gather()
        if not self.crew.held:
            self._is_idle.set()

    def _gather(self) -> None:
        """Claim again: now if there is room for many, else when there may be."""
        load = self.crew.load(self._hungry)
        if load.free >= sum(load.running.values()):
            self._work.set()
        elif not self._is_gathering:
            self._is_gathering = True
            asyncio.get_running_loop().call_later(GATHER, self._gathered)

    def _gathered(self) -> None:
        self._is_gathering = False
        self._work.set()

    async def _renew_step(self) -> None:
        if held := self.crew.held:
            await self._renew(held)
        # Not before, nor after an error: with two such waits the leases would be over.
        await asyncio.sleep(self._options.lease.total_seconds() / 3)

    async def _renew(self, held: Sequence[Held]) -> None:
        async with self._begin() as connection:
            ours = await claims.renew(connection, held, lease=self._options.lease)
            await self.guard.probes.renew(connection)
        lost = self.crew.abandon(key for key in held if key[0] not in ours)
        for job in lost:
            log.warning("lease.lost", delivery_id=str(job.call.claim.id))
        self.guard.probes.release(job.call.claim.held for job in lost)

    async def _watch_step(self) -> None:
        self.turned = time.monotonic()
        await asyncio.sleep(self._options.watch_every.total_seconds())
        self.crew.watch()
        # Not at once, or they would be claimed again and again.
        await self._give_back(self.crew.take_refused())
        await self._give_back(self.crew.withdraw_ahead())
        if self.crew.is_blocked:
            # Others may have a loop that turns.
            await self._give_back(self.crew.withdraw())

    async def _tidy_step(self) -> None:
        if not self._is_registered:
            await self._register()
        await asyncio.sleep(self._options.sweep_every.total_seconds())
        while await self._touch() or await self._sweep() or await self._park():
            self._work.set()

    async def _register(self) -> None:
        async with self._begin() as connection:
            wanted = [callback.subscription for callback in self._callbacks.values()]
            await subscriptions.register(connection, wanted)
        self._is_registered = True
        self._work.set()
        log.info("callbacks.registered", callbacks=sorted(self._callbacks))

    async def _touch(self) -> bool:
        names = list(self._callbacks)
        async with self._begin() as connection:
            is_known = await subscriptions.touch(connection, names)
            unparked = await subscriptions.unpark(connection, names)
        if not is_known:
            # A database that was restored from before has never heard of us.
            await self._register()
        return bool(unparked)

    async def _sweep(self) -> bool:
        async with self._begin() as connection:
            swept = await subscriptions.sweep(connection, every=self._options.sweep_every)
        if swept.owed:
            log.info("deliveries.swept", owed=swept.owed)
            self._work.set()
        return swept.is_behind and swept.owed > 0

    async def _park(self) -> bool:
        async with self._begin() as connection:
            parked = await deliveries.park(
                connection, after=self._options.park_after, limit=PARKED_AT_ONCE
            )
        if parked:
            log.warning("deliveries.parked", parked=parked)
        return parked == PARKED_AT_ONCE

    async def _wind_up(self, claiming: asyncio.Task[None], grace: timedelta) -> None:
        """Stop claiming; give back what has not begun; wait; give back what has not ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(grace.total_seconds()):
                await asyncio.wait([claiming])
                await self._give_back(self.crew.withdraw())
                await self._until_idle()
        left = self.crew.take_refused() + self.crew.withdraw() + self.crew.held
        self.crew.abandon(left)
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS.total_seconds()):
                await self._give_back(left)
                await self.settler.wait_until_empty()

    async def _until_idle(self) -> None:
        while self.crew.held:
            self._is_idle.clear()
            await self._is_idle.wait()

    async def _give_back(self, held: Sequence[Held]) -> None:
        self.guard.probes.release(held)
        while held:
            try:
                async with self._begin() as connection:
                    await claims.release(connection, held)
                    await self.guard.probes.tell(connection)
            except Exception as error:  # noqa: BLE001  # tried until the time to stop is over
                log.warning("release.failed", error=blame.summarise(error))
                await asyncio.sleep(0.2)
            else:
                self.totals["released"] += len(held)
                log.info("deliveries.released", released=len(held))
                return


def _is_exhausted(call: Call) -> bool:
    return call.claim.attempt - call.claim.spent > call.callback.max_attempts


def _used_up(call: Call) -> Dead:
    # Lost with workers that died, or counted when the callback still allowed more.
    return exhausted(call, counted=call.claim.attempt - call.claim.spent - 1)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    # Again and again: an error that is handled just then may swallow a cancellation.
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
