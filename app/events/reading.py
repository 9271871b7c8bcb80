"""Read bytes as one JSON object, within limits, and notice keys that were given twice.

Two parsers share the work. The fast one reads nearly everything; the patient one knows lone
surrogates and endless numbers, which are legal JSON and no reason to lose an event.
"""

import json
import re
from typing import Final, NoReturn

from pydantic_core import from_json

from app.errors import PayloadRejected
from app.events.redaction import Json

MAX_DEPTH: Final = 64
# Counted as commas and opening brackets, so an empty list or object counts twice. A megabyte
# of text is cheap to read; a megabyte of `[]` would hold up every other request.
MAX_VALUES: Final = 2**17
MAX_DIGITS: Final = 4300

_BACKSLASH = ord("\\")
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")

Object = dict[str, Json]


class LongNumber(str):
    """A number with more digits than any column holds, kept as the text that it was."""

    __slots__ = ()


class Repeating(dict[str, Json]):
    """An object in which a key stood twice; `repeated` names those with different values."""

    def __init__(self, pairs: list[tuple[str, Json]]) -> None:
        super().__init__(pairs)
        self.repeated = {
            key for key, value in pairs if value is not self[key] and not _is_same(value, self[key])
        }


def read(body: bytes) -> tuple[Object, bool]:
    """Return the JSON object that `body` is, and whether it took the patient parser."""
    if len(body) > MAX_VALUES and _is_crowded(body):
        raise PayloadRejected("too_many_values")
    is_odd = False
    try:
        top = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion limit" in str(error):
            raise PayloadRejected("too_deep") from None
        is_odd = True
        top = _read_patiently(body, _patient)
    if not isinstance(top, dict):
        raise PayloadRejected("not_an_object")
    # Fewer brackets than levels cannot be nested too deep, and most bodies have fewer.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_too_deep(top):
        raise PayloadRejected("too_deep")
    return top, is_odd


def has_escaped_ascii(body: bytes) -> bool:
    """Whether `body` spells a plain character as an escape, as if to hide a key."""
    return _BACKSLASH in body and bool(_ESCAPED_ASCII.search(body))


def read_watchfully(body: bytes) -> Object:
    """Return what `read` has returned for `body`, with every `Repeating` object marked."""
    top: Object = _read_patiently(body, _watchful)
    return top


def _is_crowded(body: bytes) -> bool:
    if _separators(body) <= MAX_VALUES:
        return False
    # Of text between quotes, nothing counts.
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
    return _separators(b"".join(pieces[::2])) > MAX_VALUES


def _separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _read_patiently(body: bytes, decoder: json.JSONDecoder) -> Json:
    try:
        return decoder.decode(body.decode())
    except UnicodeDecodeError:
        raise PayloadRejected("not_utf8") from None
    except RecursionError:
        raise PayloadRejected("too_deep") from None
    except ValueError:
        raise PayloadRejected("not_json") from None


def _is_too_deep(top: Object) -> bool:
    level: list[Json] = [top]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if outer
            for inner in (outer if type(outer) is list else outer.values())
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Json]]) -> Object:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else Repeating(pairs)


def _is_same(one: Json, other: Json) -> bool:
    return type(one) is type(other) and bool(one == other)


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else LongNumber(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_patient = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse_constant)
_watchful = json.JSONDecoder(
    parse_int=_integer, parse_constant=_refuse_constant, object_pairs_hook=_object
)
