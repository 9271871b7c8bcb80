"""Where `trigger` sends to, and with which key it signs."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import SplitResult, quote, urlsplit

from app.errors import ConfigError
from app.events.signature import Key
from app.settings import Settings, is_loopback
from app.wiring import verification_keys


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send to, and with which key."""

    url: str
    key: Key
    # Where the internal API answers, if it is on this machine.
    api: str | None

    @property
    def is_remote(self) -> bool:
        return self.api is None

    @property
    def origin(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"


def choose_target(
    settings: Settings, *, url: str, account: str | None, key_label: str | None
) -> Target:
    """Find the door and the key; raise `ConfigError` with what can be chosen instead."""
    parts = _split(url)
    key = _choose_key(verification_keys(settings), account=account, label=key_label)
    door = url.rstrip("/")
    if account is not None and not door.endswith(f"/{account}"):
        door = f"{door}/{quote(account, safe='')}"
    if not is_loopback(parts.hostname or ""):
        return Target(door, key, api=None)
    port = settings.api_port or parts.port
    host = "[::1]" if parts.hostname == "::1" else parts.hostname
    return Target(door, key, api=f"{parts.scheme}://{host}" + (f":{port}" if port else ""))


def _split(url: str) -> SplitResult:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
            return parts
    raise ConfigError(f"--url {url[:80]!r}: write http://host:port/webhooks/atlas")


def _choose_key(keys: Sequence[Key], *, account: str | None, label: str | None) -> Key:
    if not keys:
        raise ConfigError(
            "no key to sign with: set ATLAS_API_KEY as the service has it (`make run` makes one)"
        )
    fitting = [k for k in keys if account in {None, k.account} and label in {None, k.label}]
    now = datetime.now(UTC)
    # An expired key is still taken if nothing else fits: its refusal may be what is to be seen.
    fitting.sort(key=lambda k: k.not_after is not None and k.not_after < now)
    if not fitting:
        known = ", ".join(f"{k.label} (account {k.account})" for k in keys)
        raise ConfigError(f"no key fits --account and --key-label; there are: {known}")
    return fitting[0]
