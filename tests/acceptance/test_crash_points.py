"""The service is killed at each point of an event's path; the next start makes it good.

`python -m tests.acceptance.test_crash_points --times 50 --seed 7` kills it fifty times at
each point, and prints a table.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from app.store import callbacks as subscriptions
from app.store.migrations import migrate
from app.store.session import Database, DatabaseAddress
from tests.acceptance.raw import exchange, request
from tests.acceptance.service import KEY, OPERATOR_TOKEN, START_DEADLINE, wait_for
from tests.acceptance.tables import rows
from tests.factories import make_body
from tests.faults.breakable import Breakable
from tests.faults.failpoints import POINTS, Failpoint, FailpointError, Place, Planted, install
from tests.faults.victims import callbacks
from tests.postgres import Postgres

CONCURRENCY = 4
# The points of case 78, and one between them: claimed, and not called yet.
CRASHES = [
    "after-read",
    "after-verify",
    "after-insert",
    "after-commit-before-reply",
    "after-reply-before-dispatch",
    "after-claim-before-callback",
    "inside-callback",
    "after-callback-before-marking",
    "while-scheduling-a-retry",
    "while-moving-to-dead-letters",
    "while-replaying",
    "while-retrying-a-dead-letter",
]
# Only PostgreSQL writes a batch and commits it in one statement.
ONE_STATEMENT = "before-write"
# To insert first and commit later, it has to be behind a pooler.
SETTINGS = {"after-insert": {"PGBOUNCER": "true"}}
# Each of them starts the service a dozen times.
TIMES = int(os.environ.get("CRASH_TIMES", "1"))
OPERATOR = (b"Authorization", b"Bearer " + OPERATOR_TOKEN.encode())
JSON = (b"Content-Type", b"application/json")
# Every event goes to all of these, each time it is owed.
ENDS = {"steady": "done", "shaky": "done", "hopeless": "dead"}


@dataclass
class Drama:
    """One service, whatever was sent to it, and how often it was killed."""

    database: str
    service: Breakable
    notes: Path
    sent: dict[str, bytes] = field(default_factory=dict)
    # Sent, and not answered: to be sent again.
    unanswered: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.settings = self.service.settings

    def kill_at(self, point: str, time_: int) -> None:
        """Let the service die when it comes to `point` for this time."""
        self.service.points = [f"{point}:kill@{time_}"]
        self.service.settings = {**self.settings, **SETTINGS.get(point, {})}
        self.service.start()
        self._wait_for_a_start(point)
        provoke = PROVOCATIONS.get(point, Drama.send)
        end = time.monotonic() + 60
        while self.service.is_running:
            assert time.monotonic() < end, f"nothing came {point}"
            provoke(self)
            time.sleep(0.01)
        assert -9 == self.service.wait(), f"it ended by itself {point}: {self.service.said}"
        self.kills[point] += 1

    def _wait_for_a_start(self, point: str) -> None:
        try:
            what = f"ready, or dead {point}"
            wait_for(self.service.is_ready_or_over, what, seconds=START_DEADLINE)
        except AssertionError as error:
            last = self.service.log.splitlines()[-20:]
            raise AssertionError("\n".join([str(error), self.service.said, *last])) from None

    def send(self) -> None:
        """Send a new event, once."""
        event_id = uuid4().hex
        self.sent[event_id] = make_body(event_id=event_id)
        self.unanswered.append(event_id)
        self._send_again(event_id)

    def _send_again(self, event_id: str) -> None:
        try:
            answer = self.service.deliver(self.sent[event_id], KEY)
        except (OSError, EOFError):
            return
        assert answer.status in {200, 503}, f"{answer.status}: {answer.body!r}"
        if answer.status == 200:
            self.unanswered.remove(event_id)

    def _is_all_answered(self) -> bool:
        for event_id in list(self.unanswered):
            self._send_again(event_id)
        return not self.unanswered

    def replay(self) -> None:
        """Owe an event once more to all that ask for it."""
        self.send()
        query = "SELECT id FROM events WHERE atlas_event_id IS NOT NULL ORDER BY id LIMIT 1"
        for (event_id,) in rows(self.database, query):
            self._post(f"/api/events/{event_id}/redispatch")

    def retry(self) -> None:
        """Try a dead letter again."""
        self.send()
        query = "SELECT id FROM deliveries WHERE state = 'dead' ORDER BY id LIMIT 1"
        for (delivery_id,) in rows(self.database, query):
            self._post(f"/api/deliveries/{delivery_id}/retry")

    def _post(self, target: str) -> None:
        try:
            status = exchange(self.service.port, request("POST", target, [OPERATOR, JSON])).status
        except (OSError, EOFError):
            return
        # One that is at work or owed again already has nothing to be retried.
        assert status in {200, 409, 503}, status

    def make_good(self) -> None:
        """Start the service as it is, send again what was not answered, and wait for quiet."""
        self.service.points = []
        self.service.settings = self.settings
        self.service.start().wait_until_ready()
        wait_for(self._is_all_answered, "an answer for everything")
        query = "SELECT count(*) FROM deliveries WHERE due_at IS NOT NULL"
        wait_for(lambda: [(0,)] == rows(self.database, query), "nothing is owed", seconds=90)
        assert 0 == self.service.terminate()

    def check(self) -> None:
        """Nothing is lost, nothing is half done, and nothing is done for no reason."""
        self._check_events()
        self._check_deliveries()
        self._check_deaths()
        self._check_calls()

    def _check_events(self) -> None:
        query = (
            "SELECT e.atlas_event_id, b.body FROM events e JOIN bodies b ON b.event_id = e.id "
            "WHERE e.atlas_event_id IS NOT NULL"
        )
        stored = [(own_id, bytes(body)) for own_id, body in rows(self.database, query)]
        assert sorted(self.sent.items()) == sorted(stored)

    def _check_deliveries(self) -> None:
        query = "SELECT event_id, generation, callback, state FROM deliveries"
        ends: dict[tuple[Any, int], dict[str, str]] = {}
        for event_id, generation, callback, state in rows(self.database, query):
            ends.setdefault((event_id, generation), {})[callback] = state
        assert all(end == ENDS for end in ends.values()), "a callback was left out, or not served"
        assert len(self.sent) == sum(generation == 1 for _, generation in ends)
        replayed = self._count("audit", "action = 'event.redispatched'")
        assert replayed == len(ends) - len(self.sent), "a replay without its line, or half of one"

    def _check_deaths(self) -> None:
        buried = self._count("attempts", "verdict = 'dead'")
        retried = self._count("audit", "action = 'delivery.retried'")
        hopeless = self._count("deliveries", "callback = 'hopeless'")
        assert buried == self._count("events", "type = 'receiver.dead'"), "a death unheard of"
        assert hopeless + retried == buried, "a retry without its line, or a line without it"

    def _check_calls(self) -> None:
        calls = [line.split() for line in self.notes.read_text().splitlines()]
        wanted = {
            str(id_).replace("-", ""): callback
            for id_, callback in rows(self.database, "SELECT id, callback FROM deliveries")
        }
        seen = Counter((id_.replace("-", ""), callback) for id_, callback, *_ in calls)
        assert set(wanted.items()) == set(seen), "one never called, or called by a stranger's key"
        steady = [number for (_, callback), number in seen.items() if callback == "steady"]
        kills = sum(self.kills.values())
        assert sum(steady) - len(steady) <= kills * CONCURRENCY
        query = "SELECT max(attempts) FROM deliveries WHERE callback = 'steady'"
        assert rows(self.database, query)[0][0] <= 1 + kills

    def _count(self, table: str, condition: str) -> int:
        query = f"SELECT count(*) FROM {table} WHERE {condition}"  # noqa: S608  # ours alone
        return int(rows(self.database, query)[0][0])


PROVOCATIONS: dict[str, Callable[[Drama], None]] = {
    "while-replaying": Drama.replay,
    "while-retrying-a-dead-letter": Drama.retry,
}


async def register(database_url: str) -> None:
    """Make the callbacks known before the first event: what came before is owed to nobody."""
    database = Database(DatabaseAddress(database_url))
    async with database.begin(limit=timedelta(seconds=10)) as connection:
        await subscriptions.register(connection, [each.subscription for each in callbacks])
    await database.close()


def make_drama(database: str, home: Path) -> Drama:
    asyncio.run(register(database))
    notes = home / "notes"
    service = Breakable(
        "serve",
        home=home,
        DATABASE_URL=database,
        CALLBACKS="tests.faults.victims:callbacks",
        NOTES=str(notes),
        DELIVERY_LEASE="2s",
        DELIVERY_CONCURRENCY=str(CONCURRENCY),
    )
    return Drama(database, service, notes)


def perform(drama: Drama, points: Sequence[str], dice: random.Random) -> None:
    """Kill at each of these points, one start after the other, and look at what is left."""
    try:
        for point in points:
            drama.kill_at(point, dice.randint(1, 3))
        drama.make_good()
    finally:
        if drama.service.is_running:
            drama.service.kill()
        drama.service.check_secrecy()
    drama.check()


class TestCrash:
    # A busy machine needs long for each of a dozen starts.
    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("seed", range(TIMES))
    def test_at_any_point_loses_nothing_and_leaves_nothing_half_done(
        self, database_url: str, tmp_path: Path, seed: int
    ) -> None:
        """At each point once, in any order: each start finds what the crash before it left."""
        dice = random.Random(seed)
        drama = make_drama(database_url, tmp_path)
        points = CRASHES if database_url.startswith("sqlite") else [*CRASHES, ONE_STATEMENT]

        perform(drama, dice.sample(points, len(points)), dice)

        assert Counter(points) == drama.kills


class TestAfterTheCommit:
    @pytest.mark.parametrize("point", ["while-waking", "while-counting", "while-logging"])
    def test_no_failure_reaches_the_sender(
        self, database_url: str, tmp_path: Path, point: str
    ) -> None:
        """The event is on disk: to say anything but 200 would be a lie."""
        drama = make_drama(database_url, tmp_path)
        drama.service.points = [f"{point}:raise~1"]

        with drama.service as service:
            answers = [service.deliver(make_body(event_id=f"e{n}"), KEY).status for n in range(5)]
            wait_for(lambda: self._are_done(database_url, 5), "all are delivered all the same")

        assert [200] * 5 == answers
        assert service.lines("announcement.failed")

    @staticmethod
    def _are_done(database: str, number: int) -> bool:
        query = "SELECT count(*) FROM deliveries WHERE callback = 'steady' AND state = 'done'"
        return [(number,)] == rows(database, query)


class TestFreeze:
    def test_of_a_worker_beyond_its_lease_lets_another_one_do_its_work(
        self, postgres_url: str, tmp_path: Path
    ) -> None:
        """When it goes on, it believes that the delivery is its own; its word counts no more."""
        drama = make_drama(postgres_url, tmp_path)
        settings = drama.service.settings
        frozen = Breakable("work", home=tmp_path, **settings)
        frozen.points = ["after-callback-before-marking:stop"]
        door = Breakable("serve", "--only", "webhooks", home=tmp_path, DATABASE_URL=postgres_url)
        with door, frozen:
            assert 200 == door.record(make_body(), KEY).status
            process = psutil.Process(frozen.process.pid)
            wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "the worker is frozen")
            with Breakable("work", home=tmp_path, **settings):
                query = "SELECT count(*) FROM deliveries WHERE due_at IS NOT NULL"
                wait_for(lambda: [(0,)] == rows(postgres_url, query), "nothing is owed", seconds=60)
            process.resume()
            wait_for(lambda: bool(frozen.lines("verdict.dropped")), "its word is thrown away")

        ends = "SELECT callback, state, attempts FROM deliveries ORDER BY callback"
        assert [("hopeless", "dead"), ("shaky", "done"), ("steady", "done")] == [
            (callback, state) for callback, state, _ in rows(postgres_url, ends)
        ]


class TestFailpoint:
    def test_does_what_it_is_told_at_its_time_only(self) -> None:
        failing = Failpoint.parse("after-read:raise@2")
        pausing = Failpoint.parse("after-read:pause=0.05")

        failing.reach()
        with pytest.raises(Planted):
            failing.reach()
        failing.reach()
        start = time.monotonic()
        pausing.reach()

        assert time.monotonic() - start >= 0.05

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("after-lunch:kill", id="unknown-point"),
            pytest.param("after-read:explode", id="unknown-action"),
            pytest.param("after-read:kill@soon", id="no-number"),
        ],
    )
    def test_that_is_misspelt_is_refused(self, text: str) -> None:
        with pytest.raises(FailpointError):
            Failpoint.parse(text)

    @pytest.mark.parametrize("name", POINTS)
    def test_is_at_a_function_that_is_there(self, name: str) -> None:
        install(Failpoint.parse(f"{name}:kill"))()

    def test_whose_function_is_gone_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = Place("app.intake.queue:gone", POINTS["after-read"].edge)
        monkeypatch.setitem(POINTS, "after-read", place)

        with pytest.raises(FailpointError, match="not there"):
            install(Failpoint.parse("after-read:kill"))

    def test_throws_the_same_dice_for_the_same_seed(self) -> None:
        points = [Failpoint.parse("after-read:raise~0.5", seed=seed) for seed in (1, 1, 2)]

        thrown = [[point._is_time() for _ in range(64)] for point in points]

        assert thrown[0] == thrown[1]
        assert thrown[0] != thrown[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill the service at each point, and look.")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--sqlite", action="store_true", help="instead of PostgreSQL")
    arguments = parser.parse_args()
    os.environ["ENV_FILE"] = ""
    dice = random.Random(arguments.seed)
    points = dice.sample(CRASHES * arguments.times, len(CRASHES) * arguments.times)
    print(f"seed {arguments.seed}")  # noqa: T201
    with Postgres() as postgres, tempfile.TemporaryDirectory() as home:
        url = f"sqlite:///{home}/receiver.db" if arguments.sqlite else postgres.url()
        asyncio.run(migrate(url))
        drama = make_drama(url, Path(home))
        start = time.monotonic()
        perform(drama, points, dice)
        seconds = time.monotonic() - start
    for point in CRASHES:
        print(f"{point:<34}{drama.kills[point]:>6} kills")  # noqa: T201
    print(f"{len(drama.sent)} events in {seconds:.0f} s: nothing lost, nothing half done")  # noqa: T201


if __name__ == "__main__":
    main()
