"""Prove that a body comes from Atlas: an HMAC-SHA256 under one of the account's keys.

Only the body is signed, neither path nor time, so a captured request stays valid
for ever: what stops a replay is `app.events.identity`, not this module.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from app.errors import SignatureRejected

MIN_SECRET_BYTES = 16
MAX_UNDIRECTED_KEYS = 32

_HEADER = re.compile(rb"sha256=([0-9a-fA-F]{64})")
_FINGERPRINT_DOMAIN = b"atlas-receiver key fingerprint 1\x00"


@dataclass(frozen=True, slots=True)
class Key:
    """One secret that Atlas may sign with, and whose it is."""

    account: str
    secret: bytes = field(repr=False)
    label: str
    fingerprint: str
    not_after: datetime | None = None


# An unknown account has to cost what a wrong signature costs. The secret is random, so that
# nobody can sign with it.
_NOBODY = (Key("", secrets.token_bytes(32), "", ""),)


def fingerprint_of(secret: bytes) -> str:
    """Return a name for `secret` that may be stored and shown."""
    return hashlib.sha256(_FINGERPRINT_DOMAIN + secret).hexdigest()[:16]


def default_label(secret: bytes) -> str:
    """Return the label of a key that was given none."""
    return f"key-{fingerprint_of(secret)[:8]}"


def sign(body: bytes, secret: bytes) -> str:
    """Return the header value that Atlas would send with `body`."""
    return f"sha256={hmac.digest(secret, body, 'sha256').hex()}"


def read_signature(values: Sequence[bytes]) -> bytes:
    """Return the digest that the signature header claims; `values` is every copy of it."""
    if len(values) > 1:
        raise SignatureRejected("repeated")
    # The installed HTTP parser decides whether blanks arrive here; it must not decide the verdict.
    value = values[0].strip(b" \t") if values else b""
    if not value:
        raise SignatureRejected("absent")
    match = _HEADER.fullmatch(value)
    if match is None:
        raise SignatureRejected("malformed")
    return bytes.fromhex(match[1].decode("ascii"))


class KeyRing:
    """Every key that may sign, arranged so that the likeliest is tried first."""

    def __init__(self, keys: Sequence[Key]) -> None:
        _refuse_weak(keys)
        _refuse_shared(keys)
        self.accounts = frozenset(key.account for key in keys)
        self._tried: dict[str | None, tuple[Key, ...]] = {
            account: tuple(key for key in keys if key.account == account)
            for account in self.accounts
        }
        self._tried[None] = tuple(keys)

    def verify(self, body: bytes, digest: bytes, *, account: str | None, now: datetime) -> Key:
        """Return the key that made `digest`; without an account any key may have.

        A key that matched is tried first the next time.
        """
        # Stopping at the first match tells how far down the list a key stands, but only to
        # someone who holds a valid key. A forger pays for every candidate, every time.
        for key in self._candidates(account, now):
            if _is_signed(body, digest, key.secret):
                self._remember(key, account)
                return key
        raise SignatureRejected("mismatch")

    def _candidates(self, account: str | None, now: datetime) -> Sequence[Key]:
        tried = self._tried.get(account, ())
        valid = [key for key in tried if key.not_after is None or now <= key.not_after]
        if not valid:
            return _NOBODY
        return valid if account is not None else valid[:MAX_UNDIRECTED_KEYS]

    def _remember(self, key: Key, account: str | None) -> None:
        tried = self._tried[account]
        if tried[0] is not key:
            # Replaced as a whole: large bodies are verified in threads, at the same time.
            self._tried[account] = (key, *(other for other in tried if other is not key))


def _is_signed(body: bytes, digest: bytes, secret: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(secret, body, "sha256"), digest)


def _refuse_weak(keys: Sequence[Key]) -> None:
    for key in keys:
        if len(key.secret.strip()) < MIN_SECRET_BYTES:
            raise ValueError(f"key {key.label!r} is shorter than {MIN_SECRET_BYTES} bytes")
        if b"\x00" in key.secret:
            # HMAC pads with NULs, so this key would verify under other spellings of itself.
            raise ValueError(f"key {key.label!r} holds a NUL byte")


def _refuse_shared(keys: Sequence[Key]) -> None:
    owners: dict[bytes, str] = {}
    for key in keys:
        if owners.setdefault(key.secret, key.account) != key.account:
            raise ValueError(f"key {key.label!r} belongs to more than one account")
