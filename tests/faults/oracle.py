"""The judge: what must hold after every run, whatever was done to the processes.

It believes nobody but the seed, the sender's ledger, the bytes in the tables and the lines that
callbacks wrote. I1 to I10 are the invariants that README.md beside this explains.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from tests.acceptance.service import CANARIES
from tests.acceptance.tables import Row, rows
from tests.faults.ledger import BROKEN, TOO_LATE, Ledger
from tests.faults.plan import Fault
from tests.faults.script import DIES, luck, owed
from tests.faults.site import SLOTS, Site, Vitals
from tests.faults.traffic import STATUSES, Expected

SLOWEST_MS = 8_000
# What a process may hold beyond what it held before its first request.
MORE_DESCRIPTORS, MORE_THREADS, MORE_MEMORY = 40, 24, 64 * 2**20
ERROR = re.compile(rb'"level":"error","event":"([^"]+)"')
# The loops go on when all is quiet, but none of their transactions is open for long.
LEFT_OPEN = """SELECT count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND xact_start < now() - interval '10 seconds'"""


@dataclass(frozen=True, slots=True)
class Count:
    """One figure of a run; with a limit it must not be above it."""

    name: str
    number: int
    limit: int | None = None
    invariant: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.limit is not None and self.number > self.limit


class Stored(NamedTuple):
    """An event as it stands in the database."""

    id: UUID
    account: str
    envelope_id: str
    type: str
    sequence: int | None
    copies: int
    digest: bytes


class Delivery(NamedTuple):
    """A delivery as it stands in the database."""

    id: str
    event_id: str
    callback: str
    state: str
    is_owed: bool
    attempts: int


class Call(NamedTuple):
    """One line that a callback wrote."""

    delivery_id: str
    event_id: str
    account: str
    envelope_id: str
    sequence: int
    # It was told that a later event of its envelope came before it.
    is_late: bool


@dataclass(frozen=True)
class Evidence:
    """Everything that a run has left behind."""

    site: Site
    ledger: Ledger
    expected: Expected
    baseline: Sequence[Vitals]

    @cached_property
    def stored(self) -> list[Stored]:
        """Events that Atlas sent, without copies that only brought newer context."""
        digest = "sha256(b.body)" if self.site.is_postgresql else "b.body"
        found = self._rows(
            "SELECT e.id, e.account, e.envelope_id, e.type, e.sequence, e.copies, "  # noqa: S608
            f"{digest} FROM events e JOIN bodies b ON b.event_id = e.id "
            "WHERE e.effect <> 'refreshed' AND e.type NOT LIKE 'receiver.%'"
        )
        return [Stored(*row) for row in map(self._alike, found)]

    def _alike(self, row: Row) -> Row:
        """Give a row of SQLite as PostgreSQL would: it has neither UUIDs nor digests."""
        if self.site.is_postgresql:
            return row
        return (UUID(row[0]), *row[1:-1], hashlib.sha256(row[-1]).digest())

    @cached_property
    def deliveries(self) -> list[Delivery]:
        found = self._rows(
            "SELECT id, event_id, callback, state, due_at IS NOT NULL, attempts FROM deliveries"
        )
        return [Delivery(str(UUID(str(i))), str(UUID(str(e))), *rest) for i, e, *rest in found]

    @cached_property
    def calls(self) -> list[Call]:
        lines = self.site.notes.read_text().splitlines()
        return [_call(*line.split()) for line in lines]

    @cached_property
    def once(self) -> Counter[str]:
        """How often each delivery wrote in the transaction that settles it."""
        found = self._rows(f"SELECT delivery_id FROM {self.site.watched('once')}")  # noqa: S608
        return Counter(str(row[0]) for row in found)

    @cached_property
    def by_number(self) -> Mapping[int, list[Stored]]:
        """The rows of each event that was sent; there should be one."""
        found = defaultdict(list)
        for row in self.stored:
            number = self.expected.numbers.get(row.digest)
            if number is not None:
                found[number].append(row)
        return found

    @property
    def interruptions(self) -> int:
        """How often a worker may have lost what it was doing.

        A stopped database interrupts every worker, and a single process is replica and worker.
        """
        worker = (Fault.KILL_WORKER, Fault.FREEZE_WORKER)
        both = (Fault.KILL_REPLICA, Fault.FREEZE_REPLICA)
        workers = max(1, len(self.site.workers))
        own = self.ledger.made(*(worker if self.site.workers else both))
        return own + workers * self.ledger.made(Fault.STOP_DATABASE)

    def _rows(self, query: str) -> list[Row]:
        return rows(self.site.database_url, query)


def _call(  # in the order in which `callbacks.note` writes
    delivery_id: str, event_id: str, account: str, envelope_id: str, sequence: str, is_late: str
) -> Call:
    return Call(delivery_id, event_id, account, envelope_id, int(sequence), is_late == "1")


def judge(
    site: Site, expected: Expected, ledger: Ledger, *, baseline: Sequence[Vitals]
) -> list[Count]:
    """Count everything that must hold; call it when nothing is owed any more."""
    evidence = Evidence(site, ledger, expected, baseline)
    parts = (_facts, _answers, _events, _envelopes, _deliveries, _callbacks, _leaks)
    return [count for part in parts for count in part(evidence)]


def _facts(evidence: Evidence) -> Iterator[Count]:
    ledger, expected = evidence.ledger, evidence.expected
    yield Count("run time, s", round(ledger.ended - ledger.began))
    yield Count("events", len(expected.types))
    yield Count("copies and aliases sent beside them", expected.sendings - len(expected.types))
    yield Count("requests", ledger.tries)
    for fault in Fault:
        yield Count(f"{fault}, times", ledger.made(fault))
    yield Count("answers 503", ledger.statuses[503])
    yield Count("connections that broke", ledger.unanswered[BROKEN])
    yield Count("calls of callbacks that left a note", len(evidence.calls))
    yield Count("events acknowledged", ledger.acknowledged)
    missing = len(expected.types) - ledger.acknowledged
    yield Count("events that were never acknowledged", missing, 0)
    yield Count("requests that the sender had given up, and was asked for", ledger.given_up)
    yield Count("processes that ended by themselves", ledger.died, 0)


def _answers(evidence: Evidence) -> Iterator[Count]:
    ledger = evidence.ledger
    wrong = {status: n for status, n in ledger.statuses.items() if status not in {200, 503}}
    errors = sum(number for status, number in wrong.items() if status >= 500)
    outcomes = sum(ledger.outcomes.values()) - ledger.outcomes["recorded"]
    yield Count("answers 5xx other than 503", errors, 0, "I7")
    yield Count("answers neither 200 nor 503", sum(wrong.values()), 0, "I7")
    yield Count(
        "outcomes neither recorded nor duplicate", outcomes - ledger.outcomes["duplicate"], 0, "I7"
    )
    yield Count("slowest answer, ms", round(ledger.slowest * 1000), SLOWEST_MS, "I8")
    yield Count("no answer within 10 s", ledger.unanswered[TOO_LATE], 0, "I8")


def _events(evidence: Evidence) -> Iterator[Count]:
    entries, found = evidence.ledger.entries, evidence.by_number
    ids = {number: {row.id for row in stored} for number, stored in found.items()}
    lost = sum(not entry.event_ids <= ids.get(n, set()) for n, entry in entries.items())
    yield Count("acknowledged and lost", lost, 0, "I1")
    twice = sum(len(stored) > 1 for stored in found.values())
    yield Count("recorded twice", twice, 0, "I1")
    named = sum(len(entry.event_ids) > 1 for entry in entries.values())
    yield Count("acknowledged under two ids", named, 0, "I1")
    altered = sum(row.digest not in evidence.expected.numbers for row in evidence.stored)
    yield Count("bodies altered, or recorded and never sent", altered, 0, "I1, I2")
    first = {n: stored[0] for n, stored in found.items()}
    replaced = sum(
        entry.recorded not in {None, first[n].digest} for n, entry in entries.items() if n in first
    )
    yield Count("first bodies that were replaced", replaced, 0, "I1")
    uncounted = sum(
        first[n].copies < entry.duplicates for n, entry in entries.items() if n in first
    )
    yield Count("events with fewer copies counted than answered for", uncounted, 0, "I1")


def _envelopes(evidence: Evidence) -> Iterator[Count]:
    expected = evidence.expected
    table = "SELECT account, id, status FROM envelopes"
    found = {(account, id_): status for account, id_, status in evidence._rows(table)}
    wrong = sum(found.get(key) != status for key, status in expected.statuses.items())
    yield Count("envelopes missing or with a wrong status", wrong, 0, "I5")
    yield Count("envelopes nobody sent", len(found.keys() - expected.statuses.keys()), 0, "I2")
    query = f"SELECT before, after FROM {evidence.site.watched('statuses')}"  # noqa: S608
    changes = evidence._rows(query)
    fell = sum(_rank(after) < _rank(before) for before, after in changes)
    yield Count("changes of a status", len(changes))
    yield Count("status regressions", fell, 0, "I5")
    yield Count("envelopes whose events have gaps or repeats", _gaps(evidence), 0, "I1")
    if not evidence.site.is_postgresql:
        damages = [row for row in evidence._rows("PRAGMA integrity_check") if row != ("ok",)]
        yield Count("damages that SQLite finds in its file", len(damages), 0, "I1")


def _gaps(evidence: Evidence) -> int:
    # The service's own events take a place, too.
    query = "SELECT account, envelope_id, sequence FROM events WHERE sequence IS NOT NULL"
    places = defaultdict(list)
    for account, envelope_id, sequence in evidence._rows(query):
        places[account, envelope_id].append(sequence)
    expected = evidence.expected.lengths
    return sum(
        sorted(found) != list(range(1, len(found) + 1)) or len(found) < expected[key]
        for key, found in places.items()
    )


def _rank(status: object) -> int:
    return STATUSES.index(str(status)) if status is not None else -1


def _deliveries(evidence: Evidence) -> Iterator[Count]:
    deliveries = evidence.deliveries
    missing = sum(map(owed, evidence.expected.types)) - len(deliveries)
    yield Count("deliveries", len(deliveries))
    yield Count("deliveries missing or too many", abs(missing), 0, "I3")
    leased = sum(delivery.is_owed for delivery in deliveries)
    yield Count("deliveries still due or leased", leased, 0, "I3")
    unlike = sum(delivery.state != _end_of(delivery) for delivery in deliveries)
    yield Count("deliveries that did not end as they had to", unlike, 0, "I3")
    dead = sum(delivery.state == "dead" for delivery in deliveries)
    yield Count("dead letters, all of them on purpose", dead)
    # A failure on purpose is one attempt more; each interruption may cost one, too.
    most = max((delivery.attempts for delivery in deliveries), default=0)
    yield Count("most attempts at one delivery", most, 2 + evidence.interruptions, "I6")


def _end_of(delivery: Delivery) -> str:
    gives_up = delivery.callback == "try_hard" and luck(delivery.event_id) in DIES
    return "dead" if gives_up else "done"


def _callbacks(evidence: Evidence) -> Iterator[Count]:
    calls = evidence.calls
    noted = {d.id: d.event_id for d in evidence.deliveries if d.callback == "note"}
    times = Counter(call.delivery_id for call in calls)
    strange = sum(noted.get(call.delivery_id) != call.event_id for call in calls)
    yield Count("calls under a wrong delivery id", strange, 0, "I4")
    yield Count("deliveries done that no callback saw", len(noted.keys() - times), 0, "I3")
    # More than runs at once cannot have been done and not yet been settled.
    repeats = len(calls) - len(times)
    yield Count("calls beyond the first", repeats, evidence.interruptions * SLOTS, "I4")
    yield Count("calls that were told to be late", sum(call.is_late for call in calls))
    yield Count("first calls out of order that were not told", _overtaken(calls), 0, "I4")
    once = {d.id for d in evidence.deliveries if d.callback == "write_once"}
    wrong = sum(evidence.once[i] != 1 for i in once) + len(evidence.once.keys() - once)
    yield Count("writes in the settling transaction not made exactly once", wrong, 0, "I4")


def _overtaken(calls: Sequence[Call]) -> int:
    """Of one envelope, no event is seen before an earlier one was."""
    latest: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    overtaken = 0
    for call in calls:
        if call.delivery_id not in seen:
            seen.add(call.delivery_id)
            envelope = call.account, call.envelope_id
            overtaken += call.sequence < latest[envelope] and not call.is_late
            latest[envelope] = max(latest[envelope], call.sequence)
    return overtaken


def _leaks(evidence: Evidence) -> Iterator[Count]:
    secrets, errors = _said(evidence.site.logs)
    yield Count("secrets in logs and crash output", secrets, 0, "I9")
    names = "".join(f", {name}" for name in sorted(errors))
    yield Count(f"error lines in the logs, but for /readyz{names}", sum(errors.values()), 0)
    pairs = list(zip(evidence.site.services, evidence.baseline, strict=True))
    grown = [(Vitals.of(service), before) for service, before in pairs]
    descriptors = max(now.descriptors - before.descriptors for now, before in grown)
    threads = max(now.threads - before.threads for now, before in grown)
    memory = max(now.memory - before.memory for now, before in grown)
    yield Count("descriptors of a survivor above its start", descriptors, MORE_DESCRIPTORS, "I10")
    yield Count("threads of a survivor above its start", threads, MORE_THREADS, "I10")
    yield Count("memory of a survivor above its start, MiB", memory >> 20, MORE_MEMORY >> 20, "I10")
    if evidence.site.is_postgresql:
        [(left,)] = evidence._rows(LEFT_OPEN)
        yield Count("transactions left open", left, 0, "I10")


def _said(files: Sequence[Path]) -> tuple[int, Counter[str]]:
    """Count secrets, and error lines by name, in everything that processes said."""
    canaries = [canary.encode() for canary in CANARIES]
    secrets, errors = 0, Counter[str]()
    for file in files:
        with file.open("rb") as lines:
            for line in lines:
                secrets += any(canary in line for canary in canaries)
                if (error := ERROR.search(line)) is not None:
                    errors[error[1].decode()] += 1
    # Whoever asks while the database is away is told that this process is not ready: an error,
    # and the right thing to say.
    del errors["service.not_ready"]
    return secrets, errors
