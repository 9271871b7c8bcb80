"""Envelopes by a text that one of their ids, or an address of a party, begins with."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import lookups, terms
from app.store.dialects import is_postgresql
from app.store.envelope_lists import Filters
from app.store.envelopes import EnvelopeKey
from app.store.list_statements import NO_STATUS
from app.store.session import fetch
from app.store.sight import Sight
from app.store.terms import Term

_LISTED = ", ".join(f"e.{name}" for name in lookups.SHOWN.names)


class Hits(NamedTuple):
    """The rows of one page, in the order of what found them, and where the next one begins."""

    rows: list[Any]
    next: Term | None


async def search(
    connection: AsyncConnection,
    sight: Sight,
    filters: Filters,
    q: str,
    *,
    after: Term | None = None,
    limit: int,
) -> Hits:
    """Give the rows that `q` finds and that fit; one that it finds twice may come again later."""
    found = await terms.find(connection, sight, q, after=after, limit=limit)
    keys = list(dict.fromkeys((term.account, term.envelope_id) for term in found.terms))
    rows = await _of(connection, keys)
    # One may have been renamed or erased since.
    present = [rows[key] for key in keys if key in rows]
    return Hits([row for row in present if _fits(row, filters)], found.next)


def _fits(row: Any, filters: Filters) -> bool:
    if filters.updated_after is not None and row.updated_at <= filters.updated_after:
        return False
    if filters.is_test is not None and bool(row.is_test) is not filters.is_test:
        return False
    if filters.status is not None and (row.status or NO_STATUS) != filters.status:
        return False
    names = ("external_id", "client_reference_id", "tenant")
    return all(getattr(filters, name) in {None, getattr(row, name)} for name in names)


_OF_POSTGRESQL = f"""
SELECT {_LISTED} FROM unnest($1::text[], $2::text[]) AS named (account, id)
JOIN envelopes e ON e.account = named.account AND e.id = named.id
"""
_OF_SQLITE = f"""
SELECT {_LISTED} FROM json_each(?) AS named
CROSS JOIN envelopes e ON e.account = named.value ->> 0 AND e.id = named.value ->> 1
"""


async def _of(connection: AsyncConnection, keys: Sequence[EnvelopeKey]) -> dict[EnvelopeKey, Any]:
    """Give the rows with these keys."""
    if is_postgresql(connection):
        named = ([key[0] for key in keys], [key[1] for key in keys])
        found = await fetch(connection, _OF_POSTGRESQL, named)
    else:
        found = await fetch(connection, _OF_SQLITE, (json.dumps(keys),))
    return {(row.account, row.id): row for row in lookups.read(connection, found)}
