"""What a claimed delivery is about: its event, the bytes, the envelope as it is now."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.frozen import frozen
from app.store.bulk import Columns
from app.store.dialects import hexes, is_postgresql
from app.store.models import EnvelopeRow, EventRow
from app.store.session import fetch


@frozen
class Content:
    """What a claimed delivery is about, still as the driver gave it: see `decode`."""

    row: Sequence[Any]
    is_postgresql: bool
    event_type: str | None
    fields_status: str | None

    @property
    def account(self) -> str | None:
        """The account of its event, if that is there."""
        account: str | None = self.row[_ACCOUNT]
        return account


_EVENT = Columns(
    EventRow.__table__,  # type: ignore[arg-type]
    [
        "id",
        "type",
        "account",
        "envelope_id",
        "atlas_event_id",
        "occurred_at",
        "received_at",
        "sequence",
        "effect",
        "status",
        "version",
    ],
)
# All but what only the projection of the next event needs.
_ENVELOPE = Columns(
    EnvelopeRow.__table__,  # type: ignore[arg-type]
    [c.name for c in EnvelopeRow.__table__.columns if c.name not in {"marks", "sequence"}],
)
_LATER_IS_DONE = """EXISTS (
    SELECT 1 FROM events following
    JOIN deliveries later ON later.event_id = following.id AND later.callback = d.callback
    WHERE following.account = d.account AND following.envelope_id = d.envelope_id
      AND following.sequence > d.sequence AND later.state = 'done'
)"""
_LOAD = (
    f"SELECT d.id, {_LATER_IS_DONE}, body.body, "
    + ", ".join(f"e.{name}" for name in _EVENT.names)
    + ", "
    + ", ".join(f"v.{name}" for name in _ENVELOPE.names)
    + " FROM deliveries d LEFT JOIN events e ON e.id = d.event_id "
    "LEFT JOIN bodies body ON body.event_id = d.event_id "
    "LEFT JOIN envelopes v ON v.account = d.account AND v.id = d.envelope_id "
)
_LOAD_POSTGRESQL = _LOAD + "WHERE d.id = ANY ($1::uuid[])"
_LOAD_SQLITE = _LOAD + "WHERE d.id IN (SELECT value FROM json_each(?))"

_FIRST_OF_EVENT = 3
_FIRST_OF_ENVELOPE = _FIRST_OF_EVENT + len(_EVENT.names)
_EVENT_TYPE = _FIRST_OF_EVENT + _EVENT.names.index("type")
_ACCOUNT = _FIRST_OF_EVENT + _EVENT.names.index("account")
_FIELDS_STATUS = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("fields_status")
_ENVELOPE_ID = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("id")
_ERASED_AT = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("erased_at")
_TENANT = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("tenant")


async def load(connection: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, Content]:
    """Read what these deliveries are about: event, bytes, envelope, in one query."""
    on_postgresql = is_postgresql(connection)
    query, ask = (
        (_LOAD_POSTGRESQL, (list(ids),)) if on_postgresql else (_LOAD_SQLITE, (hexes(ids),))
    )
    rows = await fetch(connection, query, ask)
    return {
        row[0] if on_postgresql else UUID(row[0]): Content(
            row, on_postgresql, row[_EVENT_TYPE], row[_FIELDS_STATUS]
        )
        for row in rows
    }


@frozen
class Decoded:
    """What a delivery is about, as Python values; the body stays bytes."""

    event: Mapping[str, Any] | None
    tenant: str | None
    body: bytes | None
    is_late: bool
    # A person has had the envelope erased.
    is_erased: bool = False


def decode(content: Content) -> Decoded:
    """Read a row's values; raises whatever a damaged one deserves, so call it in an attempt."""
    row, is_postgresql = content.row, content.is_postgresql
    event = None
    if row[_FIRST_OF_EVENT] is not None:
        values = _EVENT.read(row[_FIRST_OF_EVENT:_FIRST_OF_ENVELOPE], is_postgresql=is_postgresql)
        event = dict(zip(_EVENT.names, values, strict=True))
    is_erased = row[_ERASED_AT] is not None
    return Decoded(event, row[_TENANT], row[2], is_late=bool(row[1]), is_erased=is_erased)


def decode_envelope(content: Content) -> Mapping[str, Any] | None:
    """Read the envelope of a row, if there is one; raises like `decode`."""
    row, is_postgresql = content.row, content.is_postgresql
    if row[_ENVELOPE_ID] is None:
        return None
    values = _ENVELOPE.read(row[_FIRST_OF_ENVELOPE:], is_postgresql=is_postgresql)
    return dict(zip(_ENVELOPE.names, values, strict=True))
