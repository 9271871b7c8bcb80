"""Read a genuine body: bytes in, one `Event` out, whichever way Atlas wrote it.

Nobody publishes the shape of these bodies, and public samples contradict each other, so
every field is looked for under each name and in each place that it was ever seen in.

`parse` refuses a body only when it is no JSON object within limits (`reading`), or when its
name or its identity cannot be established without guessing (`heading`). Whatever else is
wrong with it costs the one value, never the event: the value is dropped or substituted, and
its path is noted in `degraded` (`values`).
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from app.errors import PayloadRejected
from app.events.frozen import frozen
from app.events.heading import (
    HEADING_NAMES,
    Place,
    heading_of,
    places_of,
    refuse_repeats,
)
from app.events.parties import MAX_PARTIES, PARTY_STATUSES, Parties, Party, parties_of
from app.events.reading import Object, read
from app.events.redaction import Json
from app.events.values import MAX_DEGRADED, Values, canonical

__all__ = [
    "MAX_DEGRADED",
    "MAX_PARTIES",
    "PARTY_STATUSES",
    "SKEW",
    "STATUS_OF_WORD",
    "Event",
    "Party",
    "parse",
]

MAX_TEXT: Final = 1024
MAX_WORD: Final = 64
# These are searched for, and an index takes no more than a third of a page.
MAX_REFERENCE: Final = 255
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

Take = Callable[[Values, Json, str], Json]


def _text(limit: int) -> Take:
    return lambda values, value, path: values.text(value, limit, path)


def _tenant(values: Values, value: Json, path: str) -> str | None:
    tenant = values.text(value, MAX_REFERENCE, path)
    return tenant.removeprefix("ext_") or None if tenant else None


# By field: under which names it was seen, the likeliest first, and how it is taken over. They
# are taken over in this order.
_FIELDS: Final[Mapping[str, tuple[Sequence[str], Take]]] = {
    "metadata": (("metadata",), Values.json),
    "status_word": (("status",), _text(MAX_WORD)),
    "occurred_at": (
        (
            "timestamp",
            "created_at",
            "createdAt",
            "occurred_at",
            "occurredAt",
            "sent_at",
            "sentAt",
        ),
        Values.instant,
    ),
    "reason": (
        ("reason", "decline_reason", "declineReason", "void_reason", "voidReason"),
        _text(MAX_TEXT),
    ),
    "tenant": (
        (
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
        _tenant,
    ),
    "parties": (("parties", "participants"), parties_of),
    "external_id": (("external_id", "externalId"), _text(MAX_REFERENCE)),
    "client_reference_id": (
        ("client_reference_id", "clientReferenceId"),
        _text(MAX_REFERENCE),
    ),
    "is_test": (("is_test", "isTest"), Values.flag),
    "send_error": (("send_error", "sendError"), _text(MAX_TEXT)),
    "detection_error": (("detection_error", "detectionError"), _text(MAX_TEXT)),
    "fields_status": (("fields_status", "fieldsStatus"), _text(MAX_WORD)),
    "fields_version": (("fields_version", "fieldsVersion"), Values.number),
    "extraction": (
        ("extracted_data", "extractedData", "extraction", "extracted"),
        Values.json,
    ),
}
_TAKES: Final = {name: take for name, (_, take) in _FIELDS.items()}
_FIELD_OF: Final = {
    spelling: (name, rank)
    for name, (spellings, _) in _FIELDS.items()
    for rank, spelling in enumerate(spellings)
}
# Callers write the metadata, so it answers for what is theirs to say, and for nothing else.
_FIELD_IN_METADATA: Final = {
    spelling: (name, rank)
    for spelling, (name, rank) in _FIELD_OF.items()
    if name in {"external_id", "client_reference_id", "is_test", "send_error", "detection_error"}
}
# Nothing is further away than the metadata.
_IN_METADATA: Final = 10_000
# In an object that is an envelope, these are the envelope's times and not the event's.
_ENVELOPE_TIMES: Final = frozenset({"created_at", "createdAt", "sent_at", "sentAt"})
_SURROUNDINGS: Final = _FIELD_OF.keys() | HEADING_NAMES.keys()

# By field: how near the value stands (less is nearer), the value, its path.
Found = dict[str, tuple[int, Json, str]]


@frozen
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
    parties: Parties | None = None
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


def parse(body: bytes, *, received_at: datetime) -> Event:
    """Return what `body` says, or raise `PayloadRejected`; nothing else can happen."""
    top, is_odd = read(body)
    places = places_of(top)
    refuse_repeats(body, places)
    heading = heading_of(places)
    found = _gather(places, heading.envelope_id)
    values = Values(body, is_odd=is_odd, latest=received_at + SKEW)
    if "metadata" in found:
        _open_metadata(found, values)
    said: dict[str, Json] = {}
    for name, take in _TAKES.items():
        if name in found:
            _, value, path = found[name]
            said[name] = take(values, value, path)
    if word := said.get("status_word"):
        said["status"] = canonical(STATUS_OF_WORD, word)
    if heading.type == "contract.extracted" and "extraction" not in found:
        said["extraction"] = _whole_extraction(top.get("data"), values)
    return Event(
        heading.type,
        heading.envelope_id,
        heading.own_id,
        degraded=tuple(values.degraded),
        **said,
    )


def _gather(places: Sequence[Place], envelope_id: str | None) -> Found:
    """Return the nearest value of every field; null is no value."""
    found: Found = {}
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


def _open_metadata(found: Found, values: Values) -> None:
    """Leave an object as the metadata or none, and let it answer for fields that live in it."""
    rank, value, path = found.pop("metadata")
    if isinstance(value, str):
        value = _from_text(value, values)
    if not isinstance(value, dict):
        values.lose(path)
        return
    found["metadata"] = (rank, value, path)
    for key in value.keys() & _FIELD_IN_METADATA.keys():
        if value[key] is not None:
            name, rank = _FIELD_IN_METADATA[key]
            rank += _IN_METADATA
            if name not in found or rank < found[name][0]:
                found[name] = (rank, value[key], f"{path}.{key}")


def _from_text(text: str, values: Values) -> Json:
    """Return the object that a form field carried as JSON text, or None."""
    try:
        value, is_odd = read(text.encode("utf-8", "surrogatepass"))
    except PayloadRejected:
        return None
    values.is_odd = values.is_odd or is_odd
    return value


def _whole_extraction(data: Json, values: Values) -> Json:
    return values.json(data, "data") if _is_content(data) else None


def _is_content(data: Json) -> bool:
    """Whether `data` holds more than what identifies and surrounds an event."""
    if isinstance(data, dict):
        return not data.keys() <= _SURROUNDINGS
    return isinstance(data, list) and bool(data)
