"""When two bodies are the same event, and when they are not."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import PayloadRejected
from app.events.identity import (
    ONCE_TYPES,
    Core,
    Keys,
    Known,
    Relation,
    content_digest,
    core_of,
    keys_of,
    needs_content,
    quarantine_key,
    relate,
)
from app.events.payload import Event, parse

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
FIRST = UUID(int=1)


def body_of(**fields: Any) -> bytes:
    """A valid body; a field of None is left out."""
    flat = {"event": "envelope.viewed", "envelope_id": "env_1", **fields}
    return json.dumps({key: value for key, value in flat.items() if value is not None}).encode()


def read(body: bytes) -> Event:
    return parse(body, received_at=NOW)


def keys(body: bytes) -> Keys:
    return keys_of(read(body), body)


def remembered(body: bytes) -> dict[str, Known]:
    """Everything that is known after `body` was recorded first."""
    known = Known(FIRST, core_of(read(body)), content_digest(body))
    return dict.fromkeys(keys(body).all, known)


def relation(body: bytes, owners: dict[str, Known]) -> Relation:
    """Go the way that intake goes: a digest is made only where one is asked for."""
    claimed = keys(body)
    compared = needs_content(claimed, owners)
    content = content_digest(body) if compared is not None else None
    decided, known = relate(read(body), claimed, owners, content=content)
    assert (known is None) == (decided is Relation.NEW)
    assert known is None or known.event_id == FIRST
    return decided


class TestTheKeys:
    def test_an_event_claims_every_key_that_it_has(self) -> None:
        body = body_of(event="envelope.signed", event_id="evt_1")

        assert ("id:evt_1", "once:env_1:envelope.signed") == keys(body).all

    def test_these_are_the_things_that_happen_once(self) -> None:
        once = {"created", "sent", "signed", "declined", "voided"}

        assert {f"envelope.{name}" for name in once} == ONCE_TYPES

    @pytest.mark.parametrize("name", sorted(ONCE_TYPES))
    def test_some_things_happen_to_an_envelope_once(self, name: str) -> None:
        assert (f"once:env_1:{name}",) == keys(body_of(event=name)).all

    @pytest.mark.parametrize("name", ["envelope.viewed", "envelope.expired", "contract.extracted"])
    def test_others_are_known_by_their_content(self, name: str) -> None:
        body = body_of(event=name)

        assert (f"body:1:{content_digest(body)}",) == keys(body).all

    def test_completed_and_signed_happen_once_between_them(self) -> None:
        signed, completed = body_of(event="envelope.signed"), body_of(event="envelope.completed")

        assert keys(signed) == keys(completed)

    def test_no_envelope_id_can_pose_as_another(self) -> None:
        one = body_of(event="envelope.sent", envelope_id="a:envelope.sent")
        other = body_of(event="envelope.sent", envelope_id="a")

        assert keys(one).once != keys(other).once
        assert keys(body_of(event_id="once:env_1:envelope.sent")).own not in keys(other).all

    def test_ids_are_compared_byte_by_byte(self) -> None:
        spellings = ["evt", "EVT", "evt ", "e\u0301vt", "\u00e9vt", "evt\u200b"]

        assert len(spellings) == len({keys(body_of(event_id=id_)).own for id_ in spellings})

    def test_a_body_that_nobody_understands_is_known_by_its_bytes(self) -> None:
        assert f"raw:{sha256(b'{').hexdigest()}" == quarantine_key(b"{")


class TestTheCore:
    def test_it_is_what_happened_to_which_envelope(self) -> None:
        body = body_of(event="envelope.declined", status="Declined", reason="price", is_test=True)

        assert Core("envelope.declined", "env_1", "declined", "price") == core_of(read(body))

    def test_words_of_both_generations_are_the_same_status(self) -> None:
        pending, in_progress = body_of(status="pending"), body_of(status="in_progress")

        assert core_of(read(pending)) == core_of(read(in_progress))

    def test_an_unknown_word_stands_for_itself(self) -> None:
        assert "archived" == core_of(read(body_of(status="archived"))).status


class TestTheContent:
    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(b'{"a":[1,{"b":2}],"event":"a.b","c":"\xc3\xa9"}', id="key-order"),
            pytest.param(b'\n{"event" : "a.b",\t"c":"\xc3\xa9","a":[1, {"b":2}]}', id="spacing"),
            pytest.param(b'{"event":"a.b","c":"\\u00e9","a":[1,{"b":2}]}', id="escapes"),
            pytest.param(
                b'{"event":"a.b","c":"\xc3\xa9","a":[1,{"b":2}],"event_id":"x"}', id="own-id"
            ),
        ],
    )
    def test_how_it_is_written_does_not_matter(self, other: bytes) -> None:
        body = b'{"event":"a.b","c":"\xc3\xa9","a":[1,{"b":2}]}'

        assert content_digest(body) == content_digest(other)

    @pytest.mark.parametrize(
        "name",
        [
            "attempt",
            "attempts",
            "attempt_number",
            "retry",
            "retry_count",
            "delivery_id",
            "delivered_at",
            "attemptNumber",
            "retryCount",
            "deliveryId",
            "deliveredAt",
        ],
    )
    @pytest.mark.parametrize("wrapper", [None, "data", "payload", "envelope", "event"])
    def test_what_changes_with_each_delivery_does_not_matter(
        self, name: str, wrapper: str | None
    ) -> None:
        def attempt(number: int) -> bytes:
            fields: dict[str, Any] = {name: number}
            whole = fields if wrapper is None else {wrapper: fields}
            return body_of(type="envelope.viewed", **{"event": None, **whole})

        assert content_digest(attempt(1)) == content_digest(attempt(2))

    @pytest.mark.parametrize("name", ["event_id", "eventId", "id"])
    def test_the_events_own_id_does_not_matter(self, name: str) -> None:
        assert content_digest(body_of(**{name: "a"})) == content_digest(body_of(**{name: "b"}))

    @pytest.mark.parametrize(
        "one, other",
        [
            pytest.param({"x": 1}, {"x": 1.0}, id="numbers-as-written"),
            pytest.param({"x": 1}, {"x": "1"}, id="number-and-text"),
            pytest.param({"x": 1}, {"x": [0, "1"]}, id="number-and-list"),
            pytest.param({"x": "\u00e9"}, {"x": "e\u0301"}, id="normal-forms"),
            pytest.param({"x": "\ud800"}, {"x": "\ud801"}, id="lone-surrogates"),
            pytest.param({"x": {}}, {"x": []}, id="object-and-list"),
            pytest.param({"timestamp": 1}, {"timestamp": 2}, id="times"),
            pytest.param({"sent_at": 1}, {"sent_at": 2}, id="times-of-another-name"),
            pytest.param({"metadata": {"retry": 1}}, {"metadata": {"retry": 2}}, id="metadata"),
            pytest.param({"parties": [{"id": 1}]}, {"parties": [{"id": 2}]}, id="ids-of-others"),
            pytest.param({"data": {"id": "p1"}}, {"data": {"id": "p2"}}, id="ids-inside"),
        ],
    )
    def test_everything_else_does(self, one: Any, other: Any) -> None:
        assert content_digest(body_of(**one)) != content_digest(body_of(**other))

    def test_its_digest_is_the_same_in_every_release(self) -> None:
        """Databases remember it; another one needs another name of the recipe."""
        body = b'{"event": "envelope.viewed", "envelope_id": "env_1", "n": [1, 0.5, "z"]}'

        assert "ecf1b3f81063a28edbd4f15b2ad987970faaa69a2052a67d7c45ec6119b6ac5c" == content_digest(
            body
        )

    def test_no_digit_of_an_endless_number_is_lost(self) -> None:
        one, other = ('{"event":"a.b","x":' + "1" * 5000 + digit + "}" for digit in "12")

        assert content_digest(one.encode()) != content_digest(other.encode())

    @given(
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["id", "event_id", "data", "envelope", "attempt", "x"]),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=10,
        )
    )
    @settings(deadline=None)
    def test_every_body_that_can_be_read_has_one(self, value: Any) -> None:
        fields = value if isinstance(value, dict) else {"x": value}
        body = body_of(**fields)

        with suppress(PayloadRejected):
            read(body)
            assert 64 == len(content_digest(body))


SIGNED = {"event": "envelope.signed", "status": "signed"}
VIEWED = {"event": "envelope.viewed", "timestamp": "2026-07-01T11:00:00Z"}


class TestTwoBodies:
    def test_are_strangers_without_a_key_in_common(self) -> None:
        owners = remembered(body_of(**SIGNED, event_id="a"))

        assert Relation.NEW == relation(body_of(**VIEWED), owners)
        assert Relation.NEW == relation(body_of(**SIGNED, envelope_id="env_2"), owners)
        assert Relation.NEW == relation(body_of(**SIGNED), {})

    @pytest.mark.parametrize("kind", [SIGNED, VIEWED])
    @pytest.mark.parametrize("id_", ["a", None])
    def test_are_duplicates_when_they_are_equal(
        self, kind: dict[str, Any], id_: str | None
    ) -> None:
        body = body_of(**kind, event_id=id_)

        assert Relation.DUPLICATE == relation(body, remembered(body))

    @pytest.mark.parametrize("id_", ["a", None])
    def test_are_duplicates_when_only_the_context_differs(self, id_: str | None) -> None:
        owners = remembered(body_of(**SIGNED, event_id=id_))

        richer = body_of(**SIGNED, event_id=id_, metadata={"a": 1}, timestamp=1_782_900_000)

        assert Relation.DUPLICATE == relation(richer, owners)

    @pytest.mark.parametrize("id_", ["a", None])
    @pytest.mark.parametrize("change", [{"status": "voided"}, {"reason": "another"}])
    def test_contradict_each_other_when_the_core_differs(
        self, id_: str | None, change: dict[str, Any]
    ) -> None:
        owners = remembered(body_of(**SIGNED, event_id=id_))

        assert Relation.CONFLICT == relation(body_of(**{**SIGNED, **change}, event_id=id_), owners)

    @pytest.mark.parametrize("change", [{"event": "envelope.sent"}, {"envelope_id": "env_2"}])
    def test_contradict_each_other_when_one_id_names_two_things(self, change: Any) -> None:
        owners = remembered(body_of(**SIGNED, event_id="a"))

        assert Relation.CONFLICT == relation(body_of(**{**SIGNED, **change}, event_id="a"), owners)

    @pytest.mark.parametrize("kind", [SIGNED, VIEWED])
    @pytest.mark.parametrize("first", ["a", None])
    def test_are_one_event_under_two_ids_when_their_content_is_equal(
        self, kind: dict[str, Any], first: str | None
    ) -> None:
        """Some senders make a new id for every attempt."""
        owners = remembered(body_of(**kind, event_id=first, attempt=1))

        assert Relation.ALIAS == relation(body_of(**kind, event_id="b", attempt=2), owners)

    @pytest.mark.parametrize("kind", [SIGNED, VIEWED])
    def test_are_two_events_when_ids_and_content_differ(self, kind: dict[str, Any]) -> None:
        """The sender says so, and to deliver twice is better than to lose."""
        owners = remembered(body_of(**kind, event_id="a"))

        assert Relation.NEW == relation(body_of(**kind, event_id="b", metadata={"a": 1}), owners)

    def test_are_two_events_when_the_content_of_the_first_is_not_kept(self) -> None:
        known = Known(FIRST, core_of(read(body_of(**SIGNED))), None)
        owners = dict.fromkeys(keys(body_of(**SIGNED, event_id="a")).all, known)

        assert Relation.NEW == relation(body_of(**SIGNED, event_id="b"), owners)

    def test_of_two_accounts_never_meet(self) -> None:
        """Keys are looked up within one account, so the other's are not among the owners."""
        assert Relation.NEW == relation(body_of(**SIGNED, event_id="a"), {})


class TestComparingContent:
    """A digest is made for the few that need one."""

    @pytest.mark.parametrize(
        "first, second, is_needed",
        [
            pytest.param({**SIGNED}, {**SIGNED, "event_id": "b"}, True, id="new-id"),
            pytest.param({**SIGNED}, {**SIGNED}, False, id="no-id"),
            pytest.param(
                {**SIGNED, "event_id": "a"}, {**SIGNED, "event_id": "a"}, False, id="known-id"
            ),
            pytest.param({**VIEWED}, {**VIEWED, "event_id": "b"}, False, id="key-is-content"),
            pytest.param({**VIEWED}, {**SIGNED, "event_id": "b"}, False, id="strangers"),
        ],
    )
    def test_is_needed_only_for_a_new_id_on_a_known_occasion(
        self, first: Any, second: Any, is_needed: object
    ) -> None:
        compared = needs_content(keys(body_of(**second)), remembered(body_of(**first)))

        assert is_needed is (compared is not None)
