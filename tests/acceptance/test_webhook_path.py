"""From the signed request to a callback in somebody else's code: the whole path."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.service import KEY, TOKEN, Service, wait_for
from tests.acceptance.tables import rows
from tests.factories import SIGN_TOKEN, make_body, new_envelope_id

# What a user writes: one file outside this repository. It notes each call on a line of its own.
CALLBACKS = """
import json
import os

from app.callbacks import Callbacks, Event

callbacks = Callbacks()


def note(name: str, event: Event) -> None:
    line = json.dumps(
        {
            "callback": name,
            "delivery_id": event.delivery_id,
            "type": event.type,
            "envelope_id": event.envelope_id,
            "account": event.account,
            "status": event.status,
            "effect": event.effect,
            "attempt": event.attempt,
            "is_replay": event.is_replay,
            "data": event.data,
        }
    )
    file = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode() + b"\\n")
    os.close(file)


@callbacks.on("envelope.signed")
async def start_onboarding(event: Event) -> None:
    note("start_onboarding", event)


@callbacks.on("envelope.signed", "envelope.declined", name="tell-sales")
def tell_sales(event: Event) -> None:
    note("tell-sales", event)
"""


class Author:
    """The user's side: a module outside the repository, and what it was called with."""

    def __init__(self, home: Path) -> None:
        self._notes = home / "notes"
        name = f"somebodys_code_{uuid.uuid4().hex[:8]}"
        (home / f"{name}.py").write_text(CALLBACKS)
        self.settings = {
            "CALLBACKS": f"{name}:callbacks",
            "PYTHONPATH": str(home),
            "NOTES": str(self._notes),
        }

    def calls(self, envelope_id: str) -> list[dict[str, Any]]:
        """Give the calls about one envelope, by the name of the callback."""
        text = self._notes.read_text() if self._notes.exists() else ""
        calls = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        found = [call for call in calls if call["envelope_id"] == envelope_id]
        return sorted(found, key=lambda call: str(call["callback"]))

    def wait_for_calls(self, envelope_id: str) -> list[dict[str, Any]]:
        """Wait until both callbacks were called; one may have been called again before that."""

        def called() -> set[str]:
            return {call["callback"] for call in self.calls(envelope_id)}

        wait_for(lambda: called() == {"start_onboarding", "tell-sales"}, "both calls")
        return self.calls(envelope_id)


@pytest.fixture(name="author")
def _author(tmp_path: Path) -> Author:
    return Author(tmp_path)


@pytest.fixture(name="whole")
def _whole(database_url: str, author: Author, tmp_path: Path) -> Iterator[Service]:
    settings = {"DATABASE_URL": with_password(database_url), **author.settings}
    with Service("serve", home=tmp_path, **settings) as service:
        yield service


class TestPath:
    def test_leads_from_a_webhook_to_the_callbacks_once(
        self, whole: Service, author: Author, database_url: str
    ) -> None:
        envelope_id = new_envelope_id()
        signed = make_body(envelope_id=envelope_id)
        viewed = make_body(event="envelope.viewed", envelope_id=envelope_id)

        for body in (signed, viewed, signed, signed):
            assert 200 == whole.deliver(body, KEY).status
        onboarding, sales = author.wait_for_calls(envelope_id)

        assert {
            "callback": "start_onboarding",
            "type": "envelope.signed",
            "account": "default",
            "status": "signed",
            "effect": "applied",
            "attempt": 1,
            "is_replay": False,
        }.items() <= onboarding.items()
        assert ("tell-sales", "envelope.signed") == (sales["callback"], sales["type"])
        assert onboarding["delivery_id"] != sales["delivery_id"]
        assert "envelope.signed" == onboarding["data"]["event"]
        assert SIGN_TOKEN not in json.dumps(onboarding)
        self.check_database(database_url, envelope_id)
        assert "signed" == whole.ask(f"/api/envelope/{envelope_id}/status", TOKEN).json()["status"]
        assert 0 == whole.terminate()
        assert 2 == len(author.calls(envelope_id))

    @staticmethod
    def check_database(database_url: str, envelope_id: str) -> None:
        query = "SELECT account, status, signed_count, sequence FROM envelopes WHERE id = $1"
        assert [("default", "signed", 1, 2)] == rows(database_url, query, envelope_id)
        query = "SELECT type, copies FROM events WHERE envelope_id = $1 ORDER BY sequence"
        assert [("envelope.signed", 2), ("envelope.viewed", 0)] == rows(
            database_url, query, envelope_id
        )
        query = "SELECT state, attempts FROM deliveries WHERE envelope_id = $1"
        wait_for(
            lambda: rows(database_url, query, envelope_id) == [("done", 1)] * 2,
            "two deliveries that are done",
        )


class TestParts:
    def test_share_the_path_between_processes(
        self, postgres_url: str, author: Author, tmp_path: Path
    ) -> None:
        """The one that takes webhooks knows no callbacks: who is owed stands in the database."""
        url = with_password(postgres_url)
        with (
            Service("work", home=tmp_path, DATABASE_URL=url, **author.settings) as worker,
            Service("serve", "--only", "webhooks", home=tmp_path, DATABASE_URL=url) as door,
        ):
            envelope_id = new_envelope_id()
            assert 200 == door.deliver(make_body(envelope_id=envelope_id), KEY).status
            calls = author.wait_for_calls(envelope_id)

            assert ["start_onboarding", "tell-sales"] == [call["callback"] for call in calls]
            assert (0, 0) == (door.terminate(), worker.terminate())

    def test_owe_what_came_while_nobody_was_there_to_be_called(
        self, postgres_url: str, author: Author, tmp_path: Path
    ) -> None:
        url = with_password(postgres_url)
        envelope_id = new_envelope_id()
        with Service("work", home=tmp_path, DATABASE_URL=url, **author.settings) as worker:
            assert 0 == worker.terminate()
            with Service("serve", "--only", "webhooks", home=tmp_path, DATABASE_URL=url) as door:
                door.deliver(make_body(envelope_id=envelope_id), KEY)
            worker.start()

            assert 2 == len(author.wait_for_calls(envelope_id))


class TestCrash:
    def test_right_after_the_answer_loses_nothing(
        self, database_url: str, author: Author, tmp_path: Path
    ) -> None:
        # What the killed one was doing is due again when its lease is over.
        settings = {
            "DATABASE_URL": with_password(database_url),
            **author.settings,
            "DELIVERY_LEASE": "2s",
        }
        envelope_ids = [new_envelope_id() for _ in range(20)]
        with Service("serve", home=tmp_path, **settings) as first:
            answers = [
                first.deliver(make_body(envelope_id=envelope_id), KEY).status
                for envelope_id in envelope_ids
            ]
            first.kill()
        assert {200} == set(answers)

        with Service("work", home=tmp_path, **settings):
            calls = [author.wait_for_calls(envelope_id) for envelope_id in envelope_ids]

        for each in calls:
            ids = {(call["callback"], call["delivery_id"]) for call in each}
            assert 2 == len(ids), "another attempt came under another key"
