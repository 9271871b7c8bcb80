"""How a body is read, in every shape that Atlas was ever seen or feared to send."""

import json
import string
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import PayloadRejected
from app.events.payload import Event, Party, parse
from app.events.reading import MAX_VALUES

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def body_of(**fields: Any) -> bytes:
    """A valid flat body; a field of None is left out."""
    flat = {"event": "envelope.signed", "envelope_id": "env_1", **fields}
    return json.dumps({key: value for key, value in flat.items() if value is not None}).encode()


def read(**fields: Any) -> Event:
    return parse(body_of(**fields), received_at=NOW)


def read_json(text: str | bytes) -> Event:
    return parse(text.encode() if isinstance(text, str) else text, received_at=NOW)


def refusal(body: bytes) -> str:
    with pytest.raises(PayloadRejected) as caught:
        parse(body, received_at=NOW)
    return caught.value.reason


class TestTheEvidencedShape:
    def test_a_flat_body_is_read_whole(self) -> None:
        event = read(
            event_id="evt_1",
            timestamp="2026-07-01T12:00:00Z",
            status="signed",
            reason="all done",
            connected_org_id="ext_acme",
            parties=[{"email": "ada@example.com", "name": "Ada", "role": "Signer", "order": 1}],
            metadata={"external_id": "crm-42", "is_test": True, "own": [1, {"a": 1.5}]},
            client_reference_id="ref-1",
            fields_status="ready",
            fields_version=3,
            extracted_data={"amount": 12.5},
        )

        assert event == Event(
            type="envelope.signed",
            envelope_id="env_1",
            atlas_event_id="evt_1",
            occurred_at=NOON,
            status="signed",
            status_word="signed",
            reason="all done",
            tenant="acme",
            parties=(Party("ada@example.com", "Ada", "Signer", 1),),
            metadata={"external_id": "crm-42", "is_test": True, "own": [1, {"a": 1.5}]},
            external_id="crm-42",
            client_reference_id="ref-1",
            is_test=True,
            fields_status="ready",
            fields_version=3,
            extraction={"amount": 12.5},
        )

    def test_identifiers_alone_are_enough(self) -> None:
        assert Event(type="envelope.signed", envelope_id="env_1") == read()

    def test_nulls_say_nothing(self) -> None:
        text = (
            '{"event":"envelope.sent","event_id":null,"envelope_id":"e","timestamp":null,'
            '"status":null,"parties":null,"metadata":null,"fields_version":null,"is_test":null}'
        )

        assert Event(type="envelope.sent", envelope_id="e") == read_json(text)

    def test_unknown_fields_events_and_words_are_no_reason_to_refuse(self) -> None:
        event = read(event="envelope.archived", status="archived", surprise={"a": [1]})

        assert ("envelope.archived", None, "archived") == (
            event.type,
            event.status,
            event.status_word,
        )
        assert () == event.degraded

    def test_names_of_our_own_columns_mean_nothing(self) -> None:
        forged = read(
            state="done", attempts=9, lease="x", rank=99, disputed=True, marks={}, version=7
        )

        assert read() == forged


class TestTheName:
    @pytest.mark.parametrize("key", ["event", "type", "event_type", "eventType"])
    @pytest.mark.parametrize("wrapper", ["", "data", "payload"])
    def test_it_is_found_under_every_name(self, key: str, wrapper: str) -> None:
        body = {key: "envelope.sent", "envelope_id": "env_1"}

        event = read_json(json.dumps({wrapper: body} if wrapper else body))

        assert ("envelope.sent", "env_1") == (event.type, event.envelope_id)

    @pytest.mark.parametrize("key", ["type", "name", "event_type", "eventType"])
    def test_it_may_stand_inside_an_event_object(self, key: str) -> None:
        event = read_json(
            json.dumps({"event": {key: "envelope.sent", "id": "evt_1"}, "envelope_id": "env_1"})
        )

        assert ("envelope.sent", "evt_1") == (event.type, event.atlas_event_id)

    def test_an_event_object_without_one_is_passed_over(self) -> None:
        assert "envelope.sent" == read(event={"id": "evt_1"}, type="envelope.sent").type

    def test_the_first_match_wins(self) -> None:
        assert "envelope.sent" == read(event="envelope.sent", type="webhook").type

    def test_completed_is_the_other_word_for_signed(self) -> None:
        assert "envelope.signed" == read(event="envelope.completed").type

    @pytest.mark.parametrize(
        "name, reason",
        [
            pytest.param(None, "event_name_absent", id="absent"),
            pytest.param("", "event_name_blank", id="empty"),
            pytest.param("  ", "event_name_blank", id="blank"),
            pytest.param(7, "event_name_not_text", id="number"),
            pytest.param(True, "event_name_not_text", id="boolean"),
            pytest.param(["envelope.sent"], "event_name_not_text", id="list"),
            pytest.param({"type": 7}, "event_name_not_text", id="number-inside"),
            pytest.param({}, "event_name_absent", id="empty-object"),
            pytest.param("e" * 129, "event_name_too_long", id="too-long"),
            pytest.param("envelope sent", "event_name_unusable", id="blank-inside"),
            pytest.param("envelope.\x00sent", "event_name_unusable", id="nul"),
            pytest.param("envelope.\ud800", "event_name_unusable", id="lone-surrogate"),
            pytest.param("envelope\u2028sent", "event_name_unusable", id="line-separator"),
        ],
    )
    def test_without_a_usable_one_nothing_can_be_done(self, name: Any, reason: str) -> None:
        assert reason == refusal(body_of(event=name))

    def test_the_longest_one_fits(self) -> None:
        assert "e" * 128 == read(event="e" * 128).type


class TestTheEnvelopeId:
    @pytest.mark.parametrize(
        "body",
        [
            {"envelope_id": "env_1"},
            {"envelopeId": "env_1"},
            {"data": {"envelope_id": "env_1"}},
            {"data": {"envelopeId": "env_1"}},
            {"payload": {"envelope_id": "env_1"}},
            {"envelope": {"id": "env_1"}},
            {"envelope": {"envelope_id": "env_1"}},
            {"data": {"envelope": {"id": "env_1"}}},
            {"payload": {"envelope": {"id": "env_1"}}},
            {"id": "env_1"},
            {"data": {"id": "env_1"}},
            {"envelope_id": "env_1", "data": {"envelope_id": "env_1"}, "envelope": {"id": "env_1"}},
        ],
    )
    def test_it_is_found_in_every_place(self, body: dict[str, Any]) -> None:
        event = read_json(json.dumps({"event": "envelope.sent", **body}))

        assert ("env_1", None) == (event.envelope_id, event.atlas_event_id)

    @pytest.mark.parametrize("name", ["envelope.sent", "envelope.whatever", "contract.extracted"])
    def test_events_of_an_envelope_need_one(self, name: str) -> None:
        assert "envelope_id_absent" == refusal(body_of(event=name, envelope_id=None))

    def test_other_events_do_not(self) -> None:
        event = read_json('{"event":"ping","id":"a"}')

        assert (None, None) == (event.envelope_id, event.atlas_event_id)

    @pytest.mark.parametrize(
        "body",
        [
            {"envelope_id": "a", "envelopeId": "b"},
            {"envelope_id": "a", "data": {"envelope_id": "b"}},
            {"envelope_id": "a", "envelope": {"id": "b"}},
            {"id": "a", "data": {"id": "b"}},
        ],
    )
    def test_two_of_them_are_ambiguous(self, body: dict[str, Any]) -> None:
        text = json.dumps({"event": "envelope.sent", **body})

        assert "envelope_id_ambiguous" == refusal(text.encode())

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param({"envelope": {"id": "env_1", "envelope": {"id": "b"}}}, id="envelope"),
            pytest.param(
                {"event": {"id": "b"}, "type": "envelope.sent", "id": "env_1"}, id="event"
            ),
        ],
    )
    def test_the_id_of_what_else_is_in_there_is_none(self, body: dict[str, Any]) -> None:
        assert "env_1" == read_json(json.dumps({"event": "envelope.sent", **body})).envelope_id


class TestTheEventsOwnId:
    @pytest.mark.parametrize(
        "body",
        [
            {"event_id": "evt_1", "envelope_id": "env_1"},
            {"eventId": "evt_1", "envelope_id": "env_1"},
            {"id": "evt_1", "envelope_id": "env_1"},
            {"id": "evt_1", "data": {"envelope_id": "env_1"}},
            {"id": "evt_1", "event": None, "data": {"event": "a.b", "envelope_id": "env_1"}},
            {"id": "evt_1", "envelope": {"id": "env_1"}},
            {"event_id": "evt_1", "id": "env_1"},
            {"event_id": "evt_1", "id": "evt_1", "data": {"id": "env_1"}},
            {"event_id": "evt_1", "id": "delivery_7", "envelope_id": "env_1"},
        ],
    )
    def test_it_is_told_from_the_envelopes(self, body: dict[str, Any]) -> None:
        event = read_json(json.dumps({"event": "envelope.sent", **body}))

        assert ("evt_1", "env_1") == (event.atlas_event_id, event.envelope_id)

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param({"delivery_id": "d", "envelope_id": "env_1"}, id="delivery-id"),
            pytest.param({"id": "env_1", "envelope_id": "env_1"}, id="id-of-the-envelope"),
            pytest.param({"envelope_id": "env_1", "data": {"id": "p"}}, id="id-of-somebody-else"),
        ],
    )
    def test_no_other_id_is_taken_for_it(self, body: dict[str, Any]) -> None:
        event = read_json(json.dumps({"event": "envelope.viewed", **body}))

        assert event.atlas_event_id is None

    def test_two_of_them_are_ambiguous(self) -> None:
        assert "event_id_ambiguous" == refusal(body_of(event_id="a", eventId="b"))


class TestAnyId:
    @pytest.mark.parametrize(
        "id_",
        ["ENV_1", " env_1", "env_1 ", "e\u0301", "\u00e9", "env\u200b1", "a:b", "1", "\U0001f512"],
    )
    def test_it_is_kept_byte_for_byte(self, id_: str) -> None:
        assert id_ == read(envelope_id=id_).envelope_id
        assert id_ == read(event_id=id_).atlas_event_id

    @pytest.mark.parametrize("key", ["event_id", "envelope_id"])
    @pytest.mark.parametrize(
        "value, reason",
        [
            pytest.param("", "blank", id="empty"),
            pytest.param(" \t", "blank", id="blank"),
            pytest.param("\u3000", "blank", id="ideographic-space"),
            pytest.param(42, "not_text", id="number"),
            pytest.param(4.2, "not_text", id="float"),
            pytest.param(True, "not_text", id="boolean"),
            pytest.param(["a"], "not_text", id="list"),
            pytest.param({"a": 1}, "not_text", id="object"),
            pytest.param(10**4299, "not_text", id="long-number"),
            pytest.param("a\x00b", "unusable", id="nul"),
            pytest.param("a\nb", "unusable", id="line-feed"),
            pytest.param("a\x85b", "unusable", id="c1-control"),
            pytest.param("a\ud800", "unusable", id="lone-surrogate"),
            pytest.param("a" * 256, "too_long", id="256-letters"),
            pytest.param("\u00e9" * 128, "too_long", id="256-bytes"),
        ],
    )
    def test_what_no_column_holds_is_refused(self, key: str, value: Any, reason: str) -> None:
        assert f"{key}_{reason}" == refusal(body_of(**{key: value}))

    def test_the_longest_one_fits(self) -> None:
        assert "a" * 255 == read(event_id="a" * 255).atlas_event_id

    def test_its_length_is_that_of_its_bytes(self) -> None:
        assert "\u00e9" * 127 + "a" == read(event_id="\u00e9" * 127 + "a").atlas_event_id

    def test_a_bare_one_is_held_to_the_same_rules(self) -> None:
        assert "event_id_not_text" == refusal(body_of(id=7))
        assert "envelope_id_not_text" == refusal(b'{"event":"envelope.sent","id":7}')

    def test_big_numbers_elsewhere_lose_nothing(self) -> None:
        event = read(metadata={"a": 2**53 + 1, "b": 2**63, "c": 10**4299})

        assert {"a": 2**53 + 1, "b": 2**63, "c": 10**4299} == event.metadata
        assert () == event.degraded

    @pytest.mark.parametrize("name", ["client_secret", "password", "Api-Key", "signature"])
    def test_a_secret_of_the_caller_does_not_reach_a_column(self, name: str) -> None:
        """Also in a body that holds no link."""
        assert {name: "[redacted]"} == read(metadata={name: "canary"}).metadata


class TestARepeatedKey:
    @pytest.mark.parametrize(
        "text, reason",
        [
            ('{"event":"a.b","event":"c.d"}', "event_name_ambiguous"),
            ('{"event":"a.b","\\u0065vent":"c.d"}', "event_name_ambiguous"),
            ('{"event":{"name":"a.b","name":"c.d"}}', "event_name_ambiguous"),
            (
                '{"event":"envelope.sent","envelope_id":"a","envelope_id":"b"}',
                "envelope_id_ambiguous",
            ),
            ('{"event":"a.b","event_id":"a","event_id":"b"}', "event_id_ambiguous"),
            ('{"event":"a.b","event_id":"a","event_id":null}', "event_id_ambiguous"),
            ('{"event":"a.b","envelope_id":"e","id":"a","id":"b"}', "event_id_ambiguous"),
            (
                '{"event":"envelope.sent","data":{"envelope_id":"a","envelope_id":"b"}}',
                "envelope_id_ambiguous",
            ),
            (
                '{"event":"envelope.sent","data":{"envelope_id":"a"},"data":{"envelope_id":"b"}}',
                "body_ambiguous",
            ),
        ],
    )
    def test_of_the_identity_it_is_refused(self, text: str, reason: str) -> None:
        """Parsers disagree on which one counts, so a proxy may have read another event."""
        assert reason == refusal(text.encode())

    def test_with_the_same_value_it_is_harmless(self) -> None:
        text = '{"event":"envelope.sent","event":"envelope.sent","envelope_id":"e"}'

        assert "envelope.sent" == read_json(text).type

    def test_of_anything_else_the_last_one_counts(self) -> None:
        text = '{"event":"envelope.sent","envelope_id":"e","status":"draft","status":"sent"}'

        assert "sent" == read_json(text).status_word

    def test_inside_of_other_objects_it_is_their_own_business(self) -> None:
        text = '{"event":"a.b","metadata":{"id":1,"id":2},"parties":[{"id":"p1"},{"id":"p2"}]}'

        assert {"id": 2} == read_json(text).metadata


class TestBytesThatAreNoEvent:
    @pytest.mark.parametrize(
        "body, reason",
        [
            pytest.param(b"", "not_json", id="empty"),
            pytest.param(b"null", "not_an_object", id="null"),
            pytest.param(b"7", "not_an_object", id="scalar"),
            pytest.param(b'"envelope.signed"', "not_an_object", id="text"),
            pytest.param(b'[{"event":"a.b"}]', "not_an_object", id="array"),
            pytest.param(b'{"event":"a.b"}{"event":"a.b"}', "not_json", id="two-documents"),
            pytest.param(b'{"event":"a.b"} x', "not_json", id="trailing-text"),
            pytest.param(b'{"event":"a.b"', "not_json", id="cut-off"),
            pytest.param(b"event=a.b", "not_json", id="form"),
            pytest.param(b'{"event":"a.b","x":NaN}', "not_json", id="nan"),
            pytest.param(b'{"event":"a.b","x":Infinity}', "not_json", id="infinity"),
            pytest.param(b'{"event":"a.b","x":-Infinity}', "not_json", id="minus-infinity"),
            pytest.param(b'{"event":"a.b","x":"\n"}', "not_json", id="raw-control-character"),
            pytest.param(b'\xef\xbb\xbf{"event":"a.b"}', "not_json", id="byte-order-mark"),
            pytest.param('{"event":"a.b"}'.encode("utf-16"), "not_utf8", id="utf-16"),
            pytest.param('{"event":"a.b"}'.encode("utf-16-le"), "not_json", id="utf-16-no-bom"),
            pytest.param('{"event":"a.b"}'.encode("utf-32"), "not_utf8", id="utf-32"),
            pytest.param(b'{"event":"a.b","x":"\xff"}', "not_utf8", id="invalid-utf-8"),
            pytest.param(b'{"event":"a.b","x":"\xc0\xaf"}', "not_utf8", id="overlong-utf-8"),
            pytest.param(b'{"event":"a.b","x":"\xed\xa0\x80"}', "not_utf8", id="cesu-8"),
        ],
    )
    def test_they_are_refused_by_reason(self, body: bytes, reason: str) -> None:
        assert reason == refusal(body)

    @pytest.mark.parametrize("odd", ["", '"x":"\\ud800",'])
    @pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
    def test_nesting_has_a_limit_of_64_whichever_parser_reads(
        self, odd: str, opening: str, closing: str
    ) -> None:
        def nested(depth: int) -> bytes:
            inner = opening * (depth - 1) + "1" + closing * (depth - 1)
            return f'{{{odd}"event":"a.b","x":{inner}}}'.encode()

        assert "a.b" == parse(nested(64), received_at=NOW).type
        assert "too_deep" == refusal(nested(65))

    @pytest.mark.parametrize("depth", [65, 201, 999, 1_000, 20_000, 100_000])
    @pytest.mark.parametrize("odd", ["", '"x":"\\ud800",'])
    def test_deep_nesting_is_refused_at_any_depth(self, depth: int, odd: str) -> None:
        inner = "[" * (depth - 1) + "]" * (depth - 1)

        assert "too_deep" == refusal(f'{{{odd}"event":"a.b","x":{inner}}}'.encode())

    @pytest.mark.parametrize(
        "separators, value, count",
        [
            pytest.param(1, "0", 131_070, id="numbers"),
            pytest.param(2, "[]", 65_535, id="lists"),
            pytest.param(2, "{}", 65_535, id="objects"),
        ],
    )
    def test_the_number_of_values_has_a_limit(
        self, separators: int, value: str, count: int
    ) -> None:
        """A megabyte of empty lists takes a tenth of a second, and everybody waits for it."""

        def crowded(count: int) -> bytes:
            return f'{{"event":"a.b","x":[{",".join([value] * count)}]}}'.encode()

        assert MAX_VALUES - 2 < 2 + separators * count <= MAX_VALUES
        assert "a.b" == parse(crowded(count), received_at=NOW).type
        assert "too_many_values" == refusal(crowded(count + 1))

    def test_the_widest_object_is_no_crowd(self) -> None:
        wide = {"event": "a.b", **{f"{key:x}": 0 for key in range(100_000)}}

        assert "a.b" == parse(json.dumps(wide).encode(), received_at=NOW).type

    @pytest.mark.parametrize("text", [",[{" * 300_000, '\\\\",' * 200_000, '\\",\\' * 150_000])
    def test_commas_and_brackets_in_text_do_not_count(self, text: str) -> None:
        assert "a.b" == read(event="a.b", reason=text).type

    def test_many_brackets_are_not_deep(self) -> None:
        assert "envelope.signed" == read(x=[[]] * 1000).type


class TestAValueThatNoColumnHolds:
    """It costs the value, never the event."""

    def test_a_nul_becomes_visible(self) -> None:
        event = read(reason="a\x00b", metadata={"k\x00": ["v\x00", {"deep": "\x00"}]})

        assert "a\u2400b" == event.reason
        assert {"k\u2400": ["v\u2400", {"deep": "\u2400"}]} == event.metadata
        assert {"reason", "metadata", "metadata.k\u2400[0]"} <= {
            path.replace("\ufffd", "\u2400") for path in event.degraded
        }

    def test_beside_it_every_other_control_character_stays(self) -> None:
        event = read(reason="a\n\tb", metadata={"k\n": "v\t", "nul": "\x00"})

        assert ("a\n\tb", {"k\n": "v\t", "nul": "\u2400"}) == (event.reason, event.metadata)
        assert ("metadata.nul",) == event.degraded

    def test_a_lone_surrogate_becomes_visible(self) -> None:
        event = read(
            reason="a\ud800b", metadata={"k\udfff": "\ud800"}, parties=[{"name": "\udc00"}]
        )

        assert "a\ufffdb" == event.reason
        assert {"k\ufffd": "\ufffd"} == event.metadata
        assert (Party(name="\ufffd"),) == event.parties
        assert "reason" in event.degraded
        assert "\ud800" not in str(event)

    def test_a_pair_of_surrogates_is_one_character(self) -> None:
        event = read_json('{"event":"a.b","reason":"\\ud83d\\ude00"}')

        assert ("\U0001f600", ()) == (event.reason, event.degraded)

    @pytest.mark.parametrize("digits", [4_301, 200_000])
    def test_an_endless_number_is_kept_as_text(self, digits: int) -> None:
        text = f'{{"event":"a.b","metadata":{{"n":{"9" * digits}}},"reason":{"9" * digits}}}'

        event = read_json(text)

        assert {"n": "9" * digits} == event.metadata
        assert "9" * 1024 == event.reason
        assert {"metadata.n", "reason"} == set(event.degraded)

    @pytest.mark.parametrize(
        "number, shown",
        [
            ("1e400", "inf"),
            ("1E+400", "inf"),
            ("-1e400", "-inf"),
            ("1e0400", "inf"),
            ("9" * 250 + "e99", "inf"),
        ],
    )
    def test_an_infinite_number_is_kept_as_text(self, number: str, shown: str) -> None:
        event = read_json(f'{{"event":"a.b","metadata":{{"n":[{number},1.5]}}}}')

        assert ({"n": [shown, 1.5]}, ("metadata.n[0]",)) == (event.metadata, event.degraded)

    def test_infinite_numbers_of_every_spelling_may_stand_together(self) -> None:
        event = read_json('{"event":"a.b","metadata":{"n":[1e400,1e+400,' + "9" * 250 + "e99]}}")

        assert {"n": ["inf", "inf", "inf"]} == event.metadata

    def test_long_text_is_cut(self) -> None:
        event = read(
            reason="r" * 1025,
            external_id="x" * 256,
            status="s" * 65,
            parties=[{"email": "e" * 321, "name": "n" * 256}],
        )

        assert (1024, 255, 64) == (
            len(event.reason or ""),
            len(event.external_id or ""),
            len(event.status_word or ""),
        )
        assert (Party("e" * 320, "n" * 255),) == event.parties
        assert {"reason", "external_id", "status", "parties[0].email", "parties[0].name"} == set(
            event.degraded
        )

    @pytest.mark.parametrize("beside", ["plain", "a link: https://x.org", "odd: \ud800"])
    def test_text_that_just_fits_is_whole(self, beside: str) -> None:
        event = read(reason=beside, external_id="x" * 255)

        assert "x" * 255 == event.external_id
        assert "external_id" not in event.degraded

    def test_a_wrong_type_is_dropped(self) -> None:
        event = read(
            reason=["a"],
            account={"id": 1},
            parties="ada",
            metadata=[1],
            is_test="perhaps",
            fields_status=True,
        )

        assert read() == Event(event.type, event.envelope_id)
        assert {"reason", "account", "parties", "metadata", "is_test", "fields_status"} == set(
            event.degraded
        )

    def test_a_number_for_a_text_is_written_out(self) -> None:
        event = read(metadata={"external_id": 42})

        assert ("42", ("metadata.external_id",)) == (event.external_id, event.degraded)

    @pytest.mark.parametrize("value", [-1, 2**31, 1.0, True, "3", [3]])
    def test_a_version_is_a_small_whole_number(self, value: Any) -> None:
        event = read(fields_version=value)

        assert (None, ("fields_version",)) == (event.fields_version, event.degraded)

    def test_it_may_be_as_large_as_a_column_holds(self) -> None:
        assert 2_147_483_647 == read(fields_version=2_147_483_647).fields_version

    def test_the_list_of_losses_is_bounded(self) -> None:
        assert 32 == len(read(parties=[7] * 200).degraded)

    def test_so_is_the_path_of_each(self) -> None:
        event = read(metadata={"k" * 200: ["\x00"]})

        assert ("metadata." + "k" * 119,) == event.degraded


class TestTheTime:
    @pytest.mark.parametrize(
        "key",
        [
            "timestamp",
            "created_at",
            "createdAt",
            "occurred_at",
            "occurredAt",
            "sent_at",
            "sentAt",
        ],
    )
    def test_it_is_found_under_every_name(self, key: str) -> None:
        assert NOON == read(**{key: "2026-07-01T12:00:00Z"}).occurred_at

    @pytest.mark.parametrize(
        "value",
        [
            "2026-07-01T12:00:00Z",
            "2026-07-01T12:00Z",
            "2026-07-01 12:00:00.000000+00:00",
            "2026-07-01T14:00:00.000+02:00",
            "2026-07-01T14:00:00+0200",
            "2026-07-01T06:30:00,000000000-05:30",
            1_782_907_200,
            1_782_907_200.0,
            1_782_907_200_000,
        ],
    )
    def test_one_instant_is_one_instant_however_written(self, value: Any) -> None:
        assert NOON == read(timestamp=value).occurred_at

    def test_a_hundred_thousand_million_is_a_number_of_milliseconds(self) -> None:
        assert datetime(1973, 3, 3, 9, 46, 40, tzinfo=UTC) == read(timestamp=10**11).occurred_at
        assert read(timestamp=10**11 - 1).occurred_at is None

    def test_microseconds_are_kept(self) -> None:
        event = read(timestamp="2026-07-01T11:59:59.000001Z")

        assert NOON - timedelta(microseconds=999_999) == event.occurred_at

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param("2026-07-01T12:00:00", id="no-zone"),
            pytest.param("2026-07-01", id="no-time"),
            pytest.param("2026-02-30T12:00:00Z", id="30-february"),
            pytest.param("2026-06-30T23:59:60Z", id="leap-second"),
            pytest.param("2026-06-30T24:00:00Z", id="hour-24"),
            pytest.param("0001-01-01T00:00:00+23:59", id="before-year-1"),
            pytest.param("9999-12-31T23:59:59Z", id="year-9999"),
            pytest.param("9999-12-31T23:59:59-23:59", id="after-year-9999"),
            pytest.param("2036-07-01T12:00:00Z", id="ten-years-ahead"),
            pytest.param("\uff12026-07-01T12:00:00Z", id="full-width-digit"),
            pytest.param("2026-W27-3T12:00:00Z", id="week-date"),
            pytest.param("yesterday", id="prose"),
            pytest.param("", id="empty"),
            pytest.param(True, id="boolean"),
            pytest.param(10**400, id="huge-integer"),
            pytest.param(1e300, id="huge-float"),
            pytest.param([2026], id="list"),
        ],
    )
    def test_an_unusable_one_is_no_time(self, value: Any) -> None:
        event = read(timestamp=value)

        assert (None, ("timestamp",)) == (event.occurred_at, event.degraded)

    def test_clocks_may_differ_by_five_minutes(self) -> None:
        assert NOW + timedelta(minutes=5) == read(timestamp="2026-07-01T12:05:00Z").occurred_at
        assert read(timestamp="2026-07-01T12:05:00.000001Z").occurred_at is None

    def test_the_times_of_an_envelope_are_not_those_of_its_event(self) -> None:
        created = {"id": "env_1", "createdAt": "2026-06-01T12:00:00Z"}

        for body in ({"data": created}, {"envelope": created}, created):
            event = read_json(json.dumps({"event": "envelope.signed", **body}))
            assert event.occurred_at is None

    @pytest.mark.parametrize("key", ["created_at", "createdAt", "sent_at", "sentAt"])
    @pytest.mark.parametrize(
        "envelope",
        [
            pytest.param({}, id="by-its-name"),
            pytest.param({"id": "env_1"}, id="by-its-id"),
        ],
    )
    def test_no_time_of_an_envelope_is(self, key: str, envelope: dict[str, Any]) -> None:
        event = read(envelope={**envelope, key: "2026-07-01T12:00:00Z"})

        assert event.occurred_at is None

    @pytest.mark.parametrize("key", ["created_at", "createdAt", "sent_at", "sentAt"])
    def test_not_even_if_it_only_has_the_envelopes_id(self, key: str) -> None:
        event = read(data={"id": "env_1", key: "2026-07-01T12:00:00Z"})

        assert event.occurred_at is None


class TestTheStatus:
    @pytest.mark.parametrize(
        "word, status",
        [
            ("draft", "draft"),
            ("detecting", "draft"),
            ("review", "draft"),
            ("pending", "pending"),
            ("in_progress", "pending"),
            ("sent", "pending"),
            ("expired", "expired"),
            ("voided", "voided"),
            ("declined", "declined"),
            ("signed", "signed"),
            ("completed", "signed"),
            ("Signed", "signed"),
        ],
    )
    def test_words_of_both_generations_are_understood(self, word: str, status: str) -> None:
        event = read(status=word)

        assert (status, word) == (event.status, event.status_word)


class TestTheParties:
    @pytest.mark.parametrize("key", ["parties", "participants"])
    def test_they_are_found_under_both_names(self, key: str) -> None:
        assert (Party("a@b"),) == read(**{key: [{"email": "a@b"}]}).parties

    def test_an_empty_list_is_an_empty_list(self) -> None:
        assert () == read(parties=[]).parties

    def test_elements_may_lack_anything(self) -> None:
        assert (Party(), Party(order=2)) == read(parties=[{}, {"order": 2}]).parties

    def test_names_of_both_generations_are_understood(self) -> None:
        buyer, seller = {"role_name": "Buyer", "orderIndex": 0}, {"roleName": "S", "order_index": 1}

        assert (Party(role="Buyer", order=0), Party(role="S", order=1)) == read(
            parties=[buyer, seller]
        ).parties

    def test_a_bad_element_goes_and_the_others_stay(self) -> None:
        event = read(parties=["ada", {"email": 7, "role": [], "order": -1}, None])

        assert (Party(email="7"),) == event.parties
        assert (
            "parties[0]",
            "parties[1].email",
            "parties[1].role",
            "parties[1].order",
            "parties[2]",
        ) == event.degraded

    @pytest.mark.parametrize(
        "element, status",
        [
            ({"status": "waiting"}, "waiting"),
            ({"status": "Pending"}, "pending"),
            ({"status": "viewed"}, "viewed"),
            ({"status": "declined"}, "declined"),
            ({"status": "signed"}, "signed"),
            ({"status": "completed"}, "signed"),
            ({"status": "signed", "declinedAt": 1}, "signed"),
            ({"signed_at": "2026-07-01T12:00:00Z"}, "signed"),
            ({"signedAt": 1, "status": "pending"}, "signed"),
            ({"signedAt": None, "status": "pending"}, "pending"),
            ({"declined_at": "2026-07-01T12:00:00Z"}, "declined"),
            ({"declinedAt": 1, "status": "pending"}, "declined"),
            ({}, None),
        ],
    )
    def test_each_has_a_status(self, element: dict[str, Any], status: str | None) -> None:
        assert (Party(status=status),) == read(parties=[element]).parties

    @pytest.mark.parametrize("word", ["thinking", 7, ["signed"]])
    def test_an_unknown_status_is_none(self, word: Any) -> None:
        event = read(parties=[{"status": word}])

        assert ((Party(),), ("parties[0].status",)) == (event.parties, event.degraded)

    def test_a_crowd_is_cut(self) -> None:
        fits, crowd = read(parties=[{}] * 256), read(parties=[{}] * 257)

        assert (256, ()) == (len(fits.parties or ()), fits.degraded)
        assert (256, ("parties",)) == (len(crowd.parties or ()), crowd.degraded)


class TestTheMetadata:
    @pytest.mark.parametrize("wrapper", ["data", "payload", "envelope"])
    def test_it_may_be_nested(self, wrapper: str) -> None:
        assert {"a": 1} == read(**{wrapper: {"metadata": {"a": 1}}}).metadata

    def test_the_nearest_one_counts(self) -> None:
        assert {"a": 1} == read(metadata={"a": 1}, data={"metadata": {"a": 2}}).metadata

    def test_it_may_be_json_text(self) -> None:
        event = read(metadata='{"external_id":"crm-42","own":"\\ud800"}')

        assert {"external_id": "crm-42", "own": "\ufffd"} == event.metadata
        assert "crm-42" == event.external_id

    @pytest.mark.parametrize("text", ["", "free text", "[1]", "7", "\ud800", "[" * 1000])
    def test_other_text_is_none(self, text: str) -> None:
        event = read(metadata=text)

        assert (None, ("metadata",)) == (event.metadata, event.degraded)

    def test_it_answers_for_references_that_stand_nowhere_else(self) -> None:
        event = read(
            externalId="top",
            metadata={
                "external_id": "below",
                "clientReferenceId": "ref",
                "send_error": "no credits",
                "detection_error": "no fields",
                "is_test": None,
                "account": "mallory",
            },
        )

        assert ("top", "ref") == (event.external_id, event.client_reference_id)
        assert ("no credits", "no fields") == (event.send_error, event.detection_error)
        assert event.is_test is None

    def test_it_never_names_the_tenant(self) -> None:
        """Callers write metadata; who owns an envelope is not for them to say."""
        assert read(metadata={"account": "mallory", "org_id": "mallory"}).tenant is None


class TestTheTestFlag:
    @pytest.mark.parametrize(
        "value, flag", [(True, True), (False, False), ("true", True), ("False", False)]
    )
    @pytest.mark.parametrize("wrapper", ["", "metadata"])
    def test_it_is_a_boolean_or_its_name(self, value: Any, flag: object, wrapper: str) -> None:
        fields = {"is_test": value}

        assert flag is read(**({wrapper: fields} if wrapper else fields)).is_test

    @pytest.mark.parametrize("value", [1, "yes", []])
    def test_anything_else_is_no_flag(self, value: Any) -> None:
        event = read(is_test=value)

        assert (None, ("is_test",)) == (event.is_test, event.degraded)


class TestTheTenant:
    @pytest.mark.parametrize(
        "key", ["connected_org_id", "organizationId", "org_id", "account", "account_id"]
    )
    def test_it_is_found_under_every_name(self, key: str) -> None:
        assert "acme" == read(**{key: "acme"}).tenant

    @pytest.mark.parametrize(
        "value, tenant",
        [("ext_acme", "acme"), ("ext_ext_acme", "ext_acme"), ("ext_", None), ("", None)],
    )
    def test_one_prefix_is_taken_off(self, value: str, tenant: str | None) -> None:
        assert tenant == read(account=value).tenant


class TestTheExtraction:
    @pytest.mark.parametrize("key", ["extracted_data", "extractedData", "extraction", "extracted"])
    @pytest.mark.parametrize("value", [{"amount": 1}, [1], "prose"])
    def test_it_is_kept_as_it_is(self, key: str, value: Any) -> None:
        assert value == read(event="contract.extracted", **{key: value}).extraction

    @pytest.mark.parametrize("whole", [{"envelope_id": "env_1", "amount": 1}, [{"amount": 1}]])
    def test_it_may_be_the_whole_of_data(self, whole: Any) -> None:
        assert whole == read(event="contract.extracted", data=whole).extraction

    @pytest.mark.parametrize("whole", [{"envelope_id": "env_1", "metadata": {}}, {}, [], "a", 7])
    def test_identifiers_are_none(self, whole: Any) -> None:
        assert read(event="contract.extracted", data=whole).extraction is None

    def test_what_is_lost_of_it_is_noted(self) -> None:
        body = body_of(event="contract.extracted", data={"amount": "HUGE"})

        event = parse(body.replace(b'"HUGE"', b"1e400"), received_at=NOW)

        assert ("data.amount",) == event.degraded

    def test_data_of_other_events_is_none(self) -> None:
        assert read(data={"amount": 1}).extraction is None


class TestSecrets:
    """Whoever holds a signing link signs."""

    LINK = "https://atlaswork.ai/sign/env_1?t=canary"

    @pytest.mark.parametrize("escape", [False, True])
    def test_they_are_in_no_value_of_an_event(self, escape: object) -> None:
        body = body_of(
            reason=f"see {self.LINK} please",
            sign_url=self.LINK,
            metadata={"sign_url": self.LINK, "note": self.LINK, "deep": [{"reviewUrl": "canary"}]},
            extracted_data={"text": self.LINK, "download_urls": {"pdf": "canary"}},
            parties=[{"name": self.LINK, "sign_url": self.LINK}],
        )

        event = parse(body.replace(b"/", rb"\/") if escape else body, received_at=NOW)

        assert "canary" not in repr(event)
        assert "see https://atlaswork.ai/sign/env_1?[redacted] please" == event.reason

    def test_a_link_without_a_host_is_one_too(self) -> None:
        assert {"sign_url": "[redacted]"} == read(metadata={"sign_url": "/sign/1?t=a"}).metadata


class TestOtherNames:
    @pytest.mark.parametrize(
        "key, field",
        [
            ("reason", "reason"),
            ("decline_reason", "reason"),
            ("declineReason", "reason"),
            ("void_reason", "reason"),
            ("voidReason", "reason"),
            ("connected_org_id", "tenant"),
            ("connectedOrgId", "tenant"),
            ("organizationId", "tenant"),
            ("organization_id", "tenant"),
            ("org_id", "tenant"),
            ("orgId", "tenant"),
            ("account", "tenant"),
            ("account_id", "tenant"),
            ("accountId", "tenant"),
            ("external_id", "external_id"),
            ("externalId", "external_id"),
            ("client_reference_id", "client_reference_id"),
            ("clientReferenceId", "client_reference_id"),
            ("send_error", "send_error"),
            ("sendError", "send_error"),
            ("detection_error", "detection_error"),
            ("detectionError", "detection_error"),
            ("fields_status", "fields_status"),
            ("fieldsStatus", "fields_status"),
        ],
    )
    def test_of_a_text_are_all_understood(self, key: str, field: str) -> None:
        assert "what it says" == getattr(read(**{key: "what it says"}), field)

    def test_count_less_than_being_near(self) -> None:
        assert "near" == read(voidReason="near", data={"reason": "far"}).reason


class TestNestedBodies:
    @pytest.mark.parametrize("wrapper", ["data", "payload", "envelope"])
    def test_every_field_may_stand_one_level_down(self, wrapper: str) -> None:
        inner = {
            "envelope_id": "env_1",
            "status": "in_progress",
            "fieldsStatus": "ready",
            "fieldsVersion": 2,
            "declineReason": "no",
            "participants": [{"email": "a@b"}],
            "organizationId": "acme",
            "isTest": True,
        }

        event = read_json(json.dumps({"type": "envelope.sent", wrapper: inner}))

        assert ("pending", "ready", 2, "no") == (
            event.status,
            event.fields_status,
            event.fields_version,
            event.reason,
        )
        assert ((Party("a@b"),), "acme", True) == (event.parties, event.tenant, event.is_test)

    def test_the_order_of_keys_does_not_matter(self) -> None:
        fields = {"event": "envelope.sent", "envelope_id": "e", "reason": "a", "void_reason": "b"}
        backwards = dict(reversed(fields.items()))

        assert read_json(json.dumps(fields)) == read_json(json.dumps(backwards))


NAMES = (
    *("event", "type", "id", "event_id", "envelope_id", "data", "payload", "envelope"),
    *("parties", "metadata", "status", "timestamp", "is_test", "order", "email", "name"),
    *("fields_version", "extracted_data", "sign_url"),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(NAMES) | st.text(max_size=3),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


class TestEveryBody:
    """It is read or refused; nothing else can happen."""

    @given(st.binary(max_size=200))
    @settings(deadline=None)
    def test_of_random_bytes(self, body: bytes) -> None:
        with suppress(PayloadRejected):
            parse(body, received_at=NOW)

    @given(st.text(alphabet='{}[]":,\\ue0dD8.-+1 \x00\ufeff' + string.ascii_lowercase))
    @settings(deadline=None)
    def test_of_random_text(self, text: str) -> None:
        with suppress(PayloadRejected):
            parse(b'{"event":"a.b",' + text.encode() + b"}", received_at=NOW)

    @given(value=json_values, is_ascii=st.booleans())
    @settings(deadline=None)
    def test_of_random_json(self, *, value: Any, is_ascii: bool) -> None:
        body = {"event": "envelope.sent", "envelope_id": "e"}
        body |= value if isinstance(value, dict) else {"metadata": value, "parties": value}
        text = json.dumps(body, ensure_ascii=is_ascii)

        with suppress(PayloadRejected):
            event = parse(text.encode("utf-8", "replace"), received_at=NOW)
            json.dumps([event.metadata, event.extraction], allow_nan=False).encode()
            repr(event).encode()

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b'{"event":"a.b","x":' + b"9" * 1_000_000 + b"}", id="one-number"),
            pytest.param(
                b'{"event":"a.b","metadata":[' + b",".join([b"9" * 4300] * 240) + b"]}",
                id="long-numbers",
            ),
            pytest.param(
                json.dumps(
                    {"event": "a.b", "metadata": {f"k{n}": n for n in range(70_000)}}
                ).encode(),
                id="wide-object",
            ),
            pytest.param(b'{"event":"a.b","x":[' + b",".join([b"[]"] * 65_000) + b"]}", id="lists"),
            pytest.param(
                b'{"event":"a.b","reason":"' + b"://" * 300_000 + b'"}', id="broken-links"
            ),
            pytest.param(b'{"event":"a.b","reason":"' + b"a" * 1_000_000 + b'"}', id="long-text"),
        ],
    )
    def test_of_the_largest_size(self, body: bytes) -> None:
        """Work that grew with the square of the size would not end within the test's time."""
        assert "a.b" == parse(body, received_at=NOW).type
