"""Which fault strikes what, and when: decided by the seed before anything runs.

A moment is a number of acknowledged events and not a time, so that a run that is repeated on a
slower machine has the same faults at the same places of the same traffic.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

# Faults begin when everything runs, and end early enough for all of it to recover under load.
FIRST, LAST = 0.02, 0.9


class Fault(StrEnum):
    """What is done to a process or to the database."""

    KILL_REPLICA = "replica killed"
    KILL_WORKER = "worker killed"
    FREEZE_REPLICA = "replica frozen"
    FREEZE_WORKER = "worker frozen"
    STOP_DATABASE = "database stopped"


# How long what is struck stays away, in seconds. What is killed starts again at once. A frozen
# replica holds up whoever it is answering, so it must not be for long; a frozen worker loses its
# lease, and finds that out when it goes on.
AWAY = {
    Fault.KILL_REPLICA: (0.0, 0.0),
    Fault.KILL_WORKER: (0.0, 0.0),
    Fault.FREEZE_REPLICA: (0.2, 1.0),
    Fault.FREEZE_WORKER: (1.0, 6.0),
    Fault.STOP_DATABASE: (0.2, 2.5),
}


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: after so many acknowledged events, to which of its kind, for how long."""

    moment: int
    fault: Fault
    target: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How often each fault strikes in a run of so many events."""

    seed: int
    events: int
    kills: int = 0
    database_stops: int = 0
    freezes: int = 0
    replicas: int = 2
    workers: int = 2

    def strikes(self) -> list[Strike]:
        """Give every strike, the earliest first."""
        dice = random.Random(f"{self.seed}:faults")
        targets = [
            (kill, freeze, number)
            for number in range(max(self.replicas, self.workers))
            for kill, freeze, count in (
                (Fault.KILL_REPLICA, Fault.FREEZE_REPLICA, self.replicas),
                (Fault.KILL_WORKER, Fault.FREEZE_WORKER, self.workers),
            )
            if number < count
        ]
        kills = [(kill, number) for kill, _, number in targets]
        freezes = [(freeze, number) for _, freeze, number in targets]
        strikes = [
            *self._spread(kills, self.kills, dice),
            *self._spread(freezes[::-1], self.freezes, dice),
            *self._spread([(Fault.STOP_DATABASE, 0)], self.database_stops, dice),
        ]
        return sorted(strikes, key=lambda strike: strike.moment)

    def _spread(
        self, targets: Sequence[tuple[Fault, int]], count: int, dice: random.Random
    ) -> Iterator[Strike]:
        """Strike the targets in turn, over the whole run, each anywhere in its part of it."""
        for part in range(count):
            fault, target = targets[part % len(targets)]
            place = FIRST + (LAST - FIRST) * (part + dice.random()) / count
            seconds = round(dice.uniform(*AWAY[fault]), 2)
            yield Strike(int(place * self.events), fault, target, seconds)
