"""Who is asking, told by a bearer token."""

import hmac

import pytest

from app.web.deps import Consumer, Tokens

OFFICE = Consumer("office", frozenset({"read"}), None)
AUDIT = Consumer("audit", frozenset({"read", "raw"}), frozenset({"acme"}))


@pytest.fixture(name="tokens")
def _tokens() -> Tokens:
    return Tokens(
        [
            ("token-of-the-office", OFFICE),
            ("old-token-of-audit", AUDIT),
            ("new-token-of-audit", AUDIT),
            ("tökén-of-the-office", OFFICE),
        ]
    )


class TestTokens:
    @pytest.mark.parametrize(
        "token, consumer",
        [
            ("token-of-the-office", OFFICE),
            ("old-token-of-audit", AUDIT),
            ("new-token-of-audit", AUDIT),
            ("tökén-of-the-office", OFFICE),
        ],
    )
    def test_each_name_one_consumer(self, tokens: Tokens, token: str, consumer: Consumer) -> None:
        assert consumer is tokens.recognise(token.encode())

    @pytest.mark.parametrize(
        "token",
        [b"", b"token-of-the-offic", b"token-of-the-office ", b"TOKEN-OF-THE-OFFICE", b"\xff\xfe"],
    )
    def test_of_nobody_name_nobody(self, tokens: Tokens, token: bytes) -> None:
        assert tokens.recognise(token) is None

    def test_are_all_compared_whichever_matches(
        self, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """How long an answer takes must not tell how near a guess is."""
        compared: list[int] = []
        compare = hmac.compare_digest

        def counting(one: bytes, other: bytes) -> bool:
            compared.append(len(one))
            return compare(one, other)

        monkeypatch.setattr("app.web.deps.hmac.compare_digest", counting)

        tokens.recognise(b"token-of-the-office")
        tokens.recognise(b"x")

        assert [32] * 8 == compared
