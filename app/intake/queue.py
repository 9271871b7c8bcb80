"""Group commit: requests that arrive together share one transaction.

Whoever arrives while a commit is under way waits for the next one, which takes
everything that has gathered. Alone, a request waits for nobody. The queue is bounded,
every wait has an end, and a sender that goes away cancels nothing.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from app.errors import NotDurable
from app.intake.projection import Fact, Interested, Projection
from app.intake.record import record
from app.intake.submission import Receipt, Submission, understand
from app.store.envelopes import EnvelopeKey, EnvelopesBusy
from app.store.events import Claim
from app.store.session import (
    Database,
    DatabaseError,
    Limits,
    blames_data,
    is_disconnect,
    sqlstate,
)
from app.telemetry import Throttle, gathering, get_logger

log = get_logger("intake")

# A database that is away refuses every batch; some lines tell it all.
_refusals = Throttle(per_second=10)
# Parsing more than this would hold up the loop, and with it everybody else.
LARGE_BODY = 64 * 1024
# While so many events wait for the next commit, other work in this process should wait, too.
PRESSURE = 8
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
        self._interested = interested
        self._on_owed = on_owed
        self._on_recorded = on_recorded
        self._limits = limits or IntakeLimits()
        self._waiting: deque[Submission] = deque()
        self._outstanding: deque[Submission] = deque()
        self._pending_events = 0
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        # Events whose envelope or identity somebody holds: they wait apart, and stall nobody.
        self._slow: dict[EnvelopeKey | Claim, deque[Submission]] = {}
        self._slow_slots = asyncio.Semaphore(self._limits.slow_lanes)
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
        self._admit(len(body))
        end = asyncio.get_running_loop().time() + self._limits.answer.total_seconds()
        try:
            async with asyncio.timeout_at(end) if len(body) > LARGE_BODY else nullcontext():
                submission = await self._understand(body, account=account, key_label=key_label)
            return await self._submit(submission, deadline=end)
        except TimeoutError:
            raise NotDurable("late") from None
        finally:
            self._pending_events -= 1
            self._pending_bytes -= len(body)

    def _admit(self, size: int) -> None:
        limits = self._limits
        if self._is_closed or self._is_down:
            raise NotDurable("shutting_down")
        if self._pending_events >= limits.events or self._pending_bytes + size > limits.bytes:
            raise NotDurable("queue_full", retry_after=timedelta(seconds=1))
        self._pending_events += 1
        self._pending_bytes += size

    async def _understand(self, body: bytes, *, account: str, key_label: str) -> Submission:
        now = datetime.now(UTC)
        if len(body) <= LARGE_BODY:
            return understand(body, account=account, key_label=key_label, received_at=now)
        return await asyncio.to_thread(
            understand, body, account=account, key_label=key_label, received_at=now
        )

    async def _submit(self, submission: Submission, *, deadline: float) -> Receipt:
        # A large body was understood in a thread; meanwhile the last batch may have gone.
        if self._is_closed or self._is_down:
            raise NotDurable("shutting_down")
        submission.deadline = deadline
        receipt: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        submission.receipt = receipt
        self._outstanding.append(submission)
        lane = self._slow.get(_lane_of(submission))
        if lane is not None:
            lane.append(submission)
        else:
            self._waiting.append(submission)
            self._arrived.set()
        return await receipt

    async def run(self) -> None:
        """Commit what arrives, for ever; ends when `close` is called and all is answered."""
        self._is_down = False
        try:
            # One that fails ends the other: nobody must wait for a loop that is not there.
            async with asyncio.TaskGroup() as group:
                reaper = group.create_task(self._reap())
                await self._commit_arrivals()
                reaper.cancel()
        finally:
            self._is_down = True
            self._waiting.clear()
            self._refuse(list(self._outstanding), "shutting_down")

    async def _commit_arrivals(self) -> None:
        while not (self._is_closed and not self._waiting):
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take(self._waiting):
                if len(batch) >= PRESSURE:
                    self._busy_until = time.monotonic() + BUSY
                await self._commit(batch)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Take nothing new; what is waiting is still committed."""
        self._is_closed = True
        self._arrived.set()

    def _take(self, queue: deque[Submission]) -> list[Submission]:
        batch: list[Submission] = []
        size = 0
        limits = self._limits
        while queue and len(batch) < limits.batch_events and size < limits.batch_bytes:
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
                projection = await self._transaction(batch, seconds=end - loop.time())
            except DatabaseError as error:
                if not _is_worth_another_try(error, tries) or loop.time() > end - 0.2:
                    raise
                # The winner of a deadlock needs a moment; equal pauses would meet again.
                await asyncio.sleep(random.uniform(0, 0.02 * tries))  # noqa: S311  # dice, no secret
            else:
                self._announce(projection)
                return

    async def _transaction(self, batch: Sequence[Submission], *, seconds: float) -> Projection:
        limit = timedelta(seconds=max(0.1, seconds))
        async with self._database.begin(limit=limit) as connection:
            return await record(
                connection, batch, interested=self._interested, now=datetime.now(UTC)
            )

    def _announce(self, projection: Projection) -> None:
        """Answer the senders first, and then tell everybody else."""
        for fact in projection.facts:
            receipt = fact.submission.receipt
            if receipt is not None and not receipt.done():
                receipt.set_result(fact.receipt)
        # The events are on disk: whatever fails from here on must not look like a failure
        # to their senders.
        try:
            if projection.deliveries:
                self._on_owed({callback for _, callback, *_ in projection.deliveries})
            self._on_recorded(projection.facts, self._waits(projection.facts))
            with gathering():
                for fact in projection.facts:
                    _log_fact(fact)
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
                task = asyncio.create_task(self._drain(key, lane))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            lane.append(submission)

    async def _drain(self, key: EnvelopeKey | Claim, lane: deque[Submission]) -> None:
        """Try the events of one lane again and again, until their time is over."""
        try:
            while lane:
                await asyncio.sleep(_SLOW_PAUSE)
                async with self._slow_slots:
                    # Those that find it held once more come back to this lane.
                    await self._commit(self._take(lane))
        finally:
            del self._slow[key]

    async def _reap(self) -> None:
        """Answer in time those whose event is not known to be durable, whatever is broken."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.1)
            now = loop.time()
            # Deadlines are in the order of arrival, so the first that is not due ends it.
            while self._outstanding and (
                _is_answered(self._outstanding[0]) or self._outstanding[0].deadline <= now
            ):
                submission = self._outstanding.popleft()
                self._refuse([submission], "late")
            # Behind one that waits, those that are answered must not gather.
            if len(self._outstanding) > 2 * self._pending_events + 256:
                self._outstanding = deque(s for s in self._outstanding if not _is_answered(s))

    def _refuse(
        self, batch: Sequence[Submission], reason: str, *, error: Exception | None = None
    ) -> None:
        receipts = [s.receipt for s in batch if s.receipt is not None and not s.receipt.done()]
        for receipt in receipts:
            receipt.set_exception(NotDurable(reason))
        # A log that cannot be written must not end the loop that commits.
        with suppress(Exception):
            _log_refusal(len(receipts), reason, error)


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


def _lane_of(submission: Submission) -> EnvelopeKey | Claim:
    return submission.envelope_key or submission.claims[0]


def _is_answered(submission: Submission) -> bool:
    return submission.receipt is None or submission.receipt.done()


def _is_worth_another_try(error: BaseException, tries: int) -> bool:
    if sqlstate(error) in _SERIALIZATION:
        return tries <= _MAX_CONFLICT_RETRIES
    # A pooled connection may have died with its server; the next one is fresh.
    return is_disconnect(error) and tries == 1


def _slug(error: BaseException) -> str:
    if isinstance(error, DatabaseError):
        return "late" if isinstance(error, TimeoutError) else "database"
    return "defect"


def _log_fact(fact: Fact) -> None:
    submission, event = fact.submission, fact.submission.event
    log.info(
        "webhook.received",
        outcome=fact.receipt.outcome.value,
        event_id=str(fact.receipt.event_id),
        event_type=event.type if event else None,
        envelope_id=event.envelope_id if event else None,
        fields_status=fact.fields_status,
        effect=fact.effect.value if fact.effect else None,
        reason=submission.reason,
        account=submission.account,
        key=submission.key_label,
    )
