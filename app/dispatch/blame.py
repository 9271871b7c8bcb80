"""What went wrong, in words that may be stored, shown and logged; and in a short key.

The text of an error is written by strangers: it may hold anything, and it may raise when
it is asked for.
"""

import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import PurePath
from types import FrameType, TracebackType
from typing import Any

from app.events.redaction import redact_text

LONGEST = 2000
# Read no more of a text than could be shown: the patterns below walk over all of it.
_READ = 4 * LONGEST
# The callbacks that come along live here.
BUILT_IN = "app.callbacks."

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_ADDRESS = re.compile(r"[^\s@<>\"'/:\[\]]{1,64}@[\w.-]{1,255}")
_CREDENTIAL = re.compile(
    r"(?i)((?:token|secret|password|api[_-]?key|authorization)[\"']?\s*[:=]\s*[\"']?"
    r"(?:bearer |basic )?|bearer |basic |sha256=)[^\s\"',;&]+"
)


def describe(error: BaseException, at: str | None = None) -> str:
    """Name an error: its type, its text and its place; no secrets, at most 2,000 characters."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as fault:  # noqa: BLE001  # a stranger's __str__ may raise anything
        text = f"(its text cannot be read: {type(fault).__name__})"
    place = f" ({clean(at)})" if at else ""
    return clean(f"{name}: {text}" if text else name)[: LONGEST - len(place)] + place


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
    place = home_of(function)
    for frame, _ in _own_frames(error, function):
        place = f"{_module(frame)}:{frame.f_code.co_name}"
    return place


def line_of(error: BaseException, function: Callable[..., Any]) -> str | None:
    """Give file, line and function of that frame, for the author to look at.

    None if there is none, and if the error comes from a callback that comes along: its text
    is made for people.
    """
    if any(_module(frame).startswith(BUILT_IN) for frame, _ in _frames(error)):
        return None
    place = None
    for frame, line in _own_frames(error, function):
        code = frame.f_code
        place = f"{PurePath(code.co_filename).name}:{line} in {code.co_name}"
    return place


def _own_frames(
    error: BaseException, function: Callable[..., Any]
) -> Iterator[tuple[FrameType, int]]:
    own = _package(getattr(function, "__module__", None))
    return ((f, line) for f, line in _frames(error) if _package(_module(f)) == own)


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Give the frames that an error came through, with the line of each; the innermost last."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def home_of(function: Callable[..., Any]) -> str:
    """Give module and name of a callback's function."""
    module = getattr(function, "__module__", "?")
    return f"{module}:{getattr(function, '__name__', type(function).__name__)}"


def _package(module: object) -> str:
    return str(module).partition(".")[0]
