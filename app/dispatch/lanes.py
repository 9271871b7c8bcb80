"""Where callbacks run: an event loop in a thread for `async def`, threads for plain `def`.

No code of an author runs on the dispatch loop, so a callback that blocks holds up neither
the renewal of leases nor the rest of the service. A thread cannot be killed, though: one
that does not end is written off, and its end, if it ever comes, changes nothing.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from app.dispatch import attempt
from app.dispatch.attempt import Call, Outcome, Verdict
from app.dispatch.transaction import Transactions

# A thread that has had nothing to do for so long ends.
IDLE = 10.0


class Job:
    """One call, as it is seen from the threads that have to do with it."""

    __slots__ = (
        "_ticket",
        "began_at",
        "call",
        "is_submitted",
        "lane",
        "made",
        "outcome",
        "started",
        "task",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        # By the monotonic clock.
        self.made = time.monotonic()
        # False while it waits for one of the places.
        self.is_submitted = False
        self.lane: Lane | None = None
        self.task: asyncio.Task[None] | None = None
        # By the monotonic clock; None until it starts.
        self.started: float | None = None
        self.began_at: datetime | None = None
        self.outcome: Outcome | None = None
        self._ticket = [None]

    def take(self) -> bool:
        """Win or lose the right to start this call, or to see that it never starts.

        Two threads may ask at once; taking the last item of a list lets one win.
        """
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def start(self) -> None:
        """Note when the call begins."""
        self.began_at = datetime.now(UTC)
        self.started = time.monotonic()

    def finish(self, verdict: Verdict) -> None:
        """Note how the call ended."""
        self.outcome = Outcome(self.call, verdict, self.began_at, datetime.now(UTC))

    def cancel(self) -> None:
        """Ask the call to end; a plain `def` cannot be asked."""
        if self.lane is not None and self.task is not None:
            self.lane.call(self.task.cancel)


class Outbox:
    """Brings finished jobs to the dispatch loop: from any thread, many at a time."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[Job]], None]
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._jobs: deque[Job] = deque()
        self._is_called = False

    def put(self, job: Job) -> None:
        """Pass on one job; the loop is woken once for all that gather meanwhile."""
        self._jobs.append(job)
        if not self._is_called:
            self._is_called = True
            call(self._loop, self._empty)

    def _empty(self) -> None:
        # Before the look into the queue: what is put in later wakes the loop again.
        self._is_called = False
        jobs = []
        while self._jobs:
            jobs.append(self._jobs.popleft())
        self._deliver(jobs)


def call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Run `function` on a loop of another thread; one that is closed wants nothing any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


class Lane:
    """One event loop in a thread of its own, running any number of calls."""

    def __init__(
        self, report: Callable[[Job], None], *, transactions: Transactions, name: str
    ) -> None:
        self._report = report
        self._transactions = transactions
        self._jobs: set[Job] = set()
        self._is_retired = False
        self._beat = time.monotonic()
        self._is_asked = False
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True until it is retired and its last call has ended."""
        return self._thread.is_alive()

    def submit(self, jobs: list[Job]) -> None:
        """Start these calls."""
        for job in jobs:
            job.lane = self
        self.call(lambda: self._start(jobs))

    def call(self, function: Callable[[], object]) -> None:
        """Run a function on this loop, as soon as it turns."""
        call(self.loop, function)

    def silence(self) -> float:
        """Ask whether the loop turns; give the seconds for which it has not answered."""
        if not self._is_asked:
            self._is_asked = True
            self._beat = time.monotonic()
            self.call(self._answer)
        return time.monotonic() - self._beat

    def culprit(self) -> str:
        """Name the callback that is running right now: the one that blocks, if one does."""
        task = asyncio.current_task(self.loop)
        return next((j.call.callback.name for j in tuple(self._jobs) if j.task is task), "?")

    def retire(self) -> None:
        """End the thread once its calls have ended."""
        self.call(self._retire)

    def join(self, limit: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(limit)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        # An author's own task may raise what an event loop does not contain: SystemExit.
        while not self._is_over():
            with contextlib.suppress(BaseException):
                self.loop.run_forever()
        with contextlib.suppress(BaseException):
            _cancel_all(self.loop)
        with contextlib.suppress(BaseException):
            self.loop.run_until_complete(asyncio.wait_for(self._transactions.close(), 1))
        self.loop.close()

    def _is_over(self) -> bool:
        return self._is_retired and not self._jobs

    def _start(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._jobs.add(job)
            job.task = self.loop.create_task(self._attempt(job))

    async def _attempt(self, job: Job) -> None:
        # Not before: until now the job may be taken to a loop that turns.
        if job.take():
            job.start()
            job.finish(await attempt.run(job.call, self._transactions.open))
            self._report(job)
        self._jobs.discard(job)
        if self._is_over():
            self.loop.stop()

    def _answer(self) -> None:
        self._is_asked = False
        self._beat = time.monotonic()

    def _retire(self) -> None:
        self._is_retired = True
        if self._is_over():
            self.loop.stop()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 1))
    loop.run_until_complete(loop.shutdown_asyncgens())


class Threads:
    """Threads for plain functions: as many as there are calls, kept for a while when idle."""

    def __init__(self, report: Callable[[Job], None], *, name: str, idle: float = IDLE) -> None:
        self._report = report
        self._name = name
        self._limit = idle
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._lock = Lock()
        # Threads that wait for a job which nobody has put into the queue yet.
        self._idle = 0

    def submit(self, jobs: list[Job]) -> list[Job]:
        """Start these calls, each in a thread; give those for which there is none to be had."""
        return [job for job in jobs if not self._submit(job)]

    def _submit(self, job: Job) -> bool:
        # The thread comes first: a job in the queue without one would run at any odd time.
        try:
            if not self._reserve():
                Thread(target=self._work, name=self._name, daemon=True).start()
        except (RuntimeError, MemoryError):
            return False
        self._queue.put(job)
        return True

    def _reserve(self) -> bool:
        with self._lock:
            is_found = self._idle > 0
            self._idle -= is_found
            return is_found

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if job.take():
                job.start()
                job.finish(attempt.run_plain(job.call))
                self._report(job)
            with self._lock:
                self._idle += 1

    def _next(self) -> Job | None:
        while True:
            try:
                return self._queue.get(timeout=self._limit)
            except Empty:
                # If somebody counts on this thread, its job is on the way.
                if self._reserve():
                    return None
