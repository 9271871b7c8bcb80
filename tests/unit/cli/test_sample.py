"""Made-up events look like those of Atlas, and every part of them can be set."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli.sample import (
    PREFIX,
    TYPES,
    Assignment,
    assign,
    encode,
    make_sample,
    read_assignment,
)
from app.errors import ConfigError
from app.events.lifecycle import BLANK, Effect, project
from app.events.payload import parse

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


def sample_of(event_type: str = "envelope.signed", envelope_id: str | None = None) -> Any:
    return make_sample(event_type, envelope_id=envelope_id, at=NOW)


def changed(*assignments: str) -> Any:
    sample = sample_of()
    assign(sample, map(read_assignment, assignments))
    return sample


class TestSample:
    @pytest.mark.parametrize("event_type", TYPES)
    def test_is_understood_without_reserve(self, event_type: str) -> None:
        event = parse(encode(sample_of(event_type)), received_at=NOW)

        assert event_type == event.type
        assert NOW == event.occurred_at
        assert event.atlas_event_id
        assert "order-1042" == event.external_id
        assert event.is_test is True
        assert not event.degraded

    @pytest.mark.parametrize("event_type", TYPES)
    def test_does_to_an_envelope_what_its_name_says(self, event_type: str) -> None:
        event = parse(encode(sample_of(event_type)), received_at=NOW)

        envelope, effect = project(BLANK, event, received_at=NOW)

        is_milestone = event_type in {"envelope.viewed", "contract.extracted"}
        assert (Effect.MILESTONE if is_milestone else Effect.APPLIED) == effect
        assert 2 == envelope.total
        if event_type == "envelope.signed":
            assert (2, None) == (envelope.signed_count, envelope.next_signer_email)

    def test_has_two_parties_in_order(self) -> None:
        parties = sample_of("envelope.sent")["parties"]

        assert [(1, "pending"), (2, "waiting")] == [(p["order"], p["status"]) for p in parties]
        assert all(p["email"].endswith("@example.com") for p in parties)

    @pytest.mark.parametrize("event_type", ["envelope.declined", "envelope.voided"])
    def test_of_a_refusal_gives_a_reason(self, event_type: str) -> None:
        assert sample_of(event_type)["reason"]

    def test_of_an_extraction_gives_the_extract(self) -> None:
        assert sample_of("contract.extracted")["extracted_data"]["term_months"] == 12

    def test_may_have_a_name_that_nobody_knows(self) -> None:
        sample = sample_of("envelope.reassigned")

        assert "envelope.reassigned" == sample["event"]
        assert "status" not in sample

    def test_has_ids_of_its_own_that_say_where_they_come_from(self) -> None:
        one, other = sample_of(), sample_of()

        for name in ("event_id", "envelope_id"):
            assert one[name] != other[name]
            UUID(one[name].removeprefix(PREFIX))
            assert one[name].startswith(PREFIX)

    def test_keeps_the_envelope_that_was_asked_for(self) -> None:
        assert "env_7" == sample_of(envelope_id="env_7")["envelope_id"]


class TestSet:
    def test_puts_a_text_into_a_nested_field(self) -> None:
        assert "crm-7" == changed("metadata.external_id=crm-7")["metadata"]["external_id"]

    @pytest.mark.parametrize(
        "text, value",
        [
            pytest.param("x=7", 7, id="number"),
            pytest.param("x=null", None, id="null"),
            pytest.param("x=false", False, id="false"),
            pytest.param('x={"a": [1]}', {"a": [1]}, id="object"),
            pytest.param('x="7"', "7", id="quoted"),
            pytest.param("x=a=b", "a=b", id="equals-sign"),
            pytest.param("x=", "", id="empty"),
            pytest.param("x=NaN", "NaN", id="no-json"),
            pytest.param("x=Wrong price", "Wrong price", id="sentence"),
            pytest.param(r'x="\ud800"', r'"\ud800"', id="what-no-body-can-hold"),
            pytest.param("x=" + "[" * 100_000, "[" * 100_000, id="bottomless"),
        ],
    )
    def test_reads_a_value_as_json_if_it_is_json(self, text: str, value: object) -> None:
        assert Assignment(("x",), value) == read_assignment(text)

    def test_reaches_into_a_list(self) -> None:
        assert (
            "zoe@example.com" == changed("parties.1.email=zoe@example.com")["parties"][1]["email"]
        )

    def test_appends_to_a_list(self) -> None:
        parties = changed("parties.2.email=zoe@example.com", "parties.2.order=3")["parties"]

        assert {"email": "zoe@example.com", "order": 3} == parties[2]

    def test_makes_the_objects_on_the_way(self) -> None:
        assert {"b": {"c": 1}} == changed("a.b.c=1")["a"]

    def test_replaces_a_whole_list(self) -> None:
        assert [] == changed("parties=[]")["parties"]

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("metadata", id="no-value"),
            pytest.param("=7", id="no-path"),
            pytest.param("metadata..x=7", id="gap"),
            pytest.param("parties.9.email=x", id="beyond-the-list"),
            pytest.param("parties.-1.email=x", id="negative"),
            pytest.param("parties.first.email=x", id="no-number"),
            pytest.param("parties.²=x", id="number-of-another-kind"),
            pytest.param("event.name=x", id="inside-a-text"),
            pytest.param("event.name.x=x", id="deep-inside-a-text"),
        ],
    )
    def test_says_what_is_wrong_with_a_path(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--set"):
            changed(text)

    @given(st.text())
    def test_reads_anything_or_says_what_is_wrong(self, text: str) -> None:
        with suppress(ConfigError):
            changed(text)

    @given(st.recursive(st.integers() | st.text(), st.lists))
    def test_gives_back_every_json_value(self, value: object) -> None:
        assert value == changed(f"x={json.dumps(value)}")["x"]
