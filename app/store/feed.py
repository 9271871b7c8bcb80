"""The change feed: one total order of everything that happened, the same for every reader.

Neither the ids of events nor those of `changes` are the order in which transactions commit,
so a reader who has seen the larger one could miss the smaller. Places in the feed are
given after the commit, by one transaction at a time: nothing ever appears behind a place
that somebody has read. Places have no gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import leases
from app.store.bulk import Columns
from app.store.dialects import SQLITE_NOW, is_postgresql
from app.store.models import ChangeRow, EventRow, FeedRow
from app.store.session import fetch

LEASE = "feed"


class Kind(StrEnum):
    """What an item of the feed tells of."""

    EVENT = "event"
    CORRECTION = "correction"
    ERASURE = "erasure"
    ARCHIVE = "archive"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a reader is: the item read last, and when that was given its place.

    A database that was restored gives places again, at other times: so a reader who was
    ahead of it is told, instead of missing what has the same number now.
    """

    position: int
    at: datetime


@dataclass(frozen=True, slots=True)
class Item:
    """One item; those about no event have neither type nor effect."""

    position: int
    kind: str
    at: datetime
    account: str
    envelope_id: str | None
    event_id: UUID | None
    type: str | None
    atlas_event_id: str | None
    occurred_at: datetime | None
    received_at: datetime | None
    sequence: int | None
    effect: str | None
    status: str | None
    version: int | None
    original_id: UUID | None


_NOTED = Columns(
    ChangeRow.__table__,  # type: ignore[arg-type]
    ["kind", "event_id", "account", "envelope_id"],
)
_FEED = Columns(
    FeedRow.__table__,  # type: ignore[arg-type]
    ["position", "kind", "at", "account", "envelope_id", "event_id"],
)
_EVENT = Columns(
    EventRow.__table__,  # type: ignore[arg-type]
    [
        "type",
        "atlas_event_id",
        "occurred_at",
        "received_at",
        "sequence",
        "effect",
        "status",
        "version",
        "original_id",
    ],
)

_PLACE = Columns(FeedRow.__table__, ["position", "at"])  # type: ignore[arg-type]
_TIME = Columns(ChangeRow.__table__, ["at"])  # type: ignore[arg-type]

_NOTE_POSTGRESQL = (
    f"INSERT INTO changes ({_NOTED.listed}, at) VALUES ($1, $2, $3, $4, statement_timestamp())"
)
_NOTE_SQLITE = f"INSERT INTO changes ({_NOTED.listed}, at) VALUES (?, ?, ?, ?, {SQLITE_NOW})"


async def note(
    connection: AsyncConnection,
    kind: Kind,
    *,
    account: str,
    envelope_id: str | None,
    event_id: UUID | None = None,
) -> None:
    """Note what has happened, in the transaction that does it; a new event is noted by itself.

    Of one envelope's changes this is the order only if its row is locked.
    """
    row = (kind.value, event_id, account, envelope_id)
    if is_postgresql(connection):
        await fetch(connection, _NOTE_POSTGRESQL, row)
    else:
        await fetch(connection, _NOTE_SQLITE, _NOTED.tuples([row])[0])


_FIRST = "(SELECT coalesce(max(position), 0) FROM feed)"
_PLACED = ", ".join(_NOTED.names)
_PLACE_POSTGRESQL = f"""
WITH taken AS (
    DELETE FROM changes WHERE id = ANY (ARRAY(SELECT id FROM changes ORDER BY id LIMIT $1))
    RETURNING id, {_PLACED}
)
INSERT INTO feed (position, {_PLACED}, at)
SELECT {_FIRST} + row_number() OVER (ORDER BY id), {_PLACED}, statement_timestamp() FROM taken
RETURNING position
"""
_PLACE_SQLITE = f"""
INSERT INTO feed (position, {_PLACED}, at)
SELECT {_FIRST} + row_number() OVER (ORDER BY id), {_PLACED}, {SQLITE_NOW}
FROM (SELECT id, {_PLACED} FROM changes ORDER BY id LIMIT ?) AS taken
RETURNING position
"""
_TAKE_SQLITE = "DELETE FROM changes WHERE id IN (SELECT id FROM changes ORDER BY id LIMIT ?)"


async def place(
    connection: AsyncConnection, *, holder: str, span: timedelta, limit: int
) -> int | None:
    """Give what was committed its place, up to `limit` changes; say how many there were.

    None if another process does that just now. Whoever waits for the lease's row reads the
    feed's end only afterwards: that is why the two are statements of their own.
    """
    if await leases.hold(connection, LEASE, holder=holder, span=span) is None:
        return None
    if is_postgresql(connection):
        return len(await fetch(connection, _PLACE_POSTGRESQL, (limit,)))
    placed = await fetch(connection, _PLACE_SQLITE, (limit,))
    await fetch(connection, _TAKE_SQLITE, (limit,))
    return len(placed)


_PENDING = "SELECT at FROM changes ORDER BY id LIMIT 1"


async def pending_since(connection: AsyncConnection) -> datetime | None:
    """Say since when something has been waiting for its place; None if nothing is."""
    rows = await fetch(connection, _PENDING)
    if not rows:
        return None
    moment: datetime = _TIME.read(rows[0], is_postgresql=is_postgresql(connection))[0]
    return moment


_HEAD = "SELECT position, at FROM feed ORDER BY position DESC LIMIT 1"
_AT = "SELECT position, at FROM feed WHERE position = {position}"


async def head(connection: AsyncConnection) -> Place | None:
    """Give the place of the newest item; None while there is none."""
    return _place(connection, await fetch(connection, _HEAD))


async def place_at(connection: AsyncConnection, position: int) -> Place | None:
    """Give the place with this number, if it was given."""
    mark = "$1::int8" if is_postgresql(connection) else "?"
    return _place(connection, await fetch(connection, _AT.format(position=mark), (position,)))


def _place(connection: AsyncConnection, rows: Sequence[Any]) -> Place | None:
    if not rows:
        return None
    return Place(*_PLACE.read(rows[0], is_postgresql=is_postgresql(connection)))


_READ = (
    f"SELECT {', '.join(f'f.{name}' for name in _FEED.names)}, "
    f"{', '.join(f'e.{name}' for name in _EVENT.names)} "
    "FROM feed f LEFT JOIN events e ON e.id = f.event_id "
    "WHERE f.position > {after} ORDER BY f.position LIMIT {limit}"
)
_READ_POSTGRESQL = _READ.format(after="$1::int8", limit="$2::int8")
_READ_SQLITE = _READ.format(after="?", limit="?")


async def read(connection: AsyncConnection, after: int, *, limit: int) -> list[Item]:
    """Give the items behind a position, in their order."""
    on_postgresql = is_postgresql(connection)
    statement = _READ_POSTGRESQL if on_postgresql else _READ_SQLITE
    rows = await fetch(connection, statement, (after, limit))
    split = len(_FEED.names)
    return [
        Item(
            *_FEED.read(row[:split], is_postgresql=on_postgresql),
            *_EVENT.read(row[split:], is_postgresql=on_postgresql),
        )
        for row in rows
    ]
