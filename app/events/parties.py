"""Read who has to sign, and tell people apart from one list of them to the next."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Final

from app.events.frozen import frozen
from app.events.reading import Object
from app.events.redaction import Json
from app.events.values import Values, canonical

MAX_PARTIES: Final = 256
MAX_EMAIL: Final = 320
MAX_PARTY_TEXT: Final = 255

PARTY_STATUSES: Final = ("waiting", "pending", "viewed", "declined", "signed")

_STATUS_OF_WORD: Final = {
    **{status: status for status in PARTY_STATUSES},
    "completed": "signed",
}
_RANK: Final = {status: rank for rank, status in enumerate(PARTY_STATUSES)}
_text_of = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


@frozen
class Party:
    """One signer, as far as this event knows."""

    email: str | None = None
    name: str | None = None
    role: str | None = None
    order: int | None = None
    status: str | None = None


Parties = tuple[Party, ...]


def parties_of(values: Values, elements: Json, path: str) -> Parties | None:
    """Return the parties that a list names; an element that is none is dropped."""
    if not isinstance(elements, list):
        values.lose(path)
        return None
    if len(elements) > MAX_PARTIES:
        values.lose(path)
    parties = []
    for index, element in enumerate(elements[:MAX_PARTIES]):
        if isinstance(element, dict):
            parties.append(_party(element, values, path, index))
        else:
            values.lose(path, index)
    return tuple(parties)


def signed_among(parties: Parties) -> int:
    """Return how many of `parties` have signed."""
    return [party.status for party in parties].count("signed")


def keys_of(parties: Parties) -> list[str]:
    """Return a key for every party: its e-mail, else its order, else its position."""
    keys: list[str] = []
    seen: dict[str, int] = {}
    for position, party in enumerate(parties):
        if party.email is not None:
            key = f"@{party.email.casefold()}"
        else:
            key = f"#{party.order}" if party.order is not None else f"[{position}]"
        times = seen[key] = seen.get(key, 0) + 1
        # One person may sign twice, in two roles.
        keys.append(key if times == 1 else f"{key} {times}")
    return keys


def furthest_of(known: Mapping[str, str], keys: Sequence[str], parties: Parties) -> dict[str, str]:
    """Return the furthest status of everybody: of those that were `known`, and of `parties`."""
    furthest = dict(known)
    for key, party in zip(keys, parties, strict=True):
        status = party.status
        if status is not None and _rank_of(status) > _rank_of(furthest.get(key)):
            furthest[key] = status
    return furthest


def _rank_of(status: str | None) -> int:
    # One that is not known here was stored by a later release, and must not go back.
    return -1 if status is None else _RANK.get(status, len(_RANK))


def raised(parties: Parties, keys: Sequence[str], furthest: Mapping[str, str]) -> Parties:
    """Return `parties` with the furthest status that each of them ever had."""
    return tuple(
        [
            party
            if party.status == furthest.get(key)
            else Party(party.email, party.name, party.role, party.order, furthest.get(key))
            for key, party in zip(keys, parties, strict=True)
        ]
    )


def text_of(parties: Parties) -> str:
    """Return who `parties` are, as text; what they have done is left out."""
    return _text_of([[party.email, party.name, party.role, party.order] for party in parties])


def next_signer(parties: Parties) -> str | None:
    """Return the e-mail of the first in line who has neither signed nor declined."""
    waiting = [party for party in parties if party.status not in ("signed", "declined")]
    return min(waiting, key=_place_in_line).email if waiting else None


def _party(element: Object, values: Values, path: str, index: int) -> Party:
    get = element.get
    # No `or`: the first in line may have the order 0.
    role, order = get("role"), get("order")
    if role is None:
        role = _first(element, "role_name", "roleName")
    if order is None:
        order = _first(element, "orderIndex", "order_index")
    return Party(
        values.text(get("email"), MAX_EMAIL, path, index, ".email"),
        values.text(get("name"), MAX_PARTY_TEXT, path, index, ".name"),
        values.text(role, MAX_PARTY_TEXT, path, index, ".role"),
        values.number(order, path, index, ".order"),
        _status_of(element, values, path, index),
    )


def _first(element: Object, *names: str) -> Json:
    for name in names:
        value = element.get(name)
        if value is not None:
            return value
    return None


def _status_of(element: Object, values: Values, path: str, index: int) -> str | None:
    word = element.get("status")
    status = canonical(_STATUS_OF_WORD, word) if type(word) is str else None
    if status is None and word is not None:
        values.lose(path, index, ".status")
    if status == "signed" or _first(element, "signed_at", "signedAt"):
        return "signed"
    return "declined" if _first(element, "declined_at", "declinedAt") else status


def _place_in_line(party: Party) -> float:
    # Who has no place comes last, and `min` keeps the order of the list among equals.
    return math.inf if party.order is None else party.order
