"""Take values over into what every column holds, and note the path of what is lost.

A value of the wrong type is dropped, one that is too long is cut, and what no database
stores (NUL, half a surrogate pair, infinity) is replaced by something that it does.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from app.events.reading import LongNumber
from app.events.redaction import Json, has_links, may_hold_secrets, redact, redact_text

MAX_DEGRADED: Final = 32
MAX_PATH: Final = 128
MAX_INTEGER: Final = 2**31 - 1

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ](?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]+)?)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])"
)
# What could become infinite as a float, with every digit a 0: 199 of them and an exponent of
# two more cannot.
_SHAPE_OF_NUMBERS = bytes.maketrans(b"123456789E", b"000000000e")
_HUGE_NUMBERS = (b"e000", b"e+000", b"0" * 200)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# In seconds that would be the year 5138; in milliseconds it is 1973.
_FIRST_MILLISECONDS = 100_000_000_000
_INFINITIES = (math.inf, -math.inf)
_SIMPLE = frozenset({str, int, bool, type(None)})
_HARMLESS = _SIMPLE - {str}


class Values:
    """What one body says, value by value; `degraded` lists the paths of what was lost.

    A path comes in parts, and is put together only if it is needed: text as it stands, the
    place in a list as a number.
    """

    __slots__ = ("_body", "_has_links", "_latest", "degraded", "is_odd")

    def __init__(self, body: bytes, *, is_odd: bool, latest: datetime) -> None:
        self._body = body
        self._latest = latest
        self._has_links = has_links(body)
        self.is_odd = is_odd or (self._has_links and b"\\u0000" in body)
        self.degraded: list[str] = []

    def lose(self, *path: str | int) -> None:
        if len(self.degraded) < MAX_DEGRADED:
            text = "".join([part if isinstance(part, str) else f"[{part}]" for part in path])
            self.degraded.append(_UNSTORABLE.sub("\ufffd", text)[:MAX_PATH])

    def text(self, value: Json, limit: int, *path: str | int) -> str | None:
        # Nearly every text of nearly every body ends here.
        if type(value) is str and len(value) <= limit and not (self.is_odd or self._has_links):
            return value or None
        return None if value is None else self._clean(value, limit, *path)

    def number(self, value: Json, *path: str | int) -> int | None:
        if value is None:
            return None
        if type(value) is int and 0 <= value <= MAX_INTEGER:
            return value
        self.lose(*path)
        return None

    def flag(self, value: Json, *path: str | int) -> bool | None:
        if type(value) is bool:
            return value
        word = value.casefold() if type(value) is str else ""
        if word not in ("true", "false"):
            self.lose(*path)
            return None
        return word == "true"

    def instant(self, value: Json, *path: str | int) -> datetime | None:
        """Return a time, unless it lies in the future: that would outlast every honest one."""
        instant = _instant_of(value)
        if instant is None or instant > self._latest:
            self.lose(*path)
            return None
        return instant

    def json(self, value: Json, *path: str | int) -> Json:
        """Return a JSON value that every JSON column holds, without secrets."""
        is_simple = _is_simple(value)
        if self.is_odd or (not is_simple and _may_overflow(self._body)):
            value = self._substituted(value, *path)
        # A few texts are looked at sooner than the body is searched for traces.
        return redact(value) if is_simple or may_hold_secrets(self._body) else value

    def _clean(self, value: Json, limit: int, *path: str | int) -> str | None:
        if type(value) is not str:
            self.lose(*path)
            return str(value)[:limit] if type(value) in (int, LongNumber) else None
        text: str = self._substitute(value, *path) if self.is_odd else value
        if self._has_links:
            text = redact_text(text)
        if len(text) > limit:
            self.lose(*path)
        return text[:limit] or None

    def _substituted(self, value: Json, *path: str | int) -> Json:
        if isinstance(value, dict):
            return {
                self._substitute(key, *path): inner
                if _is_harmless(inner)
                else self._substituted(inner, *path, f".{key}")
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [
                inner if _is_harmless(inner) else self._substituted(inner, *path, index)
                for index, inner in enumerate(value)
            ]
        if isinstance(value, LongNumber) or value in _INFINITIES:
            self.lose(*path)
            return str(value)
        return self._substitute(value, *path) if isinstance(value, str) else value

    def _substitute(self, value: str, *path: str | int) -> str:
        if value.isprintable():
            return value
        clean = _UNSTORABLE.sub(_visible, value)
        if clean != value:
            self.lose(*path)
        return clean


def canonical(statuses: Mapping[str, str], word: str) -> str | None:
    """Return the status that `word` stands for, however it is capitalised."""
    return statuses.get(word) or statuses.get(word.strip().casefold())


def _instant_of(value: Json) -> datetime | None:
    """Return the instant that ISO 8601 text with a zone, or an epoch in s or ms, names."""
    try:
        if type(value) is str and _INSTANT.fullmatch(value):
            return datetime.fromisoformat(value).astimezone(UTC)
        if type(value) in (int, float):
            unit = 1 if abs(value) < _FIRST_MILLISECONDS else 1000
            return _EPOCH + timedelta(seconds=value / unit)
    except (ValueError, OverflowError):
        pass
    return None


def _visible(match: re.Match[str]) -> str:
    return "\u2400" if match[0] == "\x00" else "\ufffd"


def _is_simple(value: Json) -> bool:
    return isinstance(value, dict) and _SIMPLE.issuperset(map(type, value.values()))


def _may_overflow(body: bytes) -> bool:
    shape = body.translate(_SHAPE_OF_NUMBERS)
    return any(number in shape for number in _HUGE_NUMBERS)


def _is_harmless(value: Json) -> bool:
    return not value or type(value) in _HARMLESS or (type(value) is str and value.isprintable())
