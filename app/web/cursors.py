"""Where a list goes on: opaque to callers, and refused unless this service has made it.

A cursor names the list that it belongs to and the keys of the last row that was given; it
holds nothing that its reader has not seen.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from app.errors import InvalidCursor

# Raised when what stands in a cursor changes: an old one is then refused, not misread.
_VERSION = 1


def write(name: str, keys: Sequence[str | int]) -> str:
    """Write the cursor behind the row with these keys, in the list called `name`."""
    text = json.dumps([_VERSION, name, *keys], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def read(name: str, cursor: str, kinds: Sequence[type]) -> list[Any]:
    """Give the keys that `write` was given, of these kinds. Raises `InvalidCursor`."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        version, of, *keys = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise InvalidCursor("a cursor is what an earlier answer gave; this is none") from None
    if version != _VERSION or of != name:
        raise InvalidCursor("this cursor belongs to another list or release: begin anew")
    if [type(key) for key in keys] != list(kinds):
        raise InvalidCursor("a cursor is what an earlier answer gave; this one was changed")
    return list(keys)
