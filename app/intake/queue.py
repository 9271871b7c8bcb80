"""Group commit: requests that arrive together share a transaction.

Whoever arrives while a commit is under way waits for the next one. What has gathered is
shared among as many transactions as may run side by side, if it is enough for more than
one. Alone, a request waits for nobody. The queue is bounded, every wait has an end, and a
sender that goes away cancels nothing.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from app.errors import NotDurable
from app.intake.projection import Fact, Interested, Projection
from app.intake.record import record, record_news
from app.intake.submission import OnAnswer, Receipt, Submission, understand
from app.store.envelopes import EnvelopeKey, EnvelopesBusy
from app.store.events import Claim
from app.store.session import (
    Database,
    DatabaseError,
    KeptConnections,
    Limits,
    blames_data,
    is_disconnect,
    sqlstate,
)
from app.telemetry import Throttle, get_logger

log = get_logger("intake")

# A database that is away refuses every batch; some lines tell it all.
_refusals = Throttle(per_second=10)
# Parsing more than this would hold up the loop, and with it everybody else.
LARGE_BODY = 64 * 1024
# While so many events wait for the next commit, other work in this process should wait, too.
PRESSURE = 8
# Fewer than these are not worth a transaction of their own beside another.
WORTHWHILE = 8
# For so long, in seconds, a batch of that many says that there will be more.
BUSY = 0.2
# Nobody's rows are waited for for long: what is held goes to a lane of its own.
DATABASE_LIMITS = Limits(lock=timedelta(milliseconds=100))
_LOCK_NOT_AVAILABLE = "55P03"
_SERIALIZATION = ("40001", "40P01")
_MAX_CONFLICT_RETRIES = 3
_SLOW_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How much may wait, how much shares a transaction, and for how long.

    `answer` counts from the last byte of the body; `transaction` lies below it, so that
    a sender is told about a failed transaction rather than about a late one.
    """

    events: int = 4096
    bytes: int = 64 * 1024 * 1024
    batch_events: int = 256
    batch_bytes: int = 8 * 1024 * 1024
    answer: timedelta = timedelta(milliseconds=4500)
    transaction: timedelta = timedelta(milliseconds=3500)
    slow_lanes: int = 3
    transactions: int = 3


class Intake:
    """Takes authentic bodies, and gives each a receipt once its event is on disk."""

    def __init__(
        self,
        database: Database,
        *,
        interested: Interested,
        on_owed: Callable[[set[str]], None] = lambda _: None,
        on_recorded: Callable[[Sequence[Fact], Sequence[float]], None] = lambda *_: None,
        limits: IntakeLimits | None = None,
    ) -> None:
        self._database = database
        self._limits = limits or IntakeLimits()
        # While nothing is written, one connection is left to others, however few there are.
        most = min(self._limits.transactions, database.size - 1)
        self._kept = KeptConnections(database, most=most)
        self._interested = interested
        self._on_owed = on_owed
        self._on_recorded = on_recorded
        self._waiting: deque[Submission] = deque()
        self._outstanding: deque[Submission] = deque()
        self._pending_events = 0
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        # Events whose envelope or identity somebody holds: they wait apart, and stall nobody.
        self._slow: dict[EnvelopeKey | Claim, deque[Submission]] = {}
        self._slow_slots = asyncio.Semaphore(self._limits.slow_lanes)
        # What transactions carry that are under way just now.
        self._carried: list[list[Submission]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._busy_until = 0.0
        # True while the loop that would commit has failed and is not running again yet.
        self._is_down = False

    @property
    def is_pressed(self) -> bool:
        """True while events wait for a transaction of their own; may be asked by any thread."""
        return len(self._waiting) >= PRESSURE

    @property
    def is_busy(self) -> bool:
        """True while one batch of many follows the other; may be asked by any thread.

        At the moment between two of them nobody waits, and yet it is no time for other work.
        """
        return self.is_pressed or time.monotonic() < self._busy_until

    @property
    def pending(self) -> tuple[int, int]:
        """How many events wait for their answer, and how many bytes they are."""
        return self._pending_events, self._pending_bytes

    async def record(self, body: bytes, *, account: str, key_label: str) -> Receipt:
        """Record one authentic body; return once it is durable.

        Raises `NotDurable` if that is not known in time, or if too much is waiting. The
        event may still commit then; the sender's next try is a duplicate.
        """
        answered: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        on_answer = partial(_fulfil, answered)
        if len(body) <= LARGE_BODY:
            self.submit(body, account=account, key_label=key_label, on_answer=on_answer)
        else:
            deadline = self._admit(len(body))
            try:
                async with asyncio.timeout_at(deadline):
                    submission = await asyncio.to_thread(
                        understand, body, account=account, key_label=key_label, received_at=_now()
                    )
                # Meanwhile the last batch may have gone.
                self._require_open()
            except BaseException as error:
                self._dismiss(len(body))
                if isinstance(error, TimeoutError):
                    raise NotDurable("late") from None
                raise
            self._submit(submission, deadline=deadline, on_answer=on_answer)
        return await answered

    def submit(self, body: bytes, *, account: str, key_label: str, on_answer: OnAnswer) -> None:
        """Begin to record one small body; `on_answer` is told once how it ended.

        Raises `NotDurable` at once if too much is waiting, and then tells nobody.
        """
        deadline = self._admit(len(body))
        try:
            submission = understand(body, account=account, key_label=key_label, received_at=_now())
        except BaseException:
            self._dismiss(len(body))
            raise
        self._submit(submission, deadline=deadline, on_answer=on_answer)

    def _admit(self, size: int) -> float:
        """Count one more that waits; give the time, by the loop's clock, of its answer."""
        limits = self._limits
        self._require_open()
        if self._pending_events >= limits.events or self._pending_bytes + size > limits.bytes:
            raise NotDurable("queue_full", retry_after=timedelta(seconds=1))
        self._pending_events += 1
        self._pending_bytes += size
        return asyncio.get_running_loop().time() + limits.answer.total_seconds()

    def _dismiss(self, size: int) -> None:
        self._pending_events -= 1
        self._pending_bytes -= size

    def _require_open(self) -> None:
        if self._is_closed or self._is_down:
            raise NotDurable("shutting_down")

    def _submit(self, submission: Submission, *, deadline: float, on_answer: OnAnswer) -> None:
        submission.deadline, submission.on_answer = deadline, on_answer
        self._outstanding.append(submission)
        lane = self._slow.get(_lane_of(submission)) if self._slow else None
        if lane is not None:
            lane.append(submission)
        else:
            self._waiting.append(submission)
            self._arrived.set()

    def _answer(self, submission: Submission, said: Receipt | NotDurable) -> None:
        on_answer, submission.on_answer = submission.on_answer, None
        if on_answer is not None:
            self._dismiss(len(submission.body))
            # One who cannot be told must not keep the others from being told.
            try:
                on_answer(said)
            except Exception:
                with suppress(Exception):
                    log.exception("announcement.failed")

    async def run(self) -> None:
        """Commit what arrives, for ever; ends when `close` is called and all is answered."""
        self._is_down = False
        try:
            # One that fails ends the other: nobody must wait for a loop that is not there.
            async with asyncio.TaskGroup() as group:
                reaper = group.create_task(self._reap())
                await self._commit_arrivals(group)
                reaper.cancel()
        finally:
            self._is_down = True
            self._waiting.clear()
            await self._kept.close()
            self._refuse(list(self._outstanding), "shutting_down")

    async def _commit_arrivals(self, group: asyncio.TaskGroup) -> None:
        while not (self._is_closed and not self._waiting):
            await self._arrived.wait()
            self._arrived.clear()
            while self._is_time() and (batch := self._gather()):
                if len(batch) >= PRESSURE:
                    self._busy_until = time.monotonic() + BUSY
                self._carried.append(batch)
                self._keep(group.create_task(self._carry(batch)))
        # The last batches may open lanes while they are waited for.
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_time(self) -> bool:
        """True if a transaction may start now: alone, or beside one that carries few more.

        While the database works on one, this process can make the next; but two small ones
        cost more than one of both.
        """
        if len(self._carried) >= self._limits.transactions:
            return False
        return all(len(self._waiting) >= len(batch) / 2 for batch in self._carried)

    def _gather(self) -> list[Submission]:
        """Take what waits, but for events whose envelope is just being written: they come next."""
        most = self._share()
        written = {s.envelope_key for batch in self._carried for s in batch} - {None}
        if written.isdisjoint(s.envelope_key for s in self._waiting):
            return self._take(self._waiting, most)
        later = [s for s in self._waiting if s.envelope_key in written]
        free = deque(s for s in self._waiting if s.envelope_key not in written)
        batch = self._take(free, most)
        self._waiting = deque([*later, *free])
        return batch

    def _share(self) -> int:
        """Say how many events a transaction takes, so that those beside it get as many.

        If one took all, their senders would be answered together, send again together, and this
        process and the database would wait for each other in turns.
        """
        most = self._limits.batch_events
        if not self._database.is_postgresql:
            # There is one who writes, and whatever it does at once is cheaper.
            return most
        free = self._limits.transactions - len(self._carried)
        shares = max(1, min(free, len(self._waiting) // WORTHWHILE))
        return min(most, math.ceil(len(self._waiting) / shares))

    async def _carry(self, batch: list[Submission]) -> None:
        try:
            await self._commit(batch)
        finally:
            self._carried.remove(batch)
            self._arrived.set()

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Take nothing new; what is waiting is still committed."""
        self._is_closed = True
        self._arrived.set()

    def _take(self, queue: deque[Submission], most: int) -> list[Submission]:
        batch: list[Submission] = []
        size = 0
        while queue and len(batch) < most and size < self._limits.batch_bytes:
            submission = queue.popleft()
            if not _is_answered(submission):
                batch.append(submission)
                size += len(submission.body)
        return batch

    async def _commit(self, batch: Sequence[Submission]) -> None:
        """Record `batch`; whatever happens, each submission gets its answer."""
        try:
            await self._record(batch)
        except EnvelopesBusy as error:
            rest = [s for s in batch if s.envelope_key not in error.keys]
            self._detour(s for s in batch if s.envelope_key in error.keys)
            if rest:
                await self._commit(rest)
        except Exception as error:  # noqa: BLE001  # the fence of one batch: every sender is answered
            await self._recover(batch, error)

    async def _recover(self, batch: Sequence[Submission], error: Exception) -> None:
        """Halve a batch that fails because of some of its events, until these are alone."""
        is_waiting = sqlstate(error) == _LOCK_NOT_AVAILABLE
        if not (is_waiting or blames_data(error)):
            self._refuse(batch, _slug(error), error=error)
        elif len(batch) > 1:
            middle = len(batch) // 2
            await self._commit(batch[:middle])
            await self._commit(batch[middle:])
        elif is_waiting:
            self._detour(batch)
        else:
            await self._quarantine(batch[0], error)

    async def _record(self, batch: Sequence[Submission]) -> None:
        """Run the transaction, again where another try may help."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.transaction.total_seconds()
        tries = 0
        while True:
            tries += 1
            try:
                projection = await self._news(batch, end=end) if tries == 1 else None
                if projection is None:
                    projection = await self._transaction(batch, end=end)
            except DatabaseError as error:
                if not _is_worth_another_try(error, tries) or loop.time() > end - 0.2:
                    raise
                # The winner of a deadlock needs a moment; equal pauses would meet again.
                await asyncio.sleep(random.uniform(0, 0.02 * tries))  # noqa: S311  # dice, no secret
            else:
                self._announce(projection)
                return

    async def _news(self, batch: Sequence[Submission], *, end: float) -> Projection | None:
        """Record `batch` the short way; None if it takes the long one."""
        if not self._database.splits:
            return None
        try:
            async with self._kept.begin(limit=self._left(end)) as connection:
                return await record_news(connection, batch, interested=self._interested, now=_now())
        except Exception as error:
            # Which row is held, or which value is refused, the long way tells.
            if blames_data(error) or sqlstate(error) == _LOCK_NOT_AVAILABLE:
                return None
            raise

    async def _transaction(self, batch: Sequence[Submission], *, end: float) -> Projection:
        """Record `batch` under locks."""
        work = partial(record, batch=batch, interested=self._interested, now=_now())
        return await self._database.run(work, limit=self._left(end))

    @staticmethod
    def _left(end: float) -> timedelta:
        return timedelta(seconds=max(0.1, end - asyncio.get_running_loop().time()))

    def _announce(self, projection: Projection) -> None:
        """Answer the senders first, and then tell everybody else."""
        for fact in projection.facts:
            self._answer(fact.submission, fact.receipt)
        # The events are on disk: whatever fails from here on must not look like a failure
        # to their senders.
        try:
            if projection.deliveries:
                self._on_owed({callback for _, callback, *_ in projection.deliveries})
            self._on_recorded(projection.facts, self._waits(projection.facts))
            log.info("webhook.received", each=map(_told, projection.facts))
        except Exception:
            with suppress(Exception):
                log.exception("announcement.failed")

    def _waits(self, facts: Sequence[Fact]) -> list[float]:
        """Say for how long the senders have waited, in seconds."""
        since = asyncio.get_running_loop().time() + self._limits.answer.total_seconds()
        return [since - fact.submission.deadline for fact in facts]

    async def _quarantine(self, submission: Submission, error: Exception) -> None:
        """Keep the bytes of the one event that the database refused for its data."""
        if submission.event is not None:
            submission.quarantine(f"sqlstate_{sqlstate(error) or type(error).__name__}")
            await self._commit([submission])
        else:
            self._refuse([submission], "refused_by_database", error=error)

    def _detour(self, submissions: Iterable[Submission]) -> None:
        """Send events that wait for somebody else's rows to a lane of their own."""
        for submission in submissions:
            key = _lane_of(submission)
            lane = self._slow.get(key)
            if lane is None:
                lane = self._slow[key] = deque()
                self._keep(asyncio.create_task(self._drain(key, lane)))
            lane.append(submission)

    async def _drain(self, key: EnvelopeKey | Claim, lane: deque[Submission]) -> None:
        """Try the events of one lane again and again, until their time is over."""
        try:
            while lane:
                await asyncio.sleep(_SLOW_PAUSE)
                async with self._slow_slots:
                    # Those that find it held once more come back to this lane.
                    if batch := self._take(lane, self._limits.batch_events):
                        await self._commit(batch)
        finally:
            del self._slow[key]

    async def _reap(self) -> None:
        """Answer in time those whose event is not known to be durable, whatever is broken."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.1)
            now = loop.time()
            # Deadlines are in the order of arrival, so the first that is not due ends it.
            while self._outstanding:
                first = self._outstanding[0]
                is_answered = _is_answered(first)
                if not is_answered and first.deadline > now:
                    break
                self._outstanding.popleft()
                if not is_answered:
                    self._refuse([first], "late")
            # Behind one that waits, those that are answered must not gather.
            if len(self._outstanding) > 2 * self._pending_events + 256:
                self._outstanding = deque(s for s in self._outstanding if not _is_answered(s))

    def _refuse(
        self, batch: Sequence[Submission], reason: str, *, error: Exception | None = None
    ) -> None:
        refused = [s for s in batch if not _is_answered(s)]
        for submission in refused:
            self._answer(submission, NotDurable(reason))
        # A log that cannot be written must not end the loop that commits.
        with suppress(Exception):
            _log_refusal(len(refused), reason, error)


def _log_refusal(count: int, reason: str, error: Exception | None) -> None:
    suppressed = _refusals.pass_or_count() if count else None
    if suppressed is not None:
        log.warning(
            "events.refused",
            reason=reason,
            count=count,
            suppressed=suppressed,
            error=type(error).__name__ if error else None,
            sqlstate=sqlstate(error) if error else None,
        )


def _now() -> datetime:
    return datetime.now(UTC)


def _lane_of(submission: Submission) -> EnvelopeKey | Claim:
    return submission.envelope_key or submission.claims[0]


def _is_answered(submission: Submission) -> bool:
    return submission.on_answer is None


def _fulfil(answered: asyncio.Future[Receipt], said: Receipt | NotDurable) -> None:
    # Whoever waited may have gone.
    if answered.done():
        return
    if isinstance(said, NotDurable):
        answered.set_exception(said)
    else:
        answered.set_result(said)


def _is_worth_another_try(error: BaseException, tries: int) -> bool:
    if sqlstate(error) in _SERIALIZATION:
        return tries <= _MAX_CONFLICT_RETRIES
    # A pooled connection may have died with its server; the next one is fresh.
    return is_disconnect(error) and tries == 1


def _slug(error: BaseException) -> str:
    if isinstance(error, DatabaseError):
        return "late" if isinstance(error, TimeoutError) else "database"
    return "defect"


def _told(fact: Fact) -> dict[str, Any]:
    """Say in the log what became of one event."""
    submission, event = fact.submission, fact.submission.event
    return {
        "outcome": fact.receipt.outcome.value,
        "event_id": str(fact.receipt.event_id),
        "event_type": event.type if event else None,
        "envelope_id": event.envelope_id if event else None,
        "fields_status": fact.fields_status,
        "effect": fact.effect.value if fact.effect else None,
        "reason": submission.reason,
        "account": submission.account,
        "key": submission.key_label,
    }
