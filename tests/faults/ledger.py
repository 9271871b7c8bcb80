"""What the sender knows: what it sent, how it was answered, and when."""

import asyncio
import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from tests.faults.traffic import Sending

# Tries that brought no answer.
BROKEN, TOO_LATE = "connection broke", "no answer in time"


@dataclass(slots=True)
class Entry:
    """One event, as its sender sees it."""

    # Each event that an answer named: there may be one only.
    event_ids: set[UUID] = field(default_factory=set)
    # The body to which the answer was that it is new.
    recorded: bytes | None = None
    duplicates: int = 0


@dataclass(slots=True)
class Second:
    """What happened in one second of a run."""

    acknowledged: int = 0
    refused: int = 0
    unanswered: int = 0
    # Answer times, in seconds.
    times: "array[float]" = field(default_factory=lambda: array("f"))


@dataclass(slots=True)
class Mark:
    """A fault that was made, for the picture and for the bounds of the judgement."""

    kind: str
    target: int
    at: float
    until: float


class Ledger:
    """Kept while a run goes on, and judged after it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.ended = self.began
        self.entries: dict[int, Entry] = {}
        self.statuses: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.tries = 0
        self.given_up = 0
        # Processes that ended although nobody had struck them.
        self.died = 0
        self.slowest = 0.0
        self.seconds: list[Second] = []
        self.marks: list[Mark] = []
        self._milestones: list[tuple[int, asyncio.Event]] = []

    @property
    def acknowledged(self) -> int:
        """How many different events were acknowledged."""
        return len(self.entries)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def start(self) -> None:
        """Begin to count the time."""
        self.began = time.monotonic()

    def finish(self) -> None:
        """Everything is acknowledged, or given up."""
        self.ended = time.monotonic()

    async def reaches(self, acknowledged: int) -> None:
        """Wait until so many events are acknowledged."""
        if self.acknowledged < acknowledged:
            reached = asyncio.Event()
            self._milestones.append((acknowledged, reached))
            await reached.wait()

    def note(self, sending: Sending, status: int, answer: bytes, seconds: float) -> bool:
        """Write down an answer; say whether it acknowledges."""
        self.tries += 1
        self.statuses[status] += 1
        self.slowest = max(self.slowest, seconds)
        second = self._second()
        second.times.append(seconds)
        if status != 200:
            second.refused += 1
            return False
        self._acknowledge(sending, json.loads(answer), second)
        return True

    def note_silence(self, why: str) -> None:
        """Write down that there was no answer."""
        self.tries += 1
        self.unanswered[why] += 1
        self._second().unanswered += 1

    @contextmanager
    def marked(self, kind: str, target: int) -> Iterator[None]:
        """Write down a fault that lasts as long as the block."""
        mark = Mark(kind, target, self.elapsed, self.elapsed)
        self.marks.append(mark)
        try:
            yield
        finally:
            mark.until = self.elapsed

    def made(self, *kinds: str) -> int:
        """How many faults of these kinds there were."""
        return sum(mark.kind in kinds for mark in self.marks)

    def _acknowledge(self, sending: Sending, said: dict[str, str], second: Second) -> None:
        self.outcomes[said["outcome"]] += 1
        if sending.number not in self.entries:
            self.entries[sending.number] = Entry()
            second.acknowledged += 1
            self._wake()
        entry = self.entries[sending.number]
        entry.event_ids.add(UUID(said["event_id"]))
        if said["outcome"] == "recorded":
            entry.recorded = sending.digest
        else:
            entry.duplicates += 1

    def _wake(self) -> None:
        for moment, reached in self._milestones:
            if self.acknowledged >= moment:
                reached.set()
        self._milestones = [each for each in self._milestones if not each[1].is_set()]

    def _second(self) -> Second:
        number = int(self.elapsed)
        while len(self.seconds) <= number:
            self.seconds.append(Second())
        return self.seconds[number]
