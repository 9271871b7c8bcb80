"""Makes what tests send: valid unless one argument breaks it."""

import hashlib
import hmac
import itertools
import json
import uuid
from typing import Any

# These two stand in every body, and must never stand in a log.
SIGNER = "ada.canary@example.com"
SIGN_TOKEN = "sign-url-canary-0123456789"

_numbers = itertools.count(1)
_RUN = uuid.uuid4().hex[:8]


def new_envelope_id() -> str:
    """An envelope that no other test has heard of."""
    return f"env_{_RUN}_{next(_numbers)}"


def make_body(**fields: Any) -> bytes:
    """One event as Atlas writes it; None leaves a field out."""
    event = {
        "event": "envelope.signed",
        "envelope_id": new_envelope_id(),
        "parties": [
            {
                "email": SIGNER,
                "status": "signed",
                "sign_url": f"https://atlaswork.ai/sign/env?token={SIGN_TOKEN}",
            }
        ],
        "metadata": {"customer": "c-1"},
        **fields,
    }
    return json.dumps({k: v for k, v in event.items() if v is not None}).encode()


def signature(body: bytes, key: str | bytes) -> bytes:
    """The value of the header that Atlas sends with `body`."""
    secret = key.encode() if isinstance(key, str) else key
    # Written out anew: a test that asked the service's own code would believe whatever it does.
    return b"sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest().encode()


def signed(body: bytes, key: str | bytes) -> tuple[bytes, bytes]:
    """The signature header that Atlas sends with `body`."""
    return b"X-Atlas-Signature", signature(body, key)
