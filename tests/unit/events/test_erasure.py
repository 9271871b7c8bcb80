"""What is left of an erased envelope, and of what is said of it afterwards."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from app.events.erasure import ERASED, bare, completed, erased
from app.events.identity import Core, Known, Relation, core_of, kept_of, keys_of, relate
from app.events.lifecycle import BLANK, Envelope, project
from app.events.payload import Event, parse
from tests.factories import make_body

NOW = datetime(2026, 7, 1, tzinfo=UTC)
CANARY = "canary"
FIRST = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
WORDY: dict[str, Any] = {
    "status": "in_progress",
    "parties": [{"email": f"{CANARY}@x.com", "name": CANARY, "status": "viewed"}],
    "metadata": {CANARY: CANARY},
    "external_id": CANARY,
    "client_reference_id": CANARY,
    "send_error": CANARY,
    "detection_error": CANARY,
    "fields_status": CANARY,
    "extraction": {"name": CANARY},
    "reason": CANARY,
}


def event(**fields: Any) -> Event:
    return parse(make_body(**{**WORDY, **fields}), received_at=NOW)


def envelope(*said: Event) -> Envelope:
    known = BLANK
    for each in said:
        known, _ = project(known, each, received_at=NOW)
    return known


class TestErasedEnvelope:
    def test_holds_nothing_that_anybody_wrote(self) -> None:
        known = envelope(event(event="envelope.declined"), event(event="envelope.voided"))

        assert CANARY in repr(known)
        assert CANARY not in repr(erased(known))

    def test_keeps_status_times_and_counts(self) -> None:
        known = envelope(event(event="envelope.sent", is_test=True, org_id="ext_t"))

        left = erased(known)

        assert ("pending", NOW, 1, 0) == (left.status, left.sent_at, left.total, left.signed_count)
        assert ("t", True) == (left.tenant, left.is_test)

    def test_keeps_which_times_are_ours(self) -> None:
        known = envelope(event(event="envelope.viewed"))

        assert {"ours": ["viewed_at"]} == erased(known).marks
        assert {} == erased(envelope(event(event="envelope.review"))).marks


class TestBareEvent:
    def test_says_identity_type_and_status(self) -> None:
        said = event(event="envelope.declined", event_id="evt_1", status="declined")

        left = bare(said)

        assert CANARY not in repr(left)
        assert ("evt_1", "envelope.declined", "declined") == (
            left.atlas_event_id,
            left.type,
            left.status,
        )
        assert said.envelope_id == left.envelope_id

    def test_moves_the_status_and_brings_nothing_back(self) -> None:
        known = erased(envelope(event(event="envelope.sent")))

        after, _ = project(known, bare(event(event="envelope.signed")), received_at=NOW)

        assert ("signed", NOW) == (after.status, after.signed_at)
        assert CANARY not in repr(after)


class TestCounts:
    def test_of_a_signed_envelope_are_complete(self) -> None:
        known = erased(envelope(event(event="envelope.sent")))
        after, _ = project(known, bare(event(event="envelope.signed")), received_at=NOW)

        assert (1, 1) == (completed(after).signed_count, completed(after).total)
        assert completed(after) == completed(completed(after))

    def test_of_others_stay_what_they_were(self) -> None:
        known = erased(envelope(event(event="envelope.sent")))

        assert known is completed(known)


class TestIdentity:
    @pytest.mark.parametrize(
        "status, kept",
        [
            pytest.param("declined", "declined", id="of-the-lattice"),
            pytest.param("lost in the post", ERASED, id="strange"),
            pytest.param(None, None, id="absent"),
        ],
    )
    def test_keeps_a_status_that_says_no_more_than_it_should(
        self, status: str | None, kept: str | None
    ) -> None:
        assert kept == kept_of(Core("envelope.declined", "env_1", status, None)).status

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({}, id="reason"),
            pytest.param({"status": "lost in the post"}, id="strange-status"),
            pytest.param({"reason": None}, id="nothing-erased"),
        ],
    )
    def test_of_a_copy_is_recognised(self, change: dict[str, Any]) -> None:
        fields = {"event": "envelope.declined", "event_id": "evt_1", "envelope_id": "env_1"}
        body = make_body(**{**WORDY, **fields, **change})
        said = parse(body, received_at=NOW)
        known = Known(FIRST, kept_of(core_of(said)), None)
        keys = keys_of(said, body)

        relation, _ = relate(said, keys, dict.fromkeys(keys.all, known), content=None)

        assert Relation.DUPLICATE == relation

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"envelope_id": "env_2"}, id="another-envelope"),
            pytest.param({"event": "envelope.voided"}, id="another-type"),
            pytest.param({"status": "voided"}, id="another-status"),
        ],
    )
    def test_of_a_contradiction_is_still_seen(self, change: dict[str, Any]) -> None:
        fields = {"event": "envelope.declined", "event_id": "evt_1", "envelope_id": "env_1"}
        first = parse(make_body(**{**WORDY, **fields}), received_at=NOW)
        body = make_body(**{**WORDY, **fields, **change})
        known = Known(FIRST, kept_of(core_of(first)), None)

        relation, _ = relate(
            parse(body, received_at=NOW),
            keys_of(parse(body, received_at=NOW), body),
            {"id:evt_1": known},
            content=None,
        )

        assert Relation.CONFLICT == relation


def test_an_event_that_says_nothing_but_its_name_is_bare_already() -> None:
    body = json.dumps({"event": "envelope.signed", "envelope_id": "env_1"}).encode()
    said = parse(body, received_at=NOW)

    assert said == bare(said)
