"""What counts as proof that a body comes from Atlas."""

import hashlib
import hmac
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import SignatureRejected
from app.events.signature import (
    Key,
    KeyRing,
    default_label,
    fingerprint_of,
    read_signature,
    sign,
)

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
BODY = b'{"event":"envelope.signed","envelope_id":"env_1"}'
DIGEST = "ab" * 32


def make_key(
    secret: bytes = b"atlas_live_0123456789abcdef",
    *,
    account: str = "default",
    not_after: datetime | None = None,
) -> Key:
    return Key(account, secret, default_label(secret), fingerprint_of(secret), not_after)


def numbered_key(number: int, *, account: str = "default") -> Key:
    return make_key(f"atlas_live_{number:016}".encode(), account=account)


def signed_with(key: Key, body: bytes = BODY) -> bytes:
    return read_signature([sign(body, key.secret).encode()])


def refusal(values: list[bytes]) -> str:
    with pytest.raises(SignatureRejected) as caught:
        read_signature(values)
    return caught.value.reason


@pytest.fixture(name="spent")
def _spent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every constant-time comparison: whatever is compared otherwise leaks."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr("app.events.signature.hmac.compare_digest", counting)
    return compared


class TestTheHeader:
    def test_it_is_the_hex_digest_of_the_body_behind_a_prefix(self) -> None:
        header = sign(BODY, b"secret-of-sixteen")

        expected = hmac.new(b"secret-of-sixteen", BODY, hashlib.sha256)
        assert f"sha256={expected.hexdigest()}" == header
        assert expected.digest() == read_signature([header.encode()])

    @pytest.mark.parametrize("digits", [DIGEST, DIGEST.upper(), "aB" * 32])
    def test_hex_may_be_written_in_either_case(self, digits: str) -> None:
        assert bytes.fromhex(DIGEST) == read_signature([f"sha256={digits}".encode()])

    @pytest.mark.parametrize("padding", [b" ", b"\t", b" \t "])
    def test_blanks_around_it_do_not_matter(self, padding: bytes) -> None:
        """One HTTP parser strips them and another does not."""
        value = padding + b"sha256=" + DIGEST.encode() + padding

        assert bytes.fromhex(DIGEST) == read_signature([value])

    @pytest.mark.parametrize(
        "values",
        [
            pytest.param([], id="no-header"),
            pytest.param([b""], id="empty"),
            pytest.param([b" \t"], id="blank"),
        ],
    )
    def test_without_a_value_it_is_absent(self, values: list[bytes]) -> None:
        assert "absent" == refusal(values)

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param(b"sha256=", id="prefix-only"),
            pytest.param(b"sha256=" + b"a" * 63, id="63-digits"),
            pytest.param(b"sha256=" + b"a" * 65, id="65-digits"),
            pytest.param(b"sha256=" + b"a" * 32 + b" " + b"a" * 32, id="blank-inside"),
            pytest.param(b"sha256= " + b"a" * 64, id="blank-after-prefix"),
            pytest.param(b"sha256=0x" + b"a" * 62, id="0x"),
            pytest.param(("sha256=" + "\uff11" * 64).encode(), id="full-width-digits"),
            pytest.param(b"sha256=" + b"g" * 64, id="not-hex"),
            pytest.param(b"sha256=q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=", id="base64"),
            pytest.param(b"sha1=" + b"a" * 64, id="other-prefix"),
            pytest.param(b"SHA256=" + b"a" * 64, id="prefix-in-capitals"),
            pytest.param(b"a" * 64, id="no-prefix"),
            pytest.param(b"t=1,v1=" + b"a" * 64, id="another-vendors"),
            pytest.param(b"sha256=" + b"a" * 63 + b"\xff", id="not-ascii"),
            pytest.param(b"sha256=" + b"a" * 64 + b"\n", id="line-feed"),
            pytest.param(b"xsha256=" + b"a" * 64, id="letter-before"),
            pytest.param(b"sha256=" + b"a" * 64 + b"x", id="letter-behind"),
            pytest.param(b"sha256=" + b"a" * 64 + b",sha256=" + b"a" * 64, id="joined-by-comma"),
        ],
    )
    def test_anything_else_is_malformed(self, value: bytes) -> None:
        assert "malformed" == refusal([value])

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_second_one_is_refused_whichever_is_good(self, order: int) -> None:
        good, bad = b"sha256=" + DIGEST.encode(), b"sha256=" + b"0" * 64

        assert "repeated" == refusal([good, bad][::order])

    @given(st.lists(st.binary(max_size=80), max_size=2))
    @settings(deadline=None)
    def test_garbage_is_a_rejection_and_nothing_else(self, values: list[bytes]) -> None:
        with suppress(SignatureRejected):
            assert 32 == len(read_signature(values))


class TestAKey:
    def test_its_secret_is_not_shown(self) -> None:
        assert "atlas_live" not in repr(make_key())

    def test_its_fingerprint_is_short_and_is_no_plain_hash_of_the_secret(self) -> None:
        fingerprint = fingerprint_of(b"atlas_live_0123456789abcdef")

        assert 16 == len(fingerprint)
        assert fingerprint == fingerprint_of(b"atlas_live_0123456789abcdef")
        assert fingerprint != hashlib.sha256(b"atlas_live_0123456789abcdef").hexdigest()[:16]

    def test_its_fingerprint_is_the_same_in_every_release(self) -> None:
        """Databases remember it: another one would make every key an unknown one."""
        assert "fcd88822856d3b98" == fingerprint_of(b"atlas_live_0123456789abcdef")

    def test_its_label_is_derived_where_nobody_chose_one(self) -> None:
        secret = b"atlas_live_0123456789abcdef"

        assert f"key-{fingerprint_of(secret)[:8]}" == default_label(secret)

    @pytest.mark.parametrize(
        "secret",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b" " * 32, id="blank"),
            pytest.param(b"only-15-bytes-x", id="short"),
            pytest.param(b"atlas_live_0123456789\x00", id="trailing-nul"),
            pytest.param(b"atlas_live\x000123456789", id="nul-inside"),
        ],
    )
    def test_a_weak_one_is_refused_and_not_echoed(self, secret: bytes) -> None:
        with pytest.raises(ValueError, match=r"is shorter|NUL") as caught:
            KeyRing([make_key(), Key("default", secret, "weak", "0" * 16)])

        assert "weak" in str(caught.value)
        assert not secret.strip() or secret.decode() not in str(caught.value)

    def test_one_of_sixteen_bytes_is_long_enough(self) -> None:
        assert {"default"} == KeyRing([make_key(b"16-bytes-exactly")]).accounts

    def test_one_secret_cannot_belong_to_two_accounts(self) -> None:
        with pytest.raises(ValueError, match="more than one account"):
            KeyRing([make_key(account="ada"), make_key(account="bob")])


class TestAGenuineBody:
    @pytest.mark.parametrize("account", ["default", None])
    def test_it_is_known_by_the_key_that_signed_it(self, account: str | None) -> None:
        key = make_key()

        assert key is KeyRing([key]).verify(BODY, signed_with(key), account=account, now=NOW)

    @pytest.mark.parametrize(
        "body",
        [
            b'{ "event" :\t"envelope.signed" }\n',
            rb'{"url":"https:\/\/atlas"}',
            rb'{"line":"\u2028"}',
            b'{"b":1.0,"a":1}',
            b"not json at all \xff\x00",
            b"",
        ],
    )
    def test_its_bytes_are_taken_as_they_are(self, body: bytes) -> None:
        key = make_key()

        assert key is KeyRing([key]).verify(body, signed_with(key, body), account=None, now=NOW)

    def test_both_keys_count_while_one_replaces_the_other(self) -> None:
        old, new = make_key(b"old-secret-0123456789"), make_key(b"new-secret-0123456789")
        ring = KeyRing([new, old])

        for key in (old, new, old):
            assert key is ring.verify(BODY, signed_with(key), account="default", now=NOW)

    def test_an_old_key_counts_up_to_its_last_moment(self) -> None:
        key = make_key(not_after=NOW)
        ring = KeyRing([key])

        assert key is ring.verify(BODY, signed_with(key), account="default", now=NOW)
        with pytest.raises(SignatureRejected, match="mismatch"):
            ring.verify(
                BODY, signed_with(key), account="default", now=NOW + timedelta(microseconds=1)
            )


class TestAForgery:
    def test_one_flipped_bit_anywhere_is_noticed(self) -> None:
        key = make_key()
        ring = KeyRing([key])
        digest = signed_with(key)

        for position in range(len(BODY) * 8):
            flipped = bytearray(BODY)
            flipped[position // 8] ^= 1 << position % 8
            with pytest.raises(SignatureRejected, match="mismatch"):
                ring.verify(bytes(flipped), digest, account=None, now=NOW)

    @given(st.integers(0, 31), st.integers(0, 7))
    @settings(deadline=None)
    def test_one_flipped_bit_of_the_digest_is_noticed(self, byte: int, bit: int) -> None:
        key = make_key()
        digest = bytearray(signed_with(key))
        digest[byte] ^= 1 << bit

        with pytest.raises(SignatureRejected, match="mismatch"):
            KeyRing([key]).verify(BODY, bytes(digest), account=None, now=NOW)

    def test_it_is_refused_as_such(self) -> None:
        with pytest.raises(SignatureRejected) as caught:
            KeyRing([make_key()]).verify(BODY, b"\x00" * 32, account=None, now=NOW)

        assert "mismatch" == caught.value.reason

    @pytest.mark.parametrize("cut", [slice(0, 31), slice(0, 0), slice(1, 32)])
    def test_a_part_of_the_digest_proves_nothing(self, cut: slice) -> None:
        key = make_key()

        with pytest.raises(SignatureRejected, match="mismatch"):
            KeyRing([key]).verify(BODY, signed_with(key)[cut], account=None, now=NOW)

    def test_a_captured_request_does_not_open_another_account(self) -> None:
        ada, bob = numbered_key(1, account="ada"), numbered_key(2, account="bob")
        ring = KeyRing([ada, bob])

        assert {"ada", "bob"} == ring.accounts
        with pytest.raises(SignatureRejected, match="mismatch"):
            ring.verify(BODY, signed_with(ada), account="bob", now=NOW)

    @pytest.mark.parametrize(
        "keys",
        [
            pytest.param([], id="no-keys"),
            pytest.param([make_key()], id="another-account"),
            pytest.param([make_key(account="nobody", not_after=NOW - timedelta(1))], id="expired"),
        ],
    )
    def test_an_unknown_account_costs_what_a_wrong_signature_costs(
        self, keys: list[Key], spent: list[bytes]
    ) -> None:
        with pytest.raises(SignatureRejected, match="mismatch"):
            KeyRing(keys).verify(BODY, b"\x00" * 32, account="nobody", now=NOW)

        assert 1 == len(spent)


class TestTheOrderOfTrying:
    def test_a_failure_costs_every_candidate(self, spent: list[bytes]) -> None:
        ring = KeyRing([numbered_key(number) for number in range(5)])

        for wrong in (b"\x00" * 32, b"\xff" * 32):
            with pytest.raises(SignatureRejected):
                ring.verify(BODY, wrong, account="default", now=NOW)

        assert 10 == len(spent)

    @pytest.mark.parametrize("account", ["default", None])
    def test_the_last_match_is_tried_first(self, account: str | None, spent: list[bytes]) -> None:
        keys = [numbered_key(number) for number in range(5)]
        ring = KeyRing(keys)
        digest = signed_with(keys[3])

        costs = []
        for _ in range(2):
            spent.clear()
            ring.verify(BODY, digest, account=account, now=NOW)
            costs.append(len(spent))

        assert [4, 1] == costs

    def test_matches_do_not_make_a_failure_dearer(self, spent: list[bytes]) -> None:
        keys = [numbered_key(number) for number in range(2)]
        ring = KeyRing(keys)
        for number in range(6):
            ring.verify(BODY, signed_with(keys[number % 2]), account="default", now=NOW)
        spent.clear()

        with pytest.raises(SignatureRejected):
            ring.verify(BODY, b"\x00" * 32, account="default", now=NOW)

        assert 2 == len(spent)

    def test_every_account_has_a_memory_of_its_own(self, spent: list[bytes]) -> None:
        keys = [numbered_key(number) for number in range(3)]
        ring = KeyRing(keys)
        ring.verify(BODY, signed_with(keys[2]), account=None, now=NOW)

        spent.clear()
        ring.verify(BODY, signed_with(keys[0]), account="default", now=NOW)

        assert 1 == len(spent)

    def test_without_an_account_no_more_than_32_keys_are_tried(self, spent: list[bytes]) -> None:
        keys = [numbered_key(number, account=f"account-{number}") for number in range(40)]
        ring = KeyRing(keys)

        with pytest.raises(SignatureRejected):
            ring.verify(BODY, signed_with(keys[35]), account=None, now=NOW)

        assert 32 == len(spent)
        assert keys[35] is ring.verify(BODY, signed_with(keys[35]), account="account-35", now=NOW)
