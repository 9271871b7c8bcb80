"""A later release was here, or still is: what it has written is kept, shown and not choked on.

There is no earlier release to run beside this one, so the later one is played: it has migrated
the schema in a way that allows this one, and writes words and rows that this one does not know.
"""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from app import __version__
from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer
from tests.acceptance.service import KEY, OPERATOR_TOKEN, TOKEN, Service
from tests.acceptance.tables import rows
from tests.acceptance.test_events_api import change
from tests.factories import make_body, new_envelope_id

LATER_SCHEMA = """
ALTER TABLE {}envelopes ADD COLUMN reviewed_at text;
ALTER TABLE {}events ADD COLUMN mood text;
ALTER TABLE {}deliveries ADD COLUMN priority integer NOT NULL DEFAULT 3;
ALTER TABLE {}callbacks ADD COLUMN shard integer;
CREATE TABLE {}novelties (id integer PRIMARY KEY);
UPDATE {}alembic_version SET version_num = 'later';
INSERT INTO {}releases VALUES ('later', '$release', '2026-11-22 00:00:00.000000');
"""
# Each has a word that only the later release knows.
LATER_WORDS = """
UPDATE {}envelopes SET status = 'reviewed' WHERE id = '$envelope';
UPDATE {}events SET effect = 'merged', status = 'reviewed', type = 'envelope.reviewed'
 WHERE envelope_id = '$envelope';
UPDATE {}deliveries SET state = 'postponed' WHERE envelope_id = '$envelope';
UPDATE {}attempts SET verdict = 'postponed', error = NULL;
INSERT INTO {}changes (kind, account, envelope_id, at)
 VALUES ('reviewed', 'default', '$envelope', '2026-11-22 00:00:00.000000');
INSERT INTO {}audit (id, at, actor, action, subject) VALUES
 ('$number', '2026-11-22 00:00:00.000000', 'robot:7', 'envelope.reviewed',
  'envelope:default/$envelope');
INSERT INTO {}tallies (at, account, name, label, count)
 VALUES ('2026-11-22 00:00:00.000000', 'default', 'reviews', 'merged', 1);
"""


def play(url: str, script: str, envelope_id: str = "") -> None:
    """Do what the later release would."""
    is_postgresql = url.startswith("postgres")
    number = str(uuid4()) if is_postgresql else uuid4().hex
    words = {"$envelope": envelope_id, "$release": __version__, "$number": number}
    text = script.replace("{}", "atlas_receiver." if is_postgresql else "")
    for word, value in words.items():
        text = text.replace(word, value)
    for statement in filter(None, map(str.strip, text.split(";"))):
        change(url, statement)


def record(service: Service, body: bytes) -> str:
    """Send it until it is taken, as Atlas would; gives the id of its event."""
    answers: list[Answer] = []

    def is_taken() -> bool:
        answers.append(service.deliver(body, KEY))
        return answers[-1].status == 200

    service.wait_until(is_taken, "an event that is taken")
    event_id: str = answers[-1].json()["event_id"]
    service.wait_until(
        lambda: bool(service.lines("delivery.attempted", event_id=event_id)), "its delivery"
    )
    return event_id


@pytest.fixture(name="service")
def _service(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """The release before, on the schema of the later one."""
    play(database_url, LATER_SCHEMA)
    settings = {
        "DATABASE_URL": with_password(database_url),
        "CALLBACKS": "app.callbacks.audit_log:callbacks",
    }
    with Service("serve", home=tmp_path, **settings) as service:
        yield service


@pytest.fixture(name="envelope_id")
def _envelope_id(service: Service) -> str:
    """An envelope that the later release has dealt with."""
    envelope_id = new_envelope_id()
    record(service, make_body(envelope_id=envelope_id, event="envelope.sent"))
    play(service.settings["DATABASE_URL"], LATER_WORDS, envelope_id)
    return envelope_id


class TestReleaseBefore:
    def test_serves_a_schema_that_allows_it(self, service: Service) -> None:
        record(service, make_body())

        assert service.lines("schema.newer", found="later")

    def test_shows_words_that_it_does_not_know(self, service: Service, envelope_id: str) -> None:
        """To readers of lists a word is a word; one that is new must not hide all others."""
        targets = [
            "/api/envelopes",
            f"/api/envelope/{envelope_id}",
            f"/api/envelope/{envelope_id}/status",
            f"/api/envelope/{envelope_id}/explain",
            "/api/events",
            "/api/deliveries",
            "/api/failures",
            "/api/callbacks",
            "/api/stats",
            "/metrics",
            "/readyz",
        ]
        targets += [f"/api/events/{row[0]}" for row in rows_of(service, "events", envelope_id)]
        targets += [
            f"/api/deliveries/{row[0]}" for row in rows_of(service, "deliveries", envelope_id)
        ]

        statuses = {
            target: [service.ask(target, token).status for token in (TOKEN, OPERATOR_TOKEN)]
            for target in targets
        }

        assert not {target: said for target, said in statuses.items() if 200 not in said}
        assert [] == service.lines("request.crashed")

    def test_goes_on_with_what_the_later_one_began(
        self, service: Service, envelope_id: str
    ) -> None:
        event_id = record(service, make_body(envelope_id=envelope_id, event="envelope.signed"))

        service.wait_until(
            lambda: event_id in service.ask("/api/events", TOKEN).body.decode(),
            "an item of the feed behind one that nobody here understands",
        )
        assert [] == service.errors()

    def test_loses_nothing_of_it(self, service: Service, envelope_id: str) -> None:
        for table in ("events", "deliveries"):
            assert 1 == len(rows_of(service, table, envelope_id))
        query = "SELECT state, priority FROM deliveries WHERE envelope_id = $1"
        assert [("postponed", 3)] == rows(service.settings["DATABASE_URL"], query, envelope_id)


def rows_of(service: Service, table: str, envelope_id: str) -> list[tuple[str]]:
    query = f"SELECT CAST(id AS text) FROM {table} WHERE envelope_id = $1"  # noqa: S608
    found = rows(service.settings["DATABASE_URL"], query, envelope_id)
    return [(str(row[0]),) for row in found]
