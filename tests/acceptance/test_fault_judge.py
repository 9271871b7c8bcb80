"""The judge of fault runs finds what is wrong: a judge who never objects proves nothing."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.acceptance.conftest import copy_sqlite
from tests.acceptance.service import KEY
from tests.faults import oracle
from tests.faults.drill import Pace
from tests.faults.ledger import TOO_LATE, Ledger
from tests.faults.plan import Plan
from tests.faults.site import Site, Vitals, on_sqlite
from tests.faults.soak import Result, soak
from tests.faults.traffic import Expected, Traffic

# What is left when it ends is judged by all tests, of which the first waits for it.
pytestmark = pytest.mark.timeout(400)
PLAN = Plan(seed=7, events=150, replicas=1, workers=0)


@dataclass
class Trial:
    """What a run without faults has left behind, and who may tamper with it."""

    site: Site
    ledger: Ledger

    def change(self, statement: str) -> None:
        path = self.site.database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            assert connection.execute(statement).rowcount != 0

    def objections(self) -> set[str]:
        counts = oracle.judge(
            self.site,
            Expected.of(Traffic(PLAN.seed, PLAN.events)),
            self.ledger,
            baseline=[Vitals.of(service) for service in self.site.services],
        )
        return {count.name for count in counts if count.is_wrong}


@pytest.fixture(name="run", scope="module")
def _run(
    sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, Result]]:
    home = tmp_path_factory.mktemp("site")
    copy_sqlite(sqlite_template, home / "receiver.db")
    # Nobody is killed, so no lease has to end: on a busy machine a short one would.
    with on_sqlite(f"sqlite:///{home}/receiver.db", home, lease=60) as site:
        yield site, soak(site, PLAN, pace=Pace(rate=150, compress=600))


@pytest.fixture(name="trial")
def _trial(run: tuple[Site, Result], tmp_path: Path) -> Trial:
    """A copy of everything, because the tests are about to spoil it."""
    site, result = run
    copy_sqlite(site.notes.parent / "receiver.db", tmp_path / "receiver.db")
    for file in [site.notes, *site.logs]:
        shutil.copy(file, tmp_path)
    copied = replace(
        site, database_url=f"sqlite:///{tmp_path}/receiver.db", notes=tmp_path / "notes"
    )
    ledger = deepcopy(result.ledger)
    # How quick this machine was just now is not what is judged here.
    ledger.slowest = 0.0
    del ledger.unanswered[TOO_LATE]
    return Trial(copied, ledger)


def test_nothing_is_found_where_nothing_is_wrong(trial: Trial) -> None:
    assert set() == trial.objections()


@pytest.mark.parametrize(
    "statement, objection",
    [
        pytest.param(
            "DELETE FROM events WHERE id IN (SELECT event_id FROM bodies LIMIT 1)",
            "acknowledged and lost",
            id="an event is gone",
        ),
        pytest.param(
            "UPDATE bodies SET body = CAST(body || ' ' AS BLOB) WHERE rowid = 1",
            "bodies altered, or recorded and never sent",
            id="a body has a blank more",
        ),
        pytest.param(
            "UPDATE bodies SET body = (SELECT body FROM bodies WHERE rowid = 1) WHERE rowid = 2",
            "recorded twice",
            id="one body stands twice",
        ),
        pytest.param(
            "UPDATE events SET copies = 0 WHERE copies > 0",
            "events with fewer copies counted than answered for",
            id="copies were not counted",
        ),
        pytest.param(
            "UPDATE envelopes SET status = 'draft' WHERE status = 'signed'",
            "envelopes missing or with a wrong status",
            id="a status is wrong",
        ),
        pytest.param(
            "INSERT INTO watched_statuses VALUES ('default', 'env', 'signed', 'pending')",
            "status regressions",
            id="a status fell",
        ),
        pytest.param(
            "UPDATE events SET sequence = 99 WHERE sequence = 2",
            "envelopes whose events have gaps or repeats",
            id="a place is missing",
        ),
        pytest.param(
            "DELETE FROM deliveries WHERE rowid = 1",
            "deliveries missing or too many",
            id="an event is not owed",
        ),
        pytest.param(
            "UPDATE deliveries SET due_at = '2026-01-01' WHERE rowid = 1",
            "deliveries still due or leased",
            id="a delivery is still owed",
        ),
        pytest.param(
            "UPDATE deliveries SET state = 'dead' WHERE callback = 'note'",
            "deliveries that did not end as they had to",
            id="a delivery died",
        ),
        pytest.param(
            "UPDATE deliveries SET attempts = 40 WHERE rowid = 1",
            "most attempts at one delivery",
            id="a delivery was tried too often",
        ),
        pytest.param(
            "DELETE FROM watched_once WHERE rowid = 1",
            "writes in the settling transaction not made exactly once",
            id="a write is missing",
        ),
        pytest.param(
            "INSERT INTO watched_once SELECT * FROM watched_once LIMIT 1",
            "writes in the settling transaction not made exactly once",
            id="a write happened twice",
        ),
    ],
)
def test_what_is_wrong_in_the_database_is_found(
    trial: Trial, statement: str, objection: str
) -> None:
    trial.change(statement)

    assert objection in trial.objections()


def _swap(notes: list[str]) -> list[str]:
    """Let the last call of an envelope come before all others."""
    last = next(line for line in reversed(notes) if line.endswith((" 3 0", " 4 0")))
    return [last, *(line for line in notes if line != last)]


@pytest.mark.parametrize(
    "change, objection",
    [
        pytest.param(lambda notes: notes[1:], "deliveries done that no callback saw", id="no call"),
        pytest.param(lambda notes: [*notes, notes[0]], "calls beyond the first", id="one too many"),
        pytest.param(_swap, "first calls out of order that were not told", id="out of order"),
        pytest.param(
            lambda notes: [notes[0].replace(notes[0].split()[1], "another"), *notes[1:]],
            "calls under a wrong delivery id",
            id="another event",
        ),
    ],
)
def test_what_callbacks_should_not_have_seen_is_found(
    trial: Trial, change: Callable[[list[str]], list[str]], objection: str
) -> None:
    notes = trial.site.notes.read_text().splitlines()
    trial.site.notes.write_text("\n".join(change(notes)) + "\n")

    assert objection in trial.objections()


def test_a_secret_in_what_a_process_said_is_found(trial: Trial) -> None:
    with trial.site.logs[-1].open("a") as said:
        said.write(f"Traceback: {KEY}\n")

    assert {"secrets in logs and crash output"} == trial.objections()


def test_an_error_line_is_found(trial: Trial) -> None:
    with trial.site.logs[0].open("a") as log:
        log.write('{"level":"error","event":"request.failed"}\n')

    assert {"error lines in the logs, but for /readyz, request.failed"} == trial.objections()


@pytest.mark.parametrize(
    "spoil, objection",
    [
        pytest.param(
            lambda ledger: ledger.statuses.update({500: 1}),
            "answers 5xx other than 503",
            id="500",
        ),
        pytest.param(
            lambda ledger: ledger.statuses.update({401: 1}),
            "answers neither 200 nor 503",
            id="401",
        ),
        pytest.param(
            lambda ledger: ledger.note_silence(TOO_LATE), "no answer within 10 s", id="silence"
        ),
        pytest.param(
            lambda ledger: ledger.entries.pop(0),
            "events that were never acknowledged",
            id="never acknowledged",
        ),
        pytest.param(
            lambda ledger: ledger.entries[0].event_ids.update(ledger.entries[1].event_ids),
            "acknowledged under two ids",
            id="two ids",
        ),
    ],
)
def test_an_answer_that_must_not_be_is_found(
    trial: Trial, spoil: Callable[[Ledger], object], objection: str
) -> None:
    spoil(trial.ledger)

    assert objection in trial.objections()


def test_a_late_answer_is_found(trial: Trial) -> None:
    trial.ledger.slowest = 8.5

    assert {"slowest answer, ms"} == trial.objections()
