"""The bytes of many events at once."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns
from app.store.dialects import hexes, is_postgresql
from app.store.models import BodyRow
from app.store.session import fetch

# No body is longer than what the door takes.
_ANY_LENGTH = 2**31 - 1

_BODIES = Columns(BodyRow.__table__, ["event_id", "body"])  # type: ignore[arg-type]
_READ_POSTGRESQL = (
    "SELECT event_id, body FROM bodies WHERE event_id = ANY ($1::uuid[]) AND length(body) <= $2"
)
_READ_SQLITE = (
    "SELECT event_id, body FROM bodies "
    "WHERE event_id IN (SELECT value FROM json_each(?)) AND length(body) <= ?"
)


async def read(
    connection: AsyncConnection, ids: Sequence[UUID], *, longest: int = _ANY_LENGTH
) -> dict[UUID, bytes]:
    """Give the bytes of these events, as far as they are kept and no longer than that."""
    on_postgresql = is_postgresql(connection)
    if on_postgresql:
        rows = await fetch(connection, _READ_POSTGRESQL, (list(ids), longest))
    else:
        rows = await fetch(connection, _READ_SQLITE, (hexes(ids), longest))
    return dict(_BODIES.read(row, is_postgresql=on_postgresql) for row in rows)
