"""The shape of a body: which fields it has and of which JSON types, and its status words.

Never a value, except for words that stand where a status does. Names that are somebody's data
are left out: those in the metadata, which are the caller's, and those deep in what was
extracted from a document.
"""

import re
from functools import lru_cache
from itertools import islice
from types import NoneType
from typing import Final, NamedTuple

from app.events.reading import LongNumber, Object, Repeating
from app.events.redaction import Json

MAX_TRAITS: Final = 500
MAX_DEPTH: Final = 8
MAX_NAME: Final = 100
MAX_WORD: Final = 32
# An index takes no more than a third of a page.
MAX_PATH: Final = 255
# How many elements of a list, and how many values of a body, are looked at.
MAX_ELEMENTS: Final = 50
MAX_VALUES: Final = 5000

FIELD: Final = "field"
STATUS: Final = "status"
OTHER: Final = "other"

_KINDS: Final = {
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    LongNumber: "number",
    NoneType: "null",
    dict: "object",
    Repeating: "object",
    list: "array",
}
_METADATA: Final = frozenset({"metadata"})
# Only their own names are noted, and nothing of what is in there.
_EXTRACTIONS: Final = frozenset({"extracted_data", "extractedData", "extraction", "extracted"})
_WORD = re.compile(r"[A-Za-z][A-Za-z_]{0,31}")
# An id, a number or an address is no name of a field.
_IS_DATA = re.compile(r".*@.*|[0-9]+|(?=.*[0-9])[0-9A-Fa-f-]{8,}", re.DOTALL)


class Trait(NamedTuple):
    """A field, as `parties[].email:string`, or a status word, as `status=signed`."""

    kind: str
    path: str


# What is still to be looked at: under which path it stands, and whether to look inside of it.
_Pending = list[tuple[str, Object, bool]]


def shape_of(document: Object) -> set[Trait]:
    """Return the traits of a body, level by level and within limits."""
    traits: set[Trait] = set()
    level: _Pending = [("", document, True)]
    values = 0
    for _ in range(MAX_DEPTH):
        below: _Pending = []
        for prefix, holder, is_open in level:
            values += min(len(holder), MAX_TRAITS)
            if len(traits) >= MAX_TRAITS or values > MAX_VALUES:
                return _cut(traits)
            _look(holder, prefix, traits, below if is_open else None)
        if not below:
            break
        level = below
    return _cut(traits)


def _cut(traits: set[Trait]) -> set[Trait]:
    return traits if len(traits) <= MAX_TRAITS else set(sorted(traits)[:MAX_TRAITS])


def _look(holder: Object, prefix: str, traits: set[Trait], below: _Pending | None) -> None:
    for key, value in islice(holder.items(), MAX_TRAITS):
        kind = _KINDS[type(value)]
        trait, path = _field(prefix, key, kind)
        traits.add(trait)
        if kind == "string":
            if key[-6:] in ("status", "Status"):
                traits.add(_status(path, value if len(value) <= MAX_WORD else ""))
        elif kind in ("object", "array") and below is not None and key not in _METADATA:
            _enter(value, path, traits, below, is_open=key not in _EXTRACTIONS)


def _enter(value: Json, path: str, traits: set[Trait], below: _Pending, *, is_open: bool) -> None:
    if isinstance(value, dict):
        below.append((path, value, is_open))
        return
    for element in value[:MAX_ELEMENTS]:
        kind = _KINDS[type(element)]
        trait, inside = _field(path, "[]", kind)
        traits.add(trait)
        if kind == "object":
            below.append((inside, element, is_open))


# The same few come again and again; the bounds are for those that do not.
@lru_cache(maxsize=8192)
def _field(prefix: str, key: str, kind: str) -> tuple[Trait, str]:
    name = key if key == "[]" else name_of(key)
    path = f"{prefix}.{name}" if prefix and key != "[]" else prefix + name
    path = path[:MAX_PATH]
    return Trait(FIELD, f"{path}:{kind}"), path


@lru_cache(maxsize=2048)
def _status(path: str, word: str) -> Trait:
    return Trait(STATUS, f"{path}={word if _WORD.fullmatch(word) else OTHER}")


def name_of(key: str) -> str:
    """Return the name of a field as it can be stored and shown; `*` if it is somebody's data."""
    if _IS_DATA.fullmatch(key):
        return "*"
    return "".join(c if c.isprintable() else "\ufffd" for c in key[:MAX_NAME])
