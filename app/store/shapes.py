"""What the bodies of each type look like: every trait that was ever seen, and when first."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns, Insert
from app.store.dialects import is_postgresql
from app.store.models import ShapeRow
from app.store.session import fetch
from app.store.sight import Sight

# The kind of what is noted of a type itself, and its two words: seen for the first time, and
# seen so often that what is new from then on is drift.
TYPE, SEEN, LEARNED = "type", "seen", "learned"


class Known(NamedTuple):
    """One trait of one type."""

    type: str
    kind: str
    path: str


class Shape(NamedTuple):
    """A trait as it is shown; `is_drift` if its type had been learned before."""

    type: str
    kind: str
    path: str
    first_seen_at: datetime
    event_id: UUID | None
    is_drift: bool


# A trait, when it was seen first, and in which event.
Fresh = tuple[str, str, str, datetime, UUID]

_COLUMNS = Columns(
    ShapeRow.__table__,  # type: ignore[arg-type]
    ["type", "kind", "path", "first_seen_at", "event_id"],
)
_insert = Insert(_COLUMNS, lenient=True)
_RETURNING = " RETURNING type, kind, path"
_ALL = "SELECT type, kind, path FROM shapes ORDER BY type, kind, path LIMIT {limit}"


async def read_known(connection: AsyncConnection, *, limit: int) -> list[Known]:
    """Give all that is known, up to a number."""
    mark = "$1::int8" if is_postgresql(connection) else "?"
    return [Known(*row) for row in await fetch(connection, _ALL.format(limit=mark), (limit,))]


async def add(connection: AsyncConnection, fresh: Sequence[Fresh]) -> set[Known]:
    """Write down traits; give those that nobody had written down before."""
    if is_postgresql(connection):
        statement = _insert.postgresql + _RETURNING
        return {Known(*row) for row in await fetch(connection, statement, _COLUMNS.arrays(fresh))}
    added = set()
    for row in _COLUMNS.tuples(fresh):
        said = await fetch(connection, _insert.one_of_sqlite + _RETURNING, row)
        added |= {Known(*each) for each in said}
    return added


# By when the event came, not by when it was looked at: many are looked at in one moment.
_IS_DRIFT = """s.kind <> 'type' AND s.event_id > (
        SELECT l.event_id FROM shapes l
        WHERE l.type = s.type AND l.kind = 'type' AND l.path = 'learned'
    )"""
_LIST = f"""
SELECT s.type, s.kind, s.path, s.first_seen_at, s.event_id,
    coalesce({_IS_DRIFT}, false),
    (SELECT e.account FROM events e WHERE e.id = s.event_id),
    (
        SELECT v.tenant FROM events e
        JOIN envelopes v ON v.account = e.account AND v.id = e.envelope_id
        WHERE e.id = s.event_id
    )
FROM shapes s WHERE (s.type, s.kind, s.path) > ({{after}}) {{of_type}}
ORDER BY s.type, s.kind, s.path LIMIT {{limit}}
"""
_LIST_POSTGRESQL = {
    is_typed: _LIST.format(
        after="$1::text, $2::text, $3::text",
        of_type="AND s.type = $5::text" if is_typed else "",
        limit="$4::int8",
    )
    for is_typed in (True, False)
}
_LIST_SQLITE = {
    is_typed: _LIST.format(
        after="?1, ?2, ?3", of_type="AND s.type = ?5" if is_typed else "", limit="?4"
    )
    for is_typed in (True, False)
}
_FIRST = Known("", "", "")


async def page(
    connection: AsyncConnection,
    sight: Sight,
    *,
    of_type: str | None = None,
    after: Known | None = None,
    limit: int,
) -> list[Shape]:
    """Give what is known behind a place, in its order.

    Names are nobody's secret; which event showed them is told only to who may see that.
    """
    on_postgresql = is_postgresql(connection)
    statements = _LIST_POSTGRESQL if on_postgresql else _LIST_SQLITE
    arguments = (*(after or _FIRST), limit, *([] if of_type is None else [of_type]))
    rows = await fetch(connection, statements[of_type is not None], arguments)
    found = []
    for row in rows:
        of, kind, path, at, event_id = _COLUMNS.read(row[:5], is_postgresql=on_postgresql)
        is_drift, account, tenant = row[5:]
        shown = event_id if _is_seen(sight, account, tenant) else None
        found.append(Shape(of, kind, path, at, shown, bool(is_drift)))
    return found


def _is_seen(sight: Sight, account: str | None, tenant: str | None) -> bool:
    of_account = sight.accounts is None or account in sight.accounts
    return of_account and (sight.tenant is None or tenant == sight.tenant)
