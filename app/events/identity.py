"""Recognise an event that was seen before, whatever it was wrapped in this time.

A retry may come with the same bytes, with a rebuilt body or with a new id, so an event
claims every key it has: its own id, "the one signing of this envelope", its content.
Keys only say who might be meant; `relate` compares, and says who is.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Final
from uuid import UUID

from app.events.erasure import ERASED, erased_status, erased_text
from app.events.frozen import frozen
from app.events.heading import OWN_ID_NAMES, heading_of, places_of
from app.events.payload import Event
from app.events.redaction import Json

# An envelope is created, sent, signed, declined or voided once. It is viewed many times.
ONCE_TYPES: Final = frozenset(
    {
        "envelope.created",
        "envelope.sent",
        "envelope.signed",
        "envelope.declined",
        "envelope.voided",
    }
)
RECIPE: Final = "1"

# What differs between two deliveries of one event. Times of any other name are content:
# to deliver twice is better than to lose.
_VOLATILE: Final = frozenset(
    {
        "attempt",
        "attempts",
        "attempt_number",
        "attemptNumber",
        "retry",
        "retry_count",
        "retryCount",
        "delivery_id",
        "deliveryId",
        "delivered_at",
        "deliveredAt",
        *OWN_ID_NAMES,
    }
)


@frozen
class Core:
    """What two events with one id have to agree on."""

    type: str
    envelope_id: str | None
    status: str | None
    reason: str | None


@frozen
class Keys:
    """Every key that an event claims within its account."""

    own: str | None
    once: str | None
    content: str | None

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(key for key in (self.own, self.once, self.content) if key is not None)


@frozen
class Known:
    """An event that was recorded before and owns a key; `content` is its digest, if kept."""

    event_id: UUID
    core: Core
    content: str | None


class Relation(StrEnum):
    """What an event is to those that are known."""

    NEW = "new"
    DUPLICATE = "duplicate"
    ALIAS = "alias"
    CONFLICT = "conflict"


def core_of(event: Event) -> Core:
    """Return the part of an event that a duplicate must repeat."""
    return Core(event.type, event.envelope_id, event.status or event.status_word, event.reason)


def kept_of(core: Core) -> Core:
    """Return what is kept of a core once its envelope is erased."""
    return Core(core.type, core.envelope_id, erased_status(core.status), erased_text(core.reason))


def keys_of(event: Event, body: bytes) -> Keys:
    """Return the keys that `event`, read from `body`, claims."""
    own = f"id:{event.atlas_event_id}" if event.atlas_event_id is not None else None
    if event.type in ONCE_TYPES:
        # The type stands last and holds no colon, so an envelope id may hold any.
        return Keys(own, f"once:{event.envelope_id}:{event.type}", None)
    return Keys(own, None, f"body:{RECIPE}:{content_digest(body)}")


def quarantine_key(body: bytes) -> str:
    """Return the only key of a body that could not be understood."""
    return f"raw:{hashlib.sha256(body).hexdigest()}"


def content_digest(body: bytes) -> str:
    """Return the digest of what `body` says, however it is spaced, ordered or escaped.

    Left out are the event's own id and what differs from one delivery to the next.
    Numbers count as written: 1 and 1.0 may be two things to whoever wrote them.
    """
    top: dict[str, Json] = _decode(body.decode())
    _strip(top)
    return hashlib.sha256(_encode(top).encode("ascii")).hexdigest()


def needs_content(keys: Keys, owners: Mapping[str, Known]) -> Known | None:
    """Return the known event whose content decides, if anything but keys has to be compared."""
    if keys.own is None or keys.own in owners or keys.once is None:
        return None
    return owners.get(keys.once)


def relate(
    event: Event, keys: Keys, owners: Mapping[str, Known], *, content: str | None
) -> tuple[Relation, Known | None]:
    """Decide what `event` is to the owners of its keys.

    `content` is its digest, wanted only where `needs_content` names somebody.
    """
    known = _owner(owners, keys.own) if keys.own is not None else _owner_of_rest(keys, owners)
    if known is not None:
        is_same = _agree(core_of(event), known.core)
        return (Relation.DUPLICATE if is_same else Relation.CONFLICT), known
    return _relate_under_new_id(keys, owners, content)


def _agree(core: Core, known: Core) -> bool:
    """Whether nothing that is still known contradicts; what was erased contradicts nothing."""
    return core == known or (
        (core.type, core.envelope_id) == (known.type, known.envelope_id)
        and known.status in {core.status, ERASED}
        and known.reason in {core.reason, ERASED}
    )


def _number(text: str) -> tuple[int, str]:
    # Every other number is text by then, so a list that starts with a bare 0 is a number.
    return 0, text


_decode = json.JSONDecoder(parse_int=_number, parse_float=_number).decode
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _strip(top: dict[str, Json]) -> None:
    places = places_of(top)
    own_id = heading_of(places).own_id
    for _, place in places:
        for name in place.keys() & _VOLATILE:
            del place[name]
        if own_id is not None and place.get("id") == own_id:
            del place["id"]


def _owner(owners: Mapping[str, Known], key: str | None) -> Known | None:
    return None if key is None else owners.get(key)


def _owner_of_rest(keys: Keys, owners: Mapping[str, Known]) -> Known | None:
    return _owner(owners, keys.once) or _owner(owners, keys.content)


def _relate_under_new_id(
    keys: Keys, owners: Mapping[str, Known], content: str | None
) -> tuple[Relation, Known | None]:
    """Tell an attempt under a new id from another event: by content, and only by content."""
    by_content = _owner(owners, keys.content)
    if by_content is not None:
        return Relation.ALIAS, by_content
    once = _owner(owners, keys.once)
    if once is not None and content is not None and content == once.content:
        return Relation.ALIAS, once
    return Relation.NEW, None
