"""All calls under way in this process: started, watched, written off if they do not end."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Set as AbstractSet

from app.dispatch.attempt import Call, Outcome, Verdict, timed_out
from app.dispatch.capacity import Load
from app.dispatch.lanes import Job, Lane, Outbox, Threads
from app.dispatch.options import DispatchOptions
from app.dispatch.transaction import Transactions
from app.store.claims import Held
from app.telemetry import get_logger

log = get_logger("dispatch")


# Claims that may wait for a place, as a multiple of the places.
AHEAD = 16
# Work that is claimed ahead takes so many seconds, by the pace of the last moments.
HORIZON = 0.25
# What still waits for a place after so many seconds was claimed by a pace that is over.
LONGEST_WAIT = 4 * HORIZON


class Pace:
    """How quickly the calls of each callback end, so that quick ones are claimed ahead."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._ended: Counter[str] = Counter()
        self._measured = time.monotonic()
        # By callback: how many claims are worth having beside those that have a place.
        self.ahead: dict[str, int] = {}

    def count(self, jobs: Iterable[Job]) -> None:
        """Note that some calls have ended."""
        self._ended.update(job.call.callback.name for job in jobs)

    def measure(self) -> None:
        """Look at what has ended since the last look."""
        now = time.monotonic()
        share = HORIZON / max(now - self._measured, 0.001)
        self.ahead = {
            name: min(self._most, int(ended * share)) for name, ended in self._ended.items()
        }
        self._ended.clear()
        self._measured = now


class Crew:
    """Used from the dispatch loop only; what it starts runs in other threads."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        options: DispatchOptions,
        *,
        transactions: Callable[[], Transactions],
        on_end: Callable[[list[Outcome]], None],
    ) -> None:
        self._options = options
        self._on_end = on_end
        self._transactions = transactions
        self._outbox = Outbox(loop, self._collect)
        self._threads = Threads(self._outbox.put, name="callback")
        self._lanes = [self._new_lane()]
        self._jobs: dict[Held, Job] = {}
        self._running: Counter[str] = Counter()
        self._stuck: set[Job] = set()
        # Claimed, and waiting for a place.
        self._waiting: deque[Job] = deque()
        self._submitted = 0
        # Calls for which there was no thread; they are to be given back.
        self._refused: list[Held] = []
        # True while the system gives no threads.
        self._is_short = False
        self._pace = Pace(most=AHEAD * options.slots)

    def _new_lane(self) -> Lane:
        return Lane(self._outbox.put, transactions=self._transactions(), name="callbacks")

    @property
    def running(self) -> Counter[str]:
        """Calls under way, by callback, without those that were written off."""
        return self._running

    @property
    def stuck(self) -> list[str]:
        """The callbacks of the calls that were written off and have not ended yet."""
        return sorted(job.call.callback.name for job in tuple(self._stuck))

    @property
    def slots(self) -> int:
        """Calls that may be under way: beyond the cap, those that do not end take places."""
        return self._options.slots - max(0, len(self._stuck) - self._options.stuck_cap)

    def load(self, hungry: AbstractSet[str]) -> Load:
        """Say what is under way, for who decides what to claim next."""
        return Load(self.slots, self._running, hungry, self._pace.ahead)

    @property
    def held(self) -> list[Held]:
        """The claims whose leases must not end."""
        return list(self._jobs)

    @property
    def is_blocked(self) -> bool:
        """True if the event loop is blocked and too many were replaced already."""
        return self._is_silent(self._lanes[-1])

    def start(self, calls: Iterable[Call]) -> None:
        """Begin these calls."""
        jobs = [Job(call) for call in calls]
        for job in jobs:
            self._jobs[_key(job)] = job
            self._running[job.call.callback.name] += 1
        self._waiting.extend(jobs)
        self._fill()

    def _fill(self) -> None:
        """Give free places to those that wait."""
        jobs = []
        while self._waiting and self._submitted < self.slots:
            job = self._waiting.popleft()
            if _key(job) in self._jobs:
                job.is_submitted = True
                self._submitted += 1
                jobs.append(job)
        if jobs:
            self._submit(jobs)

    def _submit(self, jobs: list[Job]) -> None:
        if waiting := [job for job in jobs if job.call.callback.is_async]:
            self._lanes[-1].submit(waiting)
        if plain := [job for job in jobs if not job.call.callback.is_async]:
            refused = self._threads.submit(plain)
            self._is_short = bool(refused)
            self._refused += [_key(job) for job in refused if self._remove(job)]

    def take_refused(self) -> list[Held]:
        """Take back the calls for which there was no thread."""
        refused, self._refused = self._refused, []
        return refused

    def _collect(self, jobs: list[Job]) -> None:
        ended = [job for job in jobs if self._remove(job)]
        self._stuck.difference_update(jobs)
        self._pace.count(ended)
        self._fill()
        self._on_end(_outcomes(ended))

    def _remove(self, job: Job) -> bool:
        if self._jobs.pop(_key(job), None) is None:
            return False
        self._running[job.call.callback.name] -= 1
        self._submitted -= job.is_submitted
        return True

    def withdraw(self, callbacks: Collection[str] | None = None) -> list[Held]:
        """Take back the calls that have not begun: of these callbacks, or of all."""
        wanted = [
            job
            for job in self._jobs.values()
            if callbacks is None or job.call.callback.name in callbacks
        ]
        return self._take_back(wanted)

    def withdraw_ahead(self) -> list[Held]:
        """Take back what waits for a place of callbacks which have become slow."""
        waited_since = time.monotonic() - LONGEST_WAIT
        allowed = Counter(self._pace.ahead)
        too_long = []
        for job in self._waiting:
            name = job.call.callback.name
            allowed[name] -= 1
            if allowed[name] < 0 and job.made <= waited_since:
                too_long.append(job)
        return self._take_back(too_long)

    def _take_back(self, wanted: Iterable[Job]) -> list[Held]:
        jobs = [job for job in wanted if job.take()]
        taken = [_key(job) for job in jobs if self._remove(job)]
        if taken:
            self._waiting = deque(job for job in self._waiting if _key(job) in self._jobs)
        return taken

    def abandon(self, keys: Iterable[Held]) -> list[Job]:
        """Write calls off: they are asked to end, and whatever they answer is ignored."""
        jobs = [job for key in keys if (job := self._jobs.get(key)) is not None]
        for job in jobs:
            self._remove(job)
            if not job.take():
                self._stuck.add(job)
                job.cancel()
        return jobs

    def watch(self) -> None:
        """Write off the calls that outlast their time-out; replace an event loop that hangs."""
        self._pace.measure()
        # Where there was no thread, there are places which no end of a call will give away.
        self._fill()
        self._replace_silent_lane()
        self._lanes = [lane for lane in self._lanes[:-1] if lane.is_alive] + self._lanes[-1:]
        now = time.monotonic()
        late = [key for key, job in self._jobs.items() if self._is_late(job, now)]
        ended = []
        for job in self.abandon(late):
            job.finish(self._lateness(job))
            ended.append(job)
            log.warning("callback.stuck", callback=job.call.callback.name, stuck=len(self._stuck))
        if ended:
            self._fill()
            self._on_end(_outcomes(ended))

    def _is_late(self, job: Job, now: float) -> bool:
        if job.started is None:
            return False
        limit = job.call.callback.timeout
        if job.lane is not None:
            limit += self._options.cancel_grace
        return now - job.started > limit.total_seconds()

    def _lateness(self, job: Job) -> Verdict:
        if job.lane is None:
            return timed_out(job.call)
        if not self._is_silent(job.lane):
            return timed_out(job.call, ", nor when it was cancelled")
        culprit = job.lane.culprit()
        return timed_out(job.call, f"; the event loop was blocked by {culprit}")

    def _is_silent(self, lane: Lane) -> bool:
        return lane.silence() > self._options.block_limit.total_seconds()

    def _replace_silent_lane(self) -> None:
        lane = self._lanes[-1]
        if not self._is_silent(lane) or len(self._lanes) > self._options.stuck_cap:
            return
        log.warning("callbacks.blocked", callback=lane.culprit(), lanes=len(self._lanes))
        lane.retire()
        self._lanes.append(self._new_lane())
        waiting = [j for j in self._jobs.values() if j.lane is lane and j.take()]
        for job in waiting:
            self._remove(job)
        self.start(job.call for job in waiting)

    def problems(self) -> list[str]:
        """Say what keeps callbacks from running as they should."""
        cap, found = self._options.stuck_cap, []
        if (stuck := self.stuck) and len(stuck) > cap:
            names = ", ".join(sorted(set(stuck)))
            found.append(f"{len(stuck)} calls of callbacks do not end ({names}); {cap} may")
        if len(self._lanes) > cap and self.is_blocked:
            found.append(f"{len(self._lanes)} event loops of callbacks are blocked; {cap} may be")
        if self._is_short:
            found.append("the system gives no more threads for callbacks")
        return found

    def close(self, limit: float) -> None:
        """End the threads that can be ended."""
        for lane in self._lanes:
            lane.retire()
        deadline = time.monotonic() + limit
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))


def _outcomes(jobs: Iterable[Job]) -> list[Outcome]:
    return [job.outcome for job in jobs if job.outcome is not None]


def _key(job: Job) -> Held:
    return job.call.claim.held
