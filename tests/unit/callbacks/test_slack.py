"""What `slack` says, what it leaves out, and what it refuses to start with."""

from dataclasses import replace
from typing import Any

import pytest

from app.callbacks import Event
from app.callbacks.loader import load
from app.callbacks.slack import callbacks, is_worth_telling, message
from app.callbacks.testing import change_event, make_event
from app.errors import ConfigError
from app.settings import read_settings

URL = "https://hooks.slack.example/services/T000/B000/hidden"


def own(kind: str, **data: Any) -> Event:
    event = make_event("envelope.signed", envelope_id="env_1")
    return change_event(event, type=f"receiver.{kind}", data={"event": f"receiver.{kind}", **data})


class TestMessage:
    def test_it_names_document_envelope_and_external_id(self) -> None:
        data = {"originalFilename": "Lease.pdf", "metadata": {"external_id": "crm-7"}}

        text = message(make_event("envelope.signed", data=data))

        assert "*Signed*: Lease.pdf, envelope `env_1`, external id `crm-7`" == text

    def test_it_never_names_a_signer(self) -> None:
        parties = [{"email": "ada@example.com", "name": "Ada Lovelace"}]
        data = {"parties": parties, "decline_reason": "ask bob@example.com first"}

        text = message(make_event("envelope.declined", data=data))

        assert "ada" not in text.lower()
        assert "Reason: ask [address] first" in text

    def test_another_account_is_named(self) -> None:
        assert "account `acme`" in message(make_event(account="acme"))

    @pytest.mark.parametrize("event_type", ["envelope.declined", "envelope.voided"])
    def test_reasons_are_cut(self, event_type: str) -> None:
        event = make_event(event_type)
        assert event.envelope is not None
        envelope = replace(event.envelope, decline_reason="so " * 500, void_reason="so " * 500)

        text = message(change_event(event, envelope=envelope))

        assert "Reason: so so" in text
        assert text.endswith("…")
        assert len(text) < 400

    def test_nobody_writes_markup_or_calls_the_channel(self) -> None:
        name = "<!channel> & <@U1>`*\u202egnp\r\n\x00.pdf"

        text = message(make_event(data={"originalFilename": name}))

        assert "&lt;!channel&gt; &amp; &lt;@U1&gt;'*gnp" in text
        assert not set("<\u202e\n\r\x00") & set(text)

    def test_an_event_that_is_new_to_it_is_named(self) -> None:
        event = change_event(make_event(), type="envelope.<new>", envelope=None, envelope_id=None)

        assert "*envelope.&lt;new&gt;*: envelope `unknown`" == message(event)

    def test_a_dead_letter_says_what_and_why_and_where_to_look(self) -> None:
        error = "KeyError: 'secret=hunter2hunter2' <https://x.example/?token=abc>"
        event = own(
            "dead", callback="crm", type="envelope.signed", envelope_id="env_9", attempts=12,
            error=error + "x" * 5000, fingerprint="abc123", is_first=True,
        )  # fmt: skip

        text = message(event)

        for part in ("`crm`", "`envelope.signed`", "`env_9`", "12 attempts", "KeyError", "abc123"):
            assert part in text
        assert "python -m app deliveries failures" in text
        assert "hunter2" not in text
        assert "abc&gt;" not in text
        assert len(text) < 900

    @pytest.mark.parametrize(
        "kind,word",
        [("conflict", "Conflict"), ("disputed", "Disputed"), ("quarantined", "Quarantined")],
    )
    def test_other_own_events_say_where_to_look(self, kind: str, word: str) -> None:
        event = own(kind, about="evt_5", reason="not-json")

        text = message(event)

        assert f"*{word}*" in text
        assert ("(`not-json`)" in text) == (kind == "quarantined")
        assert "python -m app events show evt_5" in text

    @pytest.mark.parametrize("data", [None, [], "text", 7, {"metadata": []}])
    @pytest.mark.parametrize(
        "event_type", ["envelope.signed", "receiver.dead", "receiver.disputed"]
    )
    def test_any_data_gives_a_message(self, event_type: str, data: Any) -> None:
        event = change_event(make_event(), type=event_type, data=data, envelope=None)

        assert message(event)
        assert is_worth_telling(event) == (event_type != "receiver.dead")


class TestWhere:
    @pytest.mark.parametrize(
        "data",
        [
            {"is_test": True},
            {"is_test": "true"},
            {"metadata": {"is_test": True}},
            {"metadata": {"is_test": "TRUE"}},
        ],
    )
    def test_test_envelopes_are_left_out(self, data: dict[str, Any]) -> None:
        assert not is_worth_telling(make_event(data=data))
        assert not is_worth_telling(make_event(data=data, envelope=None))

    def test_what_is_known_of_the_envelope_counts_when_the_event_says_nothing(self) -> None:
        event = make_event()
        assert event.envelope is not None

        test = change_event(event, envelope=replace(event.envelope, is_test=True))

        assert (True, False) == (is_worth_telling(event), is_worth_telling(test))

    @pytest.mark.parametrize("data", [{}, {"is_test": False}, {"metadata": {"is_test": "false"}}])
    def test_others_are_told(self, data: dict[str, Any]) -> None:
        assert is_worth_telling(make_event(data=data))

    @pytest.mark.parametrize("is_first,expected", [(True, True), (False, False), (None, False)])
    def test_of_dead_letters_the_first_of_a_kind(
        self, *, is_first: bool | None, expected: bool
    ) -> None:
        assert expected == is_worth_telling(own("dead", is_first=is_first))

    @pytest.mark.parametrize("kind", ["conflict", "disputed", "quarantined"])
    def test_own_events_are_told_of_test_envelopes_too(self, kind: str) -> None:
        assert is_worth_telling(own(kind, is_test=True))


class TestSettings:
    def test_they_are_enough_to_load_it(self) -> None:
        (callback,) = load("app.callbacks.slack:callbacks", read_settings(slack_url=URL))

        assert "slack" == callback.name
        assert ("envelope.signed", "envelope.declined", "envelope.voided") == callback.patterns
        assert is_worth_telling is callback.where

    def test_without_a_url_there_is_nothing_to_call(self) -> None:
        with pytest.raises(ConfigError, match="SLACK_URL is not set"):
            callbacks(read_settings())

    @pytest.mark.parametrize("url", ["hooks.slack.example/hidden/x", "https://:99999/hidden"])
    def test_a_url_that_cannot_be_called_is_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(ConfigError, match="SLACK_URL: the URL ") as raised:
            callbacks(read_settings(slack_url=url))

        assert "hidden" not in str(raised.value)
