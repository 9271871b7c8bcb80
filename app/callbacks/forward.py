"""Built in: POST every event to a service of yours, signed by the Standard Webhooks scheme.

Usage::

    CALLBACKS=app.callbacks.forward:callbacks
    FORWARD_URL=https://crm.example.com/hooks/atlas
    FORWARD_SECRETS=whsec_…             # several, while one takes over from the other

The body is the JSON of `document`. The headers are `webhook-id`, the idempotency key, which
is the same in every attempt; `webhook-timestamp`; and `webhook-signature`, with a signature
for each secret. Any answer of 2xx is the end of it; 410 makes a dead letter at once; another
one, a redirect too, leads to another try, with 429, 502, 503 and 504 after their `Retry-After`.
"""

import base64
import binascii
import hmac
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, Protocol

from pydantic import SecretStr

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.errors import AppError, ConfigError
from app.outbound import Answer, Outbound, RequestRefused, read_url

# For what lies around the call itself: making the body, naming the failure.
MARGIN = timedelta(seconds=5)
# Enough of an answer to quote from.
MAX_ANSWER_BYTES = 16 * 1024
SECRET_PREFIX = "whsec_"  # noqa: S105  # what every one of them begins with
SECRET_BYTES = range(24, 65)

_GONE = 410
# With these an answer may say when to come back.
_BUSY = frozenset({429, 502, 503, 504})
_MAKE_ONE = (
    "python3 -c \"import base64, secrets; print('whsec_' + "
    'base64.b64encode(secrets.token_bytes(32)).decode())"'
)


class ForwardSettings(Protocol):
    """What `forward` reads of the settings."""

    @property
    def forward_url(self) -> str | None: ...
    @property
    def forward_secrets(self) -> Sequence[SecretStr]: ...
    @property
    def forward_events(self) -> Sequence[str]: ...
    @property
    def forward_timeout(self) -> timedelta: ...
    @property
    def forward_allow(self) -> Sequence[str]: ...


class NotAccepted(AppError):
    """The other side answered, but not with a 2xx."""


def callbacks(settings: ForwardSettings) -> Callbacks:
    """Make the callback `forward` of the settings; raises `ConfigError` if they cannot work."""
    if settings.forward_url is None:
        raise ConfigError("FORWARD_URL is not set: name the URL that events are to be sent to")
    forward = Forward(
        url=settings.forward_url,
        secrets=[secret.get_secret_value() for secret in settings.forward_secrets],
        timeout=settings.forward_timeout,
        allow=settings.forward_allow,
    )
    found = Callbacks()
    timeout = settings.forward_timeout + MARGIN
    found.on(*settings.forward_events, name="forward", timeout=timeout)(forward)
    return found


class Forward:
    """A callback that sends events to one URL; `secrets` sign, the newest first.

    `allow` are networks that may be called although they are not public.
    """

    def __init__(
        self,
        *,
        url: str,
        secrets: Sequence[str],
        timeout: timedelta = timedelta(seconds=15),
        allow: Sequence[str] = (),
    ) -> None:
        self._url = url
        self._host = _checked_host(url)
        self._keys = tuple(map(_key, secrets))
        if not self._keys:
            raise ConfigError(
                "FORWARD_SECRETS is not set, so the other side could not tell our events from "
                f"anybody's: make a secret and give it to both sides: {_MAKE_ONE}"
            )
        self._outbound = Outbound(allow=allow, timeout=timeout, max_bytes=MAX_ANSWER_BYTES)

    async def __call__(self, event: Event) -> None:
        """Send one event; return if it was accepted."""
        body = encode(document(event))
        headers = {
            "Content-Type": "application/json",
            **sign(body, event.delivery_id, self._keys, at=int(time.time())),
        }
        answer = await self._outbound.request("POST", self._url, headers=headers, content=body)
        if not answer.is_success:
            self._fail(answer)

    def _fail(self, answer: Answer) -> NoReturn:
        quote = answer.excerpt()
        text = f"{self._host} answered {answer.status}" + (f": {quote}" if quote else "")
        if answer.status == _GONE:
            raise GiveUp(f"{text} (410 means Gone: it wants no events any more)")
        # No wait at all would use up every attempt at once.
        after = answer.retry_after() if answer.status in _BUSY else None
        if after:
            raise RetryLater(text, after=after)
        if 300 <= answer.status < 400:  # noqa: PLR2004  # that is what HTTP calls a redirect
            text += " (redirects are not followed: FORWARD_URL must be where it leads in the end)"
        raise NotAccepted(text)


def document(event: Event) -> dict[str, Any]:
    """Describe an event as it is sent: `type`, `timestamp`, and `data`.

    It is the same in every attempt, except for what has changed meanwhile: the state of the
    envelope, and whether the event is late.
    """
    occurred_at = event.occurred_at or event.received_at
    return {
        "type": event.type,
        "timestamp": occurred_at,
        "data": {
            "id": event.id,
            "atlas_event_id": event.atlas_event_id,
            "delivery_id": event.delivery_id,
            "account": event.account,
            "tenant": event.tenant,
            "envelope_id": event.envelope_id,
            "received_at": event.received_at,
            "status": event.status,
            "version": event.version,
            "sequence": event.sequence,
            "effect": event.effect,
            "is_late": event.is_late,
            "is_replay": event.is_replay,
            "envelope": event.envelope,
            "event": event.data,
        },
    }


def encode(value: Any) -> bytes:
    """Write a document as JSON, in ASCII, so that no text in it can fail to be encoded."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":")).encode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, float) and not math.isfinite(value):
        # 1e999 is JSON, but what Python reads it as is none.
        return None
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def sign(body: bytes, message_id: str, keys: Sequence[bytes], *, at: int) -> dict[str, str]:
    """Give the three headers that prove who sent `body`, and when; `at` is in Unix seconds."""
    signed = f"{message_id}.{at}.".encode() + body
    digests = (base64.b64encode(hmac.digest(key, signed, "sha256")).decode() for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(f"v1,{digest}" for digest in digests),
    }


def _key(secret: str) -> bytes:
    problem = f"must begin with {SECRET_PREFIX}"
    if secret.startswith(SECRET_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            problem = f"is not base64 behind {SECRET_PREFIX}"
        else:
            if len(key) in SECRET_BYTES:
                return key
            problem = f"holds {len(key)} bytes, and must hold 24 to 64"
    raise ConfigError(f"FORWARD_SECRETS: a secret {problem}; make one with: {_MAKE_ONE}")


def _checked_host(url: str) -> str:
    try:
        return read_url(url).host
    except RequestRefused as error:
        raise ConfigError(f"FORWARD_URL: {error}") from None
