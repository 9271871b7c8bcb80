"""Which secrets are taken out of what Atlas sends."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.events.redaction import (
    MAX_DEPTH,
    REDACTED,
    may_hold_secrets,
    redact,
    redact_text,
)


class TestASecretName:
    @pytest.mark.parametrize(
        "name",
        [
            "sign_url",
            "signUrl",
            "SIGN-URL",
            "sign url",
            "signing_link",
            "signedPdfUrl",
            "review_url",
            "reviewUrl",
            "download_url",
            "downloadUrls",
            "pdf_url",
            "document_url",
            "upload_uri",
            "token",
            "accessToken",
            "client_secret",
            "api_key",
            "signature",
        ],
    )
    @pytest.mark.parametrize("value", ["canary", {"pdf": "canary"}, ["canary"], 7])
    def test_hides_whatever_stands_under_it(self, name: str, value: Any) -> None:
        assert {"a": [{name: REDACTED}]} == redact({"a": [{name: value}]})

    @pytest.mark.parametrize("value", [None, "", [], False])
    def test_has_nothing_to_hide_where_nothing_stands(self, value: Any) -> None:
        assert {"sign_url": value} == redact({"sign_url": value})

    @pytest.mark.parametrize(
        "name", ["url", "callback_url", "webhook_url", "signed_at", "linkedin", "token_count"]
    )
    def test_is_not_any_name_that_resembles_one(self, name: str) -> None:
        assert {name: "https://a.example/b"} == redact({name: "https://a.example/b"})


class TestALink:
    @pytest.mark.parametrize(
        "query",
        [
            "t=canary",
            "rt=canary",
            "a=1&token=canary",
            "access_token=canary",
            "sig=canary",
            "X-Amz-Credential=canary&X-Amz-Signature=canary",
            "x-goog-signature=canary",
            "se=2026&sp=r&sig=canary",
            "a=1;t=canary",
        ],
    )
    @pytest.mark.parametrize("mark", ["?", "#", "?a#"])
    def test_loses_a_query_that_carries_a_token(self, query: str, mark: str) -> None:
        text = f"before <https://atlaswork.ai/sign/1{mark}{query}> after"

        assert f"before <https://atlaswork.ai/sign/1{mark[:1]}[redacted]> after" == redact_text(
            text
        )

    def test_loses_its_password(self) -> None:
        assert "ftp://[redacted]@host/a" == redact_text("ftp://ada:canary@host/a")

    def test_is_found_in_json_that_is_text(self) -> None:
        text = r'{"url":"https:\/\/atlas\/sign?t=canary","b":1}'

        assert r'{"url":"https:\/\/atlas\/sign?[redacted]","b":1}' == redact_text(text)

    @pytest.mark.parametrize(
        "text",
        [
            "https://example.com/a?page=2#top",
            "https://example.com/a",
            "no link, t=1?t=2",
            "is it https://example.com ? t=1",
        ],
    )
    def test_keeps_everything_else(self, text: str) -> None:
        assert text == redact_text(text)

    @pytest.mark.parametrize("unit", ["://", "://@", "?t", "a://b?", "https:// ", "&t=", "a"])
    def test_may_be_of_any_length(self, unit: str) -> None:
        """Work that grew with the square of the length would not end within the test's time."""
        text = "x://" + unit * (500_000 // len(unit))

        assert redact_text(text).startswith("x://")


class TestAValue:
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
        )
    )
    @settings(deadline=None)
    def test_without_secrets_comes_back_equal(self, value: Any) -> None:
        assert value == redact(value)

    def test_stays_as_it_was(self) -> None:
        value = {"sign_url": "canary", "a": [{"t": "https://a?t=b"}]}
        before = copy.deepcopy(value)

        redact(value)

        assert before == value

    def test_is_hidden_below_the_deepest_level_that_is_read(self) -> None:
        deep: Any = "canary"
        for _ in range(MAX_DEPTH + 1):
            deep = [deep]

        assert "canary" not in str(redact(deep))
        assert REDACTED in str(redact(deep))


class TestABody:
    @pytest.mark.parametrize(
        "body",
        [
            b'{"a":"https://b"}',
            rb'{"a":"https:\/\/b"}',
            b'{"sign_url":"b"}',
            b'{"signUrl":"b"}',
            b'{"accessToken":"b"}',
            b'{"SIGN_URL": 1}',
            b'{"api_key": "x"}',
            b'{"pass_word": "x"}',
            rb'{"\u0073ecret": 1}',
            '{"\N{LATIN SMALL LETTER LONG S}ecret": 1}'.encode(),
        ],
    )
    def test_is_marked_when_it_may_hold_a_secret(self, body: bytes) -> None:
        assert may_hold_secrets(body)

    def test_is_not_marked_otherwise(self) -> None:
        assert not may_hold_secrets(b'{"event":"envelope.signed","envelope_id":"env_1"}')
        assert not may_hold_secrets(b'{"event": "envelope.signed", "parties": [{"name": "Ada"}]}')
