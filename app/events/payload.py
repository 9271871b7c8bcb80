"""Read a genuine body: bytes in, one `Event` out, whichever way Atlas wrote it.

Nobody publishes the shape of these bodies, and public samples contradict each other, so
every field is looked for under each name and in each place that it was ever seen in.

`parse` refuses a body only when its name or its identity cannot be established without
guessing. Whatever else is wrong with it costs the one value, never the event: the value is
dropped or substituted, and its path is noted in `degraded`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn

from pydantic_core import from_json

from app.errors import PayloadRejected
from app.events.redaction import Json, has_marks, redact, redact_text

MAX_DEPTH: Final = 64
MAX_ID_BYTES: Final = 255
MAX_NAME: Final = 128
MAX_TEXT: Final = 1024
MAX_EMAIL: Final = 320
MAX_WORD: Final = 64
# These are searched for, and an index takes no more than a third of a page.
MAX_REFERENCE: Final = 255
MAX_PARTIES: Final = 256
MAX_DEGRADED: Final = 32
MAX_INTEGER: Final = 2**31 - 1
MAX_DIGITS: Final = 4300
SKEW: Final = timedelta(minutes=5)

STATUS_OF_WORD: Final = {
    "draft": "draft",
    "detecting": "draft",
    "review": "draft",
    "pending": "pending",
    "in_progress": "pending",
    "sent": "pending",
    "expired": "expired",
    "voided": "voided",
    "declined": "declined",
    "signed": "signed",
    "completed": "signed",
}
PARTY_STATUSES: Final = ("waiting", "pending", "viewed", "declined", "signed")
_PARTY_STATUS_OF_WORD: Final = {
    **{status: status for status in PARTY_STATUSES},
    "completed": "signed",
}

# The event's own id, the envelope's id and the event's name: read strictly, never guessed.
OWN_ID_NAMES: Final = ("event_id", "eventId")
ENVELOPE_ID_NAMES: Final = ("envelope_id", "envelopeId")
TYPE_NAMES: Final = ("event", "type", "event_type", "eventType")
CONTAINER_NAMES: Final = ("data", "payload", "envelope", "event")

_SPELLINGS: Final[Mapping[str, Sequence[str]]] = {
    "occurred_at": (
        "timestamp",
        "created_at",
        "createdAt",
        "occurred_at",
        "occurredAt",
        "sent_at",
        "sentAt",
    ),
    "status": ("status",),
    "reason": ("reason", "decline_reason", "declineReason", "void_reason", "voidReason"),
    "tenant": (
        "connected_org_id",
        "connectedOrgId",
        "organizationId",
        "organization_id",
        "org_id",
        "orgId",
        "account",
        "account_id",
        "accountId",
    ),
    "parties": ("parties", "participants"),
    "metadata": ("metadata",),
    "external_id": ("external_id", "externalId"),
    "client_reference_id": ("client_reference_id", "clientReferenceId"),
    "is_test": ("is_test", "isTest"),
    "send_error": ("send_error", "sendError"),
    "detection_error": ("detection_error", "detectionError"),
    "fields_status": ("fields_status", "fieldsStatus"),
    "fields_version": ("fields_version", "fieldsVersion"),
    "extraction": ("extracted_data", "extractedData", "extraction", "extracted"),
}
_FIELD_OF: Final = {
    spelling: (name, rank)
    for name, spellings in _SPELLINGS.items()
    for rank, spelling in enumerate(spellings)
}
_FIELDS_IN_METADATA: Final = frozenset(
    {"external_id", "client_reference_id", "is_test", "send_error", "detection_error"}
)
# In an object that is an envelope, these are the envelope's times and not the event's.
_ENVELOPE_TIMES: Final = frozenset({"created_at", "createdAt", "sent_at", "sentAt"})
_IDENTITY_NAMES: Final = {
    name: f'"{name}"'.encode()
    for name in (*TYPE_NAMES, "name", "id", *OWN_ID_NAMES, *ENVELOPE_ID_NAMES, *CONTAINER_NAMES)
}
_AMBIGUOUS: Final = {
    **dict.fromkeys((*TYPE_NAMES, "name"), "event_name_ambiguous"),
    **dict.fromkeys((*OWN_ID_NAMES, "id"), "event_id_ambiguous"),
    **dict.fromkeys(ENVELOPE_ID_NAMES, "envelope_id_ambiguous"),
}
_SURROUNDINGS: Final = _FIELD_OF.keys() | _IDENTITY_NAMES.keys()
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
_UNUSABLE_IN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
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
_FIRST_MILLISECONDS = 100_000_000_000
_INFINITIES = (math.inf, -math.inf)
_SIMPLE = frozenset({str, int, bool, type(None)})

Object = dict[str, Json]
Place = tuple[str, Object]


@dataclass(frozen=True, slots=True)
class Party:
    """One signer, as far as this event knows."""

    email: str | None = None
    name: str | None = None
    role: str | None = None
    order: int | None = None
    status: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What Atlas said, in our words.

    `atlas_event_id` is the sender's own id, if it gave one; `status` is the word of our
    lattice, `status_word` what was sent. `degraded` lists the paths of what was lost.
    """

    type: str
    envelope_id: str | None = None
    atlas_event_id: str | None = None
    occurred_at: datetime | None = None
    status: str | None = None
    status_word: str | None = None
    reason: str | None = None
    tenant: str | None = None
    parties: tuple[Party, ...] | None = None
    metadata: Object | None = None
    external_id: str | None = None
    client_reference_id: str | None = None
    is_test: bool | None = None
    send_error: str | None = None
    detection_error: str | None = None
    fields_status: str | None = None
    fields_version: int | None = None
    extraction: Json | None = None
    degraded: tuple[str, ...] = ()

    @property
    def decline_reason(self) -> str | None:
        """Why a signer declined, if this event says that one did."""
        return self.reason if self.type == "envelope.declined" else None

    @property
    def void_reason(self) -> str | None:
        """Why the sender voided the envelope, if this event says so."""
        return self.reason if self.type == "envelope.voided" else None


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be certain about a body: its name, its envelope, its own id."""

    type: str
    envelope_id: str | None
    own_id: str | None


def parse(body: bytes, *, received_at: datetime) -> Event:
    """Return what `body` says, or raise `PayloadRejected`; nothing else can happen."""
    top, is_odd = _read(body)
    places = places_of(top)
    _refuse_repeats(body, places)
    identity = identify(places)
    reading = _Reading(
        fields=_gather(places, identity.envelope_id),
        is_odd=is_odd or b"\\u0000" in body,
        is_marked=has_marks(body),
        body=body,
    )
    return _event(identity, reading, places, received_at)


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


def identify(places: Sequence[Place]) -> Identity:
    """Return the name and the ids of a body, or raise `PayloadRejected`."""
    name, home = _name_of(places)
    _check_name(name)
    own_id = _only_id("event_id", _values(places, OWN_ID_NAMES))
    envelope_id = _only_id("envelope_id", _explicit_envelope_ids(places))
    if envelope_id is None and name.startswith("envelope."):
        envelope_id = _bare_envelope_id(home, places, own_id)
    if envelope_id is None and name.startswith(("envelope.", "contract.")):
        raise PayloadRejected("envelope_id_absent")
    if own_id is None and envelope_id is not None:
        own_id = _bare_own_id(home, places, envelope_id)
    return Identity(
        "envelope.signed" if name == "envelope.completed" else name, envelope_id, own_id
    )


def _name_of(places: Sequence[Place]) -> tuple[str, Object]:
    """Return the event's name and the object that carries it."""
    for path, place in places:
        if path in ("", "data.", "payload."):
            found = _name_in(place)
            if found is not None:
                return found
    raise PayloadRejected("event_name_absent")


def _name_in(place: Object, names: Sequence[str] = TYPE_NAMES) -> tuple[str, Object] | None:
    for key in names:
        name = place.get(key)
        if type(name) is str:
            return name, place
        if isinstance(name, dict) and key == "event":
            found = _name_in(name, ("type", "name", "event_type", "eventType"))
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


def _values(places: Iterable[Place], names: Iterable[str]) -> list[Json]:
    return [place[name] for _, place in places for name in names if name in place]


def _explicit_envelope_ids(places: Sequence[Place]) -> list[Json]:
    ids = _values(places, ENVELOPE_ID_NAMES)
    ids += (place.get("id") for path, place in places[1:] if path.endswith("envelope."))
    return ids


def _bare_envelope_id(home: Object, places: Sequence[Place], own_id: str | None) -> str | None:
    """Return the `id` of a body that is an envelope itself."""
    bodies = [home, *(place for path, place in places if path in ("", "data.", "payload."))]
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
    if not value.strip():
        raise PayloadRejected(f"{kind}_blank")
    if not value.isprintable() and _UNUSABLE_IN_ID.search(value):
        raise PayloadRejected(f"{kind}_unusable")
    if len(value) > MAX_ID_BYTES or len(value.encode()) > MAX_ID_BYTES:
        raise PayloadRejected(f"{kind}_too_long")


def _read(body: bytes) -> tuple[Object, bool]:
    """Return the JSON object that `body` is, and whether it took the patient parser."""
    is_odd = False
    try:
        top = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion limit" in str(error):
            raise PayloadRejected("too_deep") from None
        is_odd = True
        top = _read_patiently(body)
    if not isinstance(top, dict):
        raise PayloadRejected("not_an_object")
    # Fewer brackets than levels cannot be nested too deep, and most bodies have fewer.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_too_deep(top):
        raise PayloadRejected("too_deep")
    return top, is_odd


class _LongNumber(str):
    """A number with more digits than any column holds, kept as the text that it was."""

    __slots__ = ()


class _Repeating(dict[str, Json]):
    """An object in which a key stood twice; `repeated` names those with different values."""

    def __init__(self, pairs: list[tuple[str, Json]]) -> None:
        super().__init__(pairs)
        self.repeated = {key for key, value in pairs if not _is_same(value, self[key])}


def _is_same(one: Json, other: Json) -> bool:
    return type(one) is type(other) and bool(one == other)


def _object(pairs: list[tuple[str, Json]]) -> Object:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else _Repeating(pairs)


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else _LongNumber(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


_patient = json.JSONDecoder(parse_int=_integer, parse_constant=_refuse_constant)
_watchful = json.JSONDecoder(
    parse_int=_integer, parse_constant=_refuse_constant, object_pairs_hook=_object
)


def _read_patiently(body: bytes, decoder: json.JSONDecoder = _patient) -> Json:
    """Parse what the fast parser refused: it knows no lone surrogates and no long numbers."""
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
            for inner in (outer if isinstance(outer, list) else outer.values())
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _refuse_repeats(body: bytes, places: Sequence[Place]) -> None:
    """Refuse a body that gives a key of its identity twice, with different values.

    Parsers disagree on which of the two counts, so nobody can say what was meant.
    """
    if not _may_repeat(body, places):
        return
    for _, place in places_of(_read_patiently(body, _watchful)):
        if isinstance(place, _Repeating):
            for name in sorted(place.repeated & _IDENTITY_NAMES.keys()):
                raise PayloadRejected(_AMBIGUOUS.get(name, "body_ambiguous"))


def _may_repeat(body: bytes, places: Sequence[Place]) -> bool:
    if b"\\u" in body and _ESCAPED_ASCII.search(body):
        return True
    for _, place in places:
        for name in place.keys() & _IDENTITY_NAMES.keys():
            if body.count(_IDENTITY_NAMES[name]) > 1:
                return True
    return False


def _gather(places: Sequence[Place], envelope_id: str | None) -> dict[str, tuple[int, Json, str]]:
    """Return the first value of every field, with its path; null is no value."""
    found: dict[str, tuple[int, Json, str]] = {}
    for distance, (path, place) in enumerate(places):
        is_envelope = path.endswith("envelope.") or place.get("id") == envelope_id is not None
        for key, value in place.items():
            spelled = _FIELD_OF.get(key)
            if spelled is None or value is None or (is_envelope and key in _ENVELOPE_TIMES):
                continue
            name, rank = spelled
            rank += distance * 100
            held = found.get(name)
            if held is None or rank < held[0]:
                found[name] = (rank, value, path + key)
    return found


@dataclass(slots=True)
class _Reading:
    """One body, field by field, and a list of what could not be taken over."""

    fields: dict[str, tuple[int, Json, str]]
    is_odd: bool
    is_marked: bool
    body: bytes
    degraded: list[str] = field(default_factory=list)

    def lose(self, *path: str) -> None:
        if len(self.degraded) < MAX_DEGRADED:
            self.degraded.append(_UNSTORABLE.sub("\ufffd", "".join(path))[:MAX_NAME])

    def text(self, name: str, limit: int = MAX_TEXT) -> str | None:
        held = self.fields.get(name)
        return None if held is None else self.clean(held[1], limit, held[2])

    def clean(self, value: Json, limit: int, *path: str) -> str | None:
        """Return `value` as text that every column holds."""
        if value is None:
            return None
        if type(value) is not str:
            self.lose(*path)
            return str(value)[:limit] if type(value) in (int, _LongNumber) else None
        text: str = self.substitute(value, *path) if self.is_odd else value
        if self.is_marked:
            text = redact_text(text)
        if len(text) > limit:
            self.lose(*path)
        return text[:limit] or None

    def substitute(self, value: str, *path: str) -> str:
        clean = _UNSTORABLE.sub(_visible, value)
        if clean != value:
            self.lose(*path)
        return clean

    def number(self, value: Json, *path: str) -> int | None:
        if value is None:
            return None
        if type(value) is int and 0 <= value <= MAX_INTEGER:
            return value
        self.lose(*path)
        return None


def _visible(match: re.Match[str]) -> str:
    return "\u2400" if match[0] == "\x00" else "\ufffd"


def _event(
    identity: Identity, reading: _Reading, places: Sequence[Place], received_at: datetime
) -> Event:
    metadata = _metadata(reading)
    status_word = reading.text("status", MAX_WORD)
    version = reading.fields.get("fields_version")
    return Event(
        type=identity.type,
        envelope_id=identity.envelope_id,
        atlas_event_id=identity.own_id,
        occurred_at=_occurred_at(reading, received_at),
        status=_canonical(STATUS_OF_WORD, status_word) if status_word else None,
        status_word=status_word,
        reason=reading.text("reason"),
        tenant=_tenant(reading),
        parties=_parties(reading),
        metadata=metadata,
        external_id=reading.text("external_id", MAX_REFERENCE),
        client_reference_id=reading.text("client_reference_id", MAX_REFERENCE),
        is_test=_is_test(reading),
        send_error=reading.text("send_error"),
        detection_error=reading.text("detection_error"),
        fields_status=reading.text("fields_status", MAX_WORD),
        fields_version=None if version is None else reading.number(version[1], version[2]),
        extraction=_extraction(identity.type, reading, places),
        degraded=tuple(reading.degraded),
    )


def _metadata(reading: _Reading) -> Object | None:
    """Return the metadata, and let it answer for the fields that live in it."""
    held = reading.fields.get("metadata")
    if held is None:
        return None
    _, value, path = held
    if isinstance(value, str):
        value = _from_text(value, reading)
    if not isinstance(value, dict):
        reading.lose(path)
        return None
    for key in value.keys() & _FIELD_OF.keys():
        name, rank = _FIELD_OF[key]
        if name in _FIELDS_IN_METADATA and value[key] is not None:
            _prefer(reading.fields, name, (rank + 10_000, value[key], f"{path}.{key}"))
    metadata: Object = _storable(value, path, reading)
    return metadata


def _prefer(
    fields: dict[str, tuple[int, Json, str]], name: str, candidate: tuple[int, Json, str]
) -> None:
    held = fields.get(name)
    if held is None or candidate[0] < held[0]:
        fields[name] = candidate


def _from_text(text: str, reading: _Reading) -> Json:
    """Return the object that a form field carried as JSON text, or None."""
    try:
        value, is_odd = _read(text.encode("utf-8", "surrogatepass"))
    except PayloadRejected:
        return None
    reading.is_odd = reading.is_odd or is_odd
    return value


def _storable(value: Json, path: str, reading: _Reading) -> Json:
    """Return a JSON value that every JSON column holds, without secrets."""
    if reading.is_odd or (not _is_simple(value) and _may_overflow(reading.body)):
        value = _substituted(value, path, reading)
    return redact(value) if reading.is_marked else value


def _is_simple(value: Json) -> bool:
    return isinstance(value, dict) and _SIMPLE.issuperset(map(type, value.values()))


def _may_overflow(body: bytes) -> bool:
    shape = body.translate(_SHAPE_OF_NUMBERS)
    return any(number in shape for number in _HUGE_NUMBERS)


def _substituted(value: Json, path: str, reading: _Reading) -> Json:
    if isinstance(value, dict):
        return {
            reading.substitute(key, path): inner
            if _is_harmless(inner)
            else _substituted(inner, f"{path}.{key}", reading)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [
            inner if _is_harmless(inner) else _substituted(inner, f"{path}[{index}]", reading)
            for index, inner in enumerate(value)
        ]
    if isinstance(value, _LongNumber) or value in _INFINITIES:
        reading.lose(path)
        return str(value)
    return reading.substitute(value, path) if isinstance(value, str) else value


def _is_harmless(value: Json) -> bool:
    return type(value) is str and value.isprintable()


def _occurred_at(reading: _Reading, received_at: datetime) -> datetime | None:
    held = reading.fields.get("occurred_at")
    if held is None:
        return None
    instant = _instant(held[1])
    if instant is None or instant > received_at + SKEW:
        reading.lose(held[2])
        return None
    return instant


def _instant(value: Json) -> datetime | None:
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


def _tenant(reading: _Reading) -> str | None:
    tenant = reading.text("tenant", MAX_REFERENCE)
    return tenant.removeprefix("ext_") or None if tenant else None


def _is_test(reading: _Reading) -> bool | None:
    held = reading.fields.get("is_test")
    if held is None:
        return None
    _, value, path = held
    if type(value) is bool:
        return value
    word = value.casefold() if type(value) is str else ""
    if word not in ("true", "false"):
        reading.lose(path)
        return None
    return word == "true"


def _parties(reading: _Reading) -> tuple[Party, ...] | None:
    held = reading.fields.get("parties")
    if held is None:
        return None
    _, elements, path = held
    if not isinstance(elements, list):
        reading.lose(path)
        return None
    if len(elements) > MAX_PARTIES:
        reading.lose(path)
    parties = []
    for index, element in enumerate(elements[:MAX_PARTIES]):
        where = f"{path}[{index}]"
        if isinstance(element, dict):
            parties.append(_party(element, where, reading))
        else:
            reading.lose(where)
    return tuple(parties)


def _party(element: Object, path: str, reading: _Reading) -> Party:
    role = _first(element, "role", "role_name", "roleName")
    order = _first(element, "order", "orderIndex", "order_index")
    return Party(
        reading.clean(element.get("email"), MAX_EMAIL, path, ".email"),
        reading.clean(element.get("name"), MAX_REFERENCE, path, ".name"),
        reading.clean(role, MAX_REFERENCE, path, ".role"),
        reading.number(order, path, ".order"),
        _party_status(element, path, reading),
    )


def _first(element: Object, *names: str) -> Json:
    for name in names:
        value = element.get(name)
        if value is not None:
            return value
    return None


def _party_status(element: Object, path: str, reading: _Reading) -> str | None:
    word = element.get("status")
    status = _canonical(_PARTY_STATUS_OF_WORD, word) if type(word) is str else None
    if status is None and word is not None:
        reading.lose(path, ".status")
    if status == "signed" or _first(element, "signed_at", "signedAt"):
        return "signed"
    return "declined" if _first(element, "declined_at", "declinedAt") else status


def _canonical(statuses: Mapping[str, str], word: str) -> str | None:
    return statuses.get(word) or statuses.get(word.strip().casefold())


def _extraction(name: str, reading: _Reading, places: Sequence[Place]) -> Json:
    held = reading.fields.get("extraction")
    if held is not None:
        return _storable(held[1], held[2], reading)
    whole = places[0][1].get("data")
    if name == "contract.extracted" and _is_content(whole):
        return _storable(whole, "data", reading)
    return None


def _is_content(data: Json) -> bool:
    """Whether `data` holds more than what identifies and surrounds an event."""
    if isinstance(data, dict):
        return not data.keys() <= _SURROUNDINGS
    return isinstance(data, list) and bool(data)
