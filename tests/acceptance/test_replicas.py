"""Two replicas are killed again and again: nothing acknowledged is lost, nothing is done twice.

`python -m tests.acceptance.test_replicas --events 10000 --kills 10 --seed 7` does the same
at length, and prints a table.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest

from app.store.migrations import migrate
from tests.acceptance.raw import Connection, request
from tests.acceptance.service import DOOR, KEY, Service, wait_for
from tests.acceptance.tables import rows
from tests.factories import signed
from tests.postgres import Postgres

CONCURRENCY = 8
# A sender's answer is promised within 5 s; whoever hears nothing for longer tries again.
PATIENCE = 10.0
RANKS = {"envelope.created": "draft", "envelope.sent": "pending", "envelope.signed": "signed"}
STATUSES = ["draft", "pending", "signed"]

CALLBACKS = """
import os

from app.callbacks import Callbacks, Event

callbacks = Callbacks()
file = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@callbacks.on("envelope.*")
async def note(event: Event) -> None:
    os.write(file, f"{event.delivery_id} {event.id}\\n".encode())
"""


@dataclass(frozen=True, slots=True)
class Sending:
    """One body to be sent; a copy has the same event and other bytes."""

    envelope_id: str
    type: str
    body: bytes
    is_copy: bool = False


def make_traffic(events: int, dice: random.Random) -> list[Sending]:
    """Write `events` events of envelopes of three, a fifth of them twice, all shuffled."""
    sendings = []
    for number in range(events):
        envelope, step = divmod(number, 3)
        event_type = list(RANKS)[step]
        said = {
            "event": event_type,
            "envelope_id": f"env_{envelope}",
            "event_id": f"evt_{number}",
            "metadata": {"number": number, "salt": dice.getrandbits(64)},
        }
        sendings.append(Sending(f"env_{envelope}", event_type, json.dumps(said).encode()))
        if number % 5 == 0:
            again = json.dumps({**said, "attempt": 2}, indent=1).encode()
            sendings.append(Sending(f"env_{envelope}", event_type, again, is_copy=True))
    dice.shuffle(sendings)
    return sendings


@dataclass
class Ledger:
    """What the sender knows: who acknowledged what, and every status that it ever saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    acknowledged: dict[bytes, UUID] = field(default_factory=dict)
    slowest: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, sending: Sending, status: int, answer: bytes, seconds: float) -> bool:
        with self._lock:
            self.statuses[status] += 1
            self.slowest = max(self.slowest, seconds)
            if status != 200:
                self.retries += 1
                return False
            said = json.loads(answer)
            self.outcomes[said["outcome"]] += 1
            self.acknowledged[sending.body] = UUID(said["event_id"])
            return True

    def note_silence(self) -> None:
        with self._lock:
            self.retries += 1


class Sender:
    """Sends until everything is acknowledged, to whichever replica answers."""

    def __init__(self, ports: Sequence[int], ledger: Ledger, seed: int) -> None:
        self._ports = ports
        self._ledger = ledger
        self._dice = random.Random(seed)

    def send_all(self, sendings: Sequence[Sending]) -> None:
        connections: dict[int, Connection] = {}
        for sending in sendings:
            while not self._is_acknowledged(sending, connections):
                time.sleep(self._dice.uniform(0.01, 0.1))
        for connection in connections.values():
            connection.close()

    def _is_acknowledged(self, sending: Sending, connections: dict[int, Connection]) -> bool:
        port = self._dice.choice(self._ports)
        data = request("POST", DOOR, [signed(sending.body, KEY)], sending.body)
        start = time.monotonic()
        try:
            connection = connections.get(port) or connections.setdefault(port, Connection(port))
            connection.send(data)
            answer = connection.read()
        except (OSError, EOFError):
            if port in connections:
                connections.pop(port).close()
            self._ledger.note_silence()
            return False
        seconds = time.monotonic() - start
        return self._ledger.note(sending, answer.status, answer.body, seconds)


class Killer:
    """Kills one replica after the other with SIGKILL, at random moments, and starts it again."""

    def __init__(self, replicas: Sequence[Service], ledger: Ledger, moments: Sequence[int]) -> None:
        self._replicas = replicas
        self._ledger = ledger
        # When so much is acknowledged; the last of them long before everything is.
        self._moments = moments

    def run(self) -> None:
        for number, moment in enumerate(self._moments):
            wait_for(
                lambda: len(self._ledger.acknowledged) >= moment,  # noqa: B023  # called at once
                f"{moment} acknowledged events",
                seconds=120,
            )
            replica = self._replicas[number % len(self._replicas)]
            replica.kill()
            # Not waited for: the next one may go down before this one is up.
            replica.start()


@dataclass(frozen=True, slots=True)
class Result:
    """The counts of one run; everything below the line must be as `expected` says."""

    seconds: float
    facts: dict[str, int]
    expected: dict[str, int]
    limits: dict[str, int]

    @property
    def failures(self) -> list[str]:
        wrong = [n for n, number in self.expected.items() if self.facts[n] != number]
        return wrong + [n for n, number in self.limits.items() if self.facts[n] > number]

    def table(self) -> str:
        lines = [f"{'run time, s':<44}{self.seconds:>10.1f}"]
        for name, number in self.facts.items():
            wanted = f"   = {self.expected[name]}" if name in self.expected else ""
            wanted = f"   ≤ {self.limits[name]}" if name in self.limits else wanted
            lines.append(f"{name:<44}{number:>10}{wanted}")
        return "\n".join(lines)


def rehearse(database_url: str, home: Path, *, events: int, kills: int, seed: int) -> Result:
    """Run it all against one migrated PostgreSQL database."""
    dice = random.Random(seed)
    sendings, ledger = make_traffic(events, dice), Ledger()
    (home / "noting.py").write_text(CALLBACKS)
    notes = home / "notes"
    settings = {
        "DATABASE_URL": database_url,
        "CALLBACKS": "noting:callbacks",
        "PYTHONPATH": str(home),
        "NOTES": str(notes),
        "DELIVERY_LEASE": "3s",
        "DELIVERY_CONCURRENCY": str(CONCURRENCY),
    }
    start = time.monotonic()
    with ExitStack() as stack:
        replicas = [Service("serve", home=home, **settings) for _ in range(2)]
        for replica in replicas:
            stack.enter_context(replica)
        moments = sorted(dice.randrange(len(sendings) * 9 // 10) for _ in range(kills))
        killer = Killer(replicas, ledger, moments)
        _send([replica.port for replica in replicas], sendings, ledger, killer, seed)
        wait_for(lambda: _owed(database_url) == 0, "nothing is owed any more", seconds=120)
        seconds = time.monotonic() - start
    logs = [line for replica in replicas for line in replica.lines()]
    return _audit(database_url, sendings, ledger, notes, seconds=seconds, killed=kills, logs=logs)


def _send(
    ports: Sequence[int], sendings: Sequence[Sending], ledger: Ledger, killer: Killer, seed: int
) -> None:
    senders = 16
    with ThreadPoolExecutor(senders + 1) as pool:
        killing = pool.submit(killer.run)
        sending = [
            pool.submit(Sender(ports, ledger, seed + n).send_all, sendings[n::senders])
            for n in range(senders)
        ]
        for each in sending:
            each.result()
        killing.result()


def _owed(database_url: str) -> int:
    query = "SELECT count(*) FROM deliveries WHERE due_at IS NOT NULL"
    return int(rows(database_url, query)[0][0])


def _audit(
    database_url: str,
    sendings: Sequence[Sending],
    ledger: Ledger,
    notes: Path,
    *,
    seconds: float,
    killed: int,
    logs: Sequence[dict[str, object]],
) -> Result:
    originals = [sending for sending in sendings if not sending.is_copy]
    stored = rows(
        database_url,
        "SELECT e.id, e.atlas_event_id, e.effect, b.body FROM events e "
        "JOIN bodies b ON b.event_id = e.id",
    )
    kept = {event_id for event_id, _, _, _ in stored}
    own_ids = Counter(own_id for _, own_id, effect, _ in stored if effect != "refreshed")
    sent = {json.loads(s.body)["event_id"] for s in originals}
    envelopes = rows(database_url, "SELECT id, status, sequence FROM envelopes")
    expected_status, expected_count = _expected(originals)
    sequences = rows(
        database_url,
        "SELECT envelope_id, array_agg(sequence ORDER BY sequence) FROM events "
        "WHERE sequence IS NOT NULL GROUP BY envelope_id",
    )
    calls = [line.split() for line in notes.read_text().splitlines()]
    deliveries = rows(database_url, "SELECT id, event_id, state FROM deliveries")
    attempts = Counter(delivery_id for delivery_id, _ in calls)
    bodies = {sending.body: json.loads(sending.body)["event_id"] for sending in sendings}
    facts = {
        "events sent": len(originals),
        "copies sent beside them": len(sendings) - len(originals),
        "tries that were not acknowledged": ledger.retries,
        "answers 503": ledger.statuses[503],
        "replicas killed": killed,
        "slowest answer, ms": round(ledger.slowest * 1000),
        "callback calls": len(calls),
        "acknowledged": len(ledger.acknowledged),
        "acknowledged and lost": sum(i not in kept for i in ledger.acknowledged.values()),
        "sent and not recorded": len(sent - set(own_ids)),
        "recorded and not sent": len(set(own_ids) - sent),
        "applied twice": sum(number > 1 for number in own_ids.values()),
        "bodies altered": sum(bodies.get(bytes(body)) != own_id for _, own_id, _, body in stored),
        "envelopes with a wrong status": sum(
            status != expected_status[envelope_id] for envelope_id, status, _ in envelopes
        ),
        "envelopes missing": len(expected_status) - len(envelopes),
        "sequences with gaps or repeats": sum(
            numbers != list(range(1, expected_count[envelope_id] + 1))
            for envelope_id, numbers in sequences
        ),
        "answers 5xx other than 503": sum(
            number for status, number in ledger.statuses.items() if status >= 500 and status != 503
        ),
        "answers neither 200 nor 503": sum(
            number for status, number in ledger.statuses.items() if status not in {200, 503}
        ),
        "outcomes neither recorded nor duplicate": sum(ledger.outcomes.values())
        - ledger.outcomes["recorded"]
        - ledger.outcomes["duplicate"],
        "deliveries not done": sum(state != "done" for _, _, state in deliveries),
        "deliveries beside one per event": abs(len(deliveries) - len(originals)),
        "events that no callback saw": len(sent) - len({event_id for _, event_id in calls}),
        "calls under an unknown delivery id": len(
            set(attempts) - {str(delivery_id) for delivery_id, _, _ in deliveries}
        ),
        "calls beyond the first": sum(attempts.values()) - len(attempts),
        "error lines in the logs": sum(line["level"] == "error" for line in logs),
    }
    names = list(facts)
    zeros = names[names.index("acknowledged and lost") :]
    expected = {name: 0 for name in zeros if name != "calls beyond the first"}
    expected["acknowledged"] = len(sendings)
    return Result(seconds, facts, expected, {"calls beyond the first": killed * CONCURRENCY})


def _expected(originals: Sequence[Sending]) -> tuple[dict[str, str], Counter[str]]:
    """Give status and number of events of every envelope, from what was sent alone."""
    highest: dict[str, str] = {}
    for sending in originals:
        said = RANKS[sending.type]
        known = highest.get(sending.envelope_id, said)
        highest[sending.envelope_id] = max(said, known, key=STATUSES.index)
    return highest, Counter(sending.envelope_id for sending in originals)


class TestReplicas:
    def test_that_are_killed_lose_nothing_and_do_nothing_twice(
        self, postgres_url: str, tmp_path: Path
    ) -> None:
        events = int(os.environ.get("REPLICA_EVENTS", "1000"))

        result = rehearse(postgres_url, tmp_path, events=events, kills=4, seed=20261121)

        assert [] == result.failures, f"\n{result.table()}"


class TestTraffic:
    @pytest.mark.parametrize("seed", [1, 2])
    def test_is_the_same_for_the_same_seed(self, seed: int) -> None:
        """A failure that nobody can see again helps nobody."""
        runs = [make_traffic(100, random.Random(seed)) for _ in range(2)]

        assert runs[0] == runs[1]
        assert 20 == sum(sending.is_copy for sending in runs[0])
        digests = {hashlib.sha256(sending.body).digest() for sending in runs[0]}
        assert 120 == len(digests)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill two replicas under load, and count.")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    os.environ["ENV_FILE"] = ""
    print(f"seed {arguments.seed}")  # noqa: T201
    with Postgres() as postgres, tempfile.TemporaryDirectory() as home:
        url = postgres.create_database("receiver")
        asyncio.run(migrate(url))
        result = rehearse(
            url, Path(home), events=arguments.events, kills=arguments.kills, seed=arguments.seed
        )
    print(result.table())  # noqa: T201
    print("\n".join(f"WRONG: {name}" for name in result.failures) or "all as expected")  # noqa: T201
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
