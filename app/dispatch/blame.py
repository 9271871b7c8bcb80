"""What went wrong, in words that may be stored, shown and logged; and in a short key.

The text of an error is written by strangers: it may hold anything, and it may raise when
it is asked for.
"""

import re
from collections.abc import Callable
from hashlib import sha256
from types import TracebackType
from typing import Any

from app.events.redaction import redact_text

LONGEST = 2000
# Read no more of a text than could be shown: the patterns below walk over all of it.
_READ = 4 * LONGEST

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_ADDRESS = re.compile(r"[^\s@<>\"'/:\[\]]{1,64}@[\w.-]{1,255}")
_CREDENTIAL = re.compile(
    r"(?i)((?:token|secret|password|api[_-]?key|authorization)[\"']?\s*[:=]\s*[\"']?"
    r"(?:bearer |basic )?|bearer |basic |sha256=)[^\s\"',;&]+"
)


def describe(error: BaseException) -> str:
    """Name an error: its type and its text, without secrets, at most 2,000 characters."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as fault:  # noqa: BLE001  # a stranger's __str__ may raise anything
        text = f"(its text cannot be read: {type(fault).__name__})"
    return clean(f"{name}: {text}" if text else name)


def summarise(error: BaseException) -> str:
    """Name an error of our own in one line; a database's would quote the statement."""
    return describe(getattr(error, "orig", None) or error).partition("\n")[0][:300]


def clean(text: str) -> str:
    """Take out of a text what a column cannot hold and what nobody should read."""
    text = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text[:_READ])
    text = _CREDENTIAL.sub(r"\1[redacted]", redact_text(text))
    return _ADDRESS.sub("[address]", text)[:LONGEST]


def fingerprint(kind: str, place: str, *, callback: str, event_type: str) -> str:
    """Give the key under which failures of one cause are counted together."""
    cause = f"{kind}\n{place}\n{callback}\n{event_type}"
    return sha256(cause.encode("utf-8", "replace")).hexdigest()[:16]


def place_of(error: BaseException, function: Callable[..., Any]) -> str:
    """Give module and function of the innermost frame that is the author's own code."""
    own = _package(getattr(function, "__module__", None))
    place = home_of(function)
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__")
        if _package(module) == own:
            place = f"{module}:{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return place


def home_of(function: Callable[..., Any]) -> str:
    """Give module and name of a callback's function."""
    module = getattr(function, "__module__", "?")
    return f"{module}:{getattr(function, '__name__', type(function).__name__)}"


def _package(module: object) -> str:
    return str(module).partition(".")[0]
