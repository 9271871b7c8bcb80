"""What `forward` sends, and what it refuses to start with."""

import base64
import json
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.callbacks import Envelope
from app.callbacks.forward import MARGIN, callbacks, document, encode, sign
from app.callbacks.loader import load
from app.callbacks.testing import make_event
from app.errors import ConfigError
from app.settings import read_settings

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdefghijklmn").decode()
URL = "https://crm.example.com/hook"


def refusal(**settings: Any) -> str:
    given = {"forward_url": URL, "forward_secrets": SECRET, **settings}
    with pytest.raises(ConfigError) as raised:
        callbacks(read_settings(**given))
    return str(raised.value)


class TestDocument:
    def test_it_says_what_the_scheme_wants_and_all_that_we_know(self) -> None:
        at = datetime(2026, 11, 22, 12, tzinfo=UTC)
        event = replace(make_event(data={"x": 1}), occurred_at=at, received_at=at)

        sent = json.loads(encode(document(event)))

        assert {"type", "timestamp", "data"} == set(sent)
        assert ("envelope.signed", "2026-11-22T12:00:00Z") == (sent["type"], sent["timestamp"])
        assert {"event": "envelope.signed", "envelope_id": "env_1", "x": 1} == sent["data"]["event"]
        assert {each.name for each in fields(Envelope)} == set(sent["data"]["envelope"])
        assert (1, False, False) == tuple(
            sent["data"][name] for name in ("sequence", "is_late", "is_replay")
        )

    def test_attempts_do_not_change_it(self) -> None:
        event = make_event(attempt=1)
        later = replace(event, attempt=7, deadline=event.deadline + timedelta(hours=3))

        assert encode(document(event)) == encode(document(later))

    def test_without_a_time_of_its_own_it_is_that_of_arrival(self) -> None:
        event = make_event(occurred_at=None)

        assert event.received_at == document(event)["timestamp"]

    @pytest.mark.parametrize(
        "value,expected",
        [
            ("\ud800 é 😀", rb'"\ud800 \u00e9 \ud83d\ude00"'),
            (float("inf"), b"null"),
            ([float("nan"), 1.5, None, True], b"[null,1.5,null,true]"),
            ({"parties": ({"a": 1},)}, b'{"parties":[{"a":1}]}'),
            (10**4000, b"1" + b"0" * 4000),
        ],
        ids=["text", "infinite", "list", "tuple", "large"],
    )
    def test_whatever_was_stored_can_be_written(self, value: Any, expected: bytes) -> None:
        assert expected == encode(value)


class TestSign:
    def test_each_key_gives_a_signature(self) -> None:
        headers = sign(b"{}", "msg_1", (b"a" * 24, b"b" * 24), at=1_700_000_000)

        assert ("msg_1", "1700000000") == (headers["webhook-id"], headers["webhook-timestamp"])
        first, second = headers["webhook-signature"].split(" ")
        assert first != second
        assert first.startswith("v1,")
        assert 32 == len(base64.b64decode(second.removeprefix("v1,")))


class TestSettings:
    def test_they_are_enough_to_load_it(self) -> None:
        settings = read_settings(
            forward_url=URL, forward_secrets=f"{SECRET},{SECRET}", forward_events="envelope.*"
        )

        (callback,) = load("app.callbacks.forward:callbacks", settings)

        assert ("forward", ("envelope.*",)) == (callback.name, callback.patterns)
        assert settings.forward_timeout + MARGIN == callback.timeout
        assert callback.is_async

    def test_without_a_url_there_is_nothing_to_call(self) -> None:
        assert "FORWARD_URL is not set" in refusal(forward_url=None)

    def test_without_a_secret_it_shows_how_to_make_one(self) -> None:
        text = refusal(forward_secrets="")

        assert "FORWARD_SECRETS is not set" in text
        assert "secrets.token_bytes(32)" in text

    @pytest.mark.parametrize(
        "secret,problem",
        [
            ("just-a-long-password", "must begin with whsec_"),
            ("WHSEC_" + SECRET[6:], "must begin with whsec_"),
            ("whsec_not*base64*at*all*here", "is not base64"),
            ("whsec_MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1", "is not base64"),
            ("whsec_" + base64.b64encode(bytes(range(23))).decode(), "holds 23 bytes"),
            ("whsec_" + base64.b64encode(bytes(range(65))).decode(), "holds 65 bytes"),
            ("whsec_äöüßäöüßäöüß", "is not base64"),
        ],
    )
    def test_a_secret_of_another_shape_is_refused_and_not_shown(
        self, secret: str, problem: str
    ) -> None:
        text = refusal(forward_secrets=f"{SECRET},{secret}")

        assert problem in text
        assert "FORWARD_SECRETS" in text
        assert secret.removeprefix("whsec_") not in text

    @pytest.mark.parametrize(
        "url",
        [
            "crm.example.com",
            "ftp://crm.example.com",
            "https://",
            "https://crm.example.com:x/",
            "https://a..b:70000/",
            "https://me:hidden@crm.example.com/",
            "https://\u2488.example/",
        ],
    )
    def test_a_url_that_cannot_be_called_is_refused(self, url: str) -> None:
        text = refusal(forward_url=url)

        assert text.startswith("FORWARD_URL: the URL ")
        assert "hidden" not in text
