"""Everything that may hold a text from outside, page by page, for whoever looks for one text.

No index answers where an address stands in a body, so every row is looked at, in the order of
its key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, func, literal, null, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.models import (
    AttemptRow,
    AuditRow,
    BodyRow,
    DeliveryRow,
    EnvelopeRow,
    EventRow,
    ShapeRow,
    TermRow,
)

_envelopes: Any = EnvelopeRow.__table__
_events: Any = EventRow.__table__
_bodies: Any = BodyRow.__table__
_deliveries: Any = DeliveryRow.__table__
_attempts: Any = AttemptRow.__table__
_audit: Any = AuditRow.__table__
_shapes: Any = ShapeRow.__table__
_terms: Any = TermRow.__table__
_NOTHING: Any = null()


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its key, whose it is, and every text in it."""

    key: tuple[Any, ...]
    account: str | None
    envelope_id: str | None
    # Of an event, its type.
    type: str | None
    texts: tuple[Any, ...]
    # Names of fields, joined by dots.
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One table that is looked through: by which key, whose its rows are, and where texts are."""

    name: str
    source: Any
    key: tuple[Any, ...]
    account: Any
    envelope_id: Any
    texts: tuple[Any, ...]
    paths: Any = _NOTHING
    type: Any = _NOTHING


_WITH_BODIES = _events.outerjoin(_bodies, _bodies.c.event_id == _events.c.id)
_WITH_DELIVERIES = _attempts.outerjoin(_deliveries, _deliveries.c.id == _attempts.c.delivery_id)
EVENTS: Final = Place(
    "events",
    _WITH_BODIES,
    (_events.c.id,),
    _events.c.account,
    _events.c.envelope_id,
    (_bodies.c.body, _events.c.core_status, _events.c.core_reason),
    _events.c.degraded,
    _events.c.type,
)
# What callers and Atlas wrote; ids, status and times are no texts, and stay.
ENVELOPES: Final = Place(
    "envelopes",
    _envelopes,
    (_envelopes.c.account, _envelopes.c.id),
    _envelopes.c.account,
    _envelopes.c.id,
    tuple(
        _envelopes.c[name]
        for name in (
            "parties",
            "next_signer_email",
            "metadata",
            "external_id",
            "client_reference_id",
            "status_word",
            "send_error",
            "detection_error",
            "fields_status",
            "extraction",
            "decline_reason",
            "void_reason",
            "marks",
        )
    ),
)
TERMS: Final = Place(
    "terms",
    _terms,
    (_terms.c.term, _terms.c.account, _terms.c.envelope_id),
    _terms.c.account,
    _terms.c.envelope_id,
    (_terms.c.term,),
)
DELIVERIES: Final = Place(
    "deliveries",
    _deliveries,
    (_deliveries.c.id,),
    _deliveries.c.account,
    _deliveries.c.envelope_id,
    (_deliveries.c.last_error,),
)
ATTEMPTS: Final = Place(
    "attempts",
    _WITH_DELIVERIES,
    (_attempts.c.delivery_id, _attempts.c.token),
    _deliveries.c.account,
    _deliveries.c.envelope_id,
    (_attempts.c.error,),
)
ACTS: Final = Place("audit", _audit, (_audit.c.id,), _NOTHING, _NOTHING, (_audit.c.details,))
SHAPES: Final = Place(
    "shapes",
    _shapes,
    (_shapes.c.type, _shapes.c.kind, _shapes.c.path),
    _NOTHING,
    _NOTHING,
    (),
    _shapes.c.path,
)
PLACES: Final = (EVENTS, ENVELOPES, TERMS, DELIVERIES, ATTEMPTS, ACTS, SHAPES)


async def count(connection: AsyncConnection, place: Place) -> int:
    """Count the rows of a place."""
    table = place.key[0].table
    return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


async def page(
    connection: AsyncConnection, place: Place, *, after: Sequence[Any] | None, limit: int
) -> list[Row]:
    """Give the next rows of a place behind a key, in the order of their keys."""
    about = (place.account, place.envelope_id, place.type, place.paths)
    columns = (*place.key, *about, *place.texts)
    labelled = [column.label(f"c{number}") for number, column in enumerate(columns)]
    query = select(*labelled).select_from(place.source).order_by(*place.key).limit(limit)
    if after is not None:
        query = query.where(_is_behind(place.key, after))
    return [_row(row, len(place.key)) for row in (await connection.execute(query)).all()]


def _row(row: Sequence[Any], ends: int) -> Row:
    account, envelope_id, event_type, paths, *texts = row[ends:]
    listed = [paths] if isinstance(paths, str) else paths or []
    return Row(tuple(row[:ends]), account, envelope_id, event_type, tuple(texts), tuple(listed))


def _is_behind(key: Sequence[Any], after: Sequence[Any]) -> ColumnElement[bool]:
    place = [literal(value, column.type) for column, value in zip(key, after, strict=True)]
    is_behind: ColumnElement[bool] = tuple_(*key) > tuple_(*place)
    return is_behind
