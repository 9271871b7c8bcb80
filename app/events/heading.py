"""Establish what must be certain about a body: its name, its envelope, its own id.

These are read strictly and never guessed: a body that leaves a doubt is refused. Everything
else that it says may be wrong, and costs no more than itself.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from app.errors import PayloadRejected
from app.events.frozen import frozen
from app.events.reading import Object, Repeating, has_escaped_ascii, read_watchfully
from app.events.redaction import Json

MAX_ID_BYTES: Final = 255
MAX_NAME: Final = 128

OWN_ID_NAMES: Final = ("event_id", "eventId")
ENVELOPE_ID_NAMES: Final = ("envelope_id", "envelopeId")
TYPE_NAMES: Final = ("event", "type", "event_type", "eventType")
CONTAINER_NAMES: Final = ("data", "payload", "envelope", "event")
HEADING_NAMES: Final = {
    name: f'"{name}"'.encode()
    for name in (*TYPE_NAMES, "name", "id", *OWN_ID_NAMES, *ENVELOPE_ID_NAMES, *CONTAINER_NAMES)
}

_AMBIGUOUS: Final = {
    **dict.fromkeys((*TYPE_NAMES, "name"), "event_name_ambiguous"),
    **dict.fromkeys((*OWN_ID_NAMES, "id"), "event_id_ambiguous"),
    **dict.fromkeys(ENVELOPE_ID_NAMES, "envelope_id_ambiguous"),
}
_NAMES_INSIDE_EVENT: Final = ("type", "name", "event_type", "eventType")
# An object called `envelope` may have a type of its own, which is not the event's.
_BODIES: Final = ("", "data.", "payload.")
_UNUSABLE_IN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Place = tuple[str, Object]


@frozen
class Heading:
    """What an event is called, which envelope it is about, and its own id if it has one."""

    type: str
    envelope_id: str | None
    own_id: str | None


def places_of(top: Object) -> list[Place]:
    """Return the objects that fields may stand in, nearest first, each with its path."""
    places = [("", top)]
    for name in CONTAINER_NAMES:
        inner = top.get(name)
        if isinstance(inner, dict):
            places.append((f"{name}.", inner))
            envelope = inner.get("envelope")
            if name != "envelope" and isinstance(envelope, dict):
                places.append((f"{name}.envelope.", envelope))
    return places


def refuse_repeats(body: bytes, places: Sequence[Place]) -> None:
    """Refuse a body that gives a key of its heading twice, with different values.

    Parsers disagree on which of the two counts, so nobody can say what was meant.
    """
    if not (has_escaped_ascii(body) or _may_repeat(body, places)):
        return
    for _, place in places_of(read_watchfully(body)):
        if isinstance(place, Repeating):
            for name in sorted(place.repeated & HEADING_NAMES.keys()):
                raise PayloadRejected(_AMBIGUOUS.get(name, "body_ambiguous"))


def heading_of(places: Sequence[Place]) -> Heading:
    """Return the name and the ids of a body, or raise `PayloadRejected`."""
    name, home = _name_of(places)
    _check_name(name)
    own_id = _only_id("event_id", _values(places, OWN_ID_NAMES))
    explicit = _values(places, ENVELOPE_ID_NAMES)
    # In an object that is called an envelope, a plain `id` is explicit enough.
    if len(places) > 1:
        explicit += [place.get("id") for path, place in places if path.endswith("envelope.")]
    envelope_id = _only_id("envelope_id", explicit)
    if envelope_id is None and name.startswith("envelope."):
        envelope_id = _bare_envelope_id(home, places, own_id)
    if envelope_id is None and name.startswith(("envelope.", "contract.")):
        raise PayloadRejected("envelope_id_absent")
    if own_id is None and envelope_id is not None:
        own_id = _bare_own_id(home, places, envelope_id)
    # Two generations of the API have two words for it, and one event must have one key.
    return Heading("envelope.signed" if name == "envelope.completed" else name, envelope_id, own_id)


def _may_repeat(body: bytes, places: Sequence[Place]) -> bool:
    for _, place in places:
        for name in place.keys() & HEADING_NAMES.keys():
            # Searching from both ends is cheaper than to count.
            quoted = HEADING_NAMES[name]
            if body.find(quoted) != body.rfind(quoted):
                return True
    return False


def _name_of(places: Sequence[Place]) -> tuple[str, Object]:
    """Return the event's name and the object that carries it."""
    for path, place in places:
        if path in _BODIES:
            found = _name_in(place, TYPE_NAMES)
            if found is not None:
                return found
    raise PayloadRejected("event_name_absent")


def _name_in(place: Object, names: Sequence[str]) -> tuple[str, Object] | None:
    for key in names:
        name = place.get(key)
        if type(name) is str:
            return name, place
        if isinstance(name, dict) and key == "event":
            found = _name_in(name, _NAMES_INSIDE_EVENT)
            if found is not None:
                return found
        elif name is not None:
            raise PayloadRejected("event_name_not_text")
    return None


def _check_name(name: str) -> None:
    if not name or name.isspace():
        raise PayloadRejected("event_name_blank")
    if len(name) > MAX_NAME:
        raise PayloadRejected("event_name_too_long")
    if " " in name or not name.isprintable():
        raise PayloadRejected("event_name_unusable")


def _values(places: Sequence[Place], names: Sequence[str]) -> list[Json]:
    values: list[Json] = []
    for _, place in places:
        values += map(place.get, names)
    return values


def _bare_envelope_id(home: Object, places: Sequence[Place], own_id: str | None) -> str | None:
    """Return the `id` of a body that is an envelope itself."""
    bodies = [home, *(place for path, place in places if path in _BODIES)]
    bare = (body.get("id") for body in bodies)
    return _only_id("envelope_id", (value for value in bare if value != own_id))


def _bare_own_id(home: Object, places: Sequence[Place], envelope_id: str) -> str | None:
    """Return the `id` beside the event's name, unless it is the envelope's.

    An `id` elsewhere may be a signer's: two events under one id would be one event.
    """
    for value in (home.get("id"), places[0][1].get("id")):
        if value is not None and value != envelope_id:
            return _only_id("event_id", (value,))
    return None


def _only_id(kind: str, values: Iterable[Json]) -> str | None:
    found: str | None = None
    for value in values:
        if value is None or value == found:
            continue
        if type(value) is not str:
            raise PayloadRejected(f"{kind}_not_text")
        if found is not None:
            raise PayloadRejected(f"{kind}_ambiguous")
        found = value
    if found is not None:
        _check_id(kind, found)
    return found


def _check_id(kind: str, value: str) -> None:
    """Refuse what no column holds; any other text is an id, byte by byte."""
    if not value or value.isspace():
        raise PayloadRejected(f"{kind}_blank")
    if not value.isprintable() and _UNUSABLE_IN_ID.search(value):
        raise PayloadRejected(f"{kind}_unusable")
    if len(value) > MAX_ID_BYTES or (not value.isascii() and len(value.encode()) > MAX_ID_BYTES):
        raise PayloadRejected(f"{kind}_too_long")
