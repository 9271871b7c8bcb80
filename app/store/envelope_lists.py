"""Envelopes in the order of their latest change, page by page, by what they have in common.

A list goes along one index, that of the filter that leaves least. Whatever else is asked for
is looked at row by row, and for a bounded number of rows a page: so a page may be short, or
empty, although there is a next one.
"""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import lookups
from app.store.base import time_to_text
from app.store.bulk import Columns
from app.store.dialects import is_postgresql
from app.store.list_statements import (
    BOUNDS,
    COMPARED,
    IN_ORDER,
    INDEXED,
    NO_STATUS,
    PAGES,
    Way,
)
from app.store.models import EnvelopeRow
from app.store.session import fetch
from app.store.sight import Sight


class Place(NamedTuple):
    """Where a list is: the key of the row that was looked at last."""

    updated_at: datetime
    account: str
    id: str


FIRST = Place(datetime.min.replace(tzinfo=UTC), "", "")
LAST = Place(datetime.max.replace(tzinfo=UTC), "", "")
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Filters:
    """What envelopes must have in common; None is no matter.

    With `updated_after` the list goes forward from there, and backward otherwise.
    """

    external_id: str | None = None
    client_reference_id: str | None = None
    tenant: str | None = None
    status: str | None = None
    is_test: bool | None = None
    updated_after: datetime | None = None


class Page(NamedTuple):
    """The rows of one page, and where the next one begins: None behind the last."""

    rows: list[Any]
    next: Place | None


_PLACE = Columns(EnvelopeRow.__table__, Place._fields)  # type: ignore[arg-type]
_read_compared = attrgetter(*COMPARED)


async def page(
    connection: AsyncConnection,
    sight: Sight,
    filters: Filters,
    *,
    after: Place | None = None,
    limit: int,
) -> Page:
    """Give the next rows that fit and may be seen, the latest change first, or the earliest.

    Wants a transaction that is not split.
    """
    narrowed = _narrowed(filters, sight)
    if narrowed is None or sight.accounts == ():
        return Page([], None)
    if is_postgresql(connection):
        await fetch(connection, IN_ORDER)
    walk = _Walk(connection, narrowed, sight)
    start = after or walk.start
    # Looked up first: what changes between the two is then not left out.
    bound = await walk.bound(start) if walk.is_filtering else None
    rows = await walk.rows(start, bound or walk.end, limit + 1)
    if len(rows) > limit:
        last = rows[limit - 1]
        return Page(rows[:limit], Place(last.updated_at, last.account, last.id))
    return Page(rows, bound)


def _narrowed(filters: Filters, sight: Sight) -> Filters | None:
    """Add the one tenant that is seen; None if nothing can fit."""
    if sight.tenant is None:
        return filters
    return replace(filters, tenant=sight.tenant) if filters.tenant in {None, sight.tenant} else None


class _Walk:
    """One way along one index."""

    def __init__(self, connection: AsyncConnection, filters: Filters, sight: Sight) -> None:
        self._connection = connection
        self._filters = filters
        self._accounts = sight.accounts
        self._on_postgresql = is_postgresql(connection)
        self._index = _index_for(filters)
        is_forward = filters.updated_after is not None
        self._way: Way = (self._index, is_forward, self._on_postgresql)
        self.start, self.end = LAST, FIRST
        if filters.updated_after is not None:
            self.start, self.end = _behind(filters.updated_after), LAST

    @property
    def is_filtering(self) -> bool:
        """Whether rows of the index may be unwanted."""
        asked = sum(value is not None for value in _read_compared(self._filters))
        return self._accounts is not None or asked > (self._index != "updated_at")

    async def bound(self, after: Place) -> Place | None:
        """Give the last row that this page may look at; None if the end comes before."""
        name = INDEXED[self._index].value
        places = (*self._written(after), *self._written(self.end))
        wanted = (*places, *([getattr(self._filters, name)] if name else []))
        found = await fetch(self._connection, BOUNDS[self._way], wanted)
        if not found:
            return None
        return Place(*_PLACE.read(found[0], is_postgresql=self._on_postgresql))

    async def rows(self, after: Place, until: Place, limit: int) -> list[Any]:
        """Give the rows behind a place and up to another that are wanted."""
        accounts: Any = self._accounts
        if accounts is not None and not self._on_postgresql:
            accounts = json.dumps(accounts)
        places = (*self._written(after), *self._written(until))
        wanted = (*places, *_read_compared(self._filters), accounts, limit)
        found = await fetch(self._connection, PAGES[self._way], wanted)
        return lookups.read(self._connection, found)

    def _written(self, place: Place) -> tuple[Any, ...]:
        if self._on_postgresql:
            return place
        return (time_to_text(place.updated_at), place.account, place.id)


def _index_for(filters: Filters) -> str:
    for name in ("external_id", "client_reference_id", "tenant"):
        if getattr(filters, name) is not None:
            return name
    if filters.status is not None:
        return "no_status" if filters.status == NO_STATUS else "status"
    return "is_test" if filters.is_test else "updated_at"


def _behind(moment: datetime) -> Place:
    """Give the place before everything that changed later."""
    return Place(min(moment, LAST.updated_at - _TICK) + _TICK, "", "")
