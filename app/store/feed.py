"""The change feed: one total order of everything that happened, the same for every reader.

Neither the ids of events nor those of `changes` are the order in which transactions commit,
so a reader who has seen the larger one could miss the smaller. Places in the feed are
given after the commit, by one transaction at a time: nothing ever appears behind a place
that somebody has read. Places have no gaps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import leases
from app.store.base import in_utc
from app.store.bulk import Columns
from app.store.dialects import SQLITE_NOW, is_postgresql
from app.store.models import ChangeRow, EventRow, FeedRow
from app.store.session import fetch
from app.store.sight import Sight

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
    """One item; one that is no event says by its type what it tells of.

    The columns of an event are those of today. An event in quarantine has no type.
    """

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
    # Of the envelope: whose it is.
    tenant: str | None


_NOTED = Columns(
    ChangeRow.__table__,  # type: ignore[arg-type]
    ["kind", "event_id", "account", "envelope_id"],
)
_FEED = Columns(
    FeedRow.__table__,  # type: ignore[arg-type]
    ["position", "kind", "at", "account", "envelope_id", "event_id"],
)
# What an item says of its event.
EVENT_COLUMNS = (
    "type",
    "atlas_event_id",
    "occurred_at",
    "received_at",
    "sequence",
    "effect",
    "status",
    "version",
    "original_id",
)
_EVENT = Columns(EventRow.__table__, EVENT_COLUMNS)  # type: ignore[arg-type]
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


# Below every id: what happened before there was a feed may be noted below zero.
BEGINNING = -(2**63)


@dataclass(frozen=True, slots=True)
class Floor:
    """An id of `changes` below which nothing waits, if the feed still ends where it did then.

    If it does not, somebody else has given places, or the database was restored: then it
    says nothing.
    """

    id: int
    end: Place | None


@dataclass(frozen=True, slots=True)
class Placed:
    """What one transaction placed: how many changes, the last of them, and the end since then."""

    count: int
    last: int
    end: Place | None
    # Whether the floor that was given held.
    is_floored: bool


_PLACED = ", ".join(_NOTED.names)
# On PostgreSQL a row that is gone stays for as long as any transaction might look at it, and
# is walked over until then: that is what the floor is for.
_PLACE_POSTGRESQL = f"""
WITH taken AS (
    DELETE FROM changes
    WHERE id = ANY (ARRAY(SELECT id FROM changes WHERE id >= $1 ORDER BY id LIMIT $2))
    RETURNING id, {_PLACED}
), placed AS (
    INSERT INTO feed (position, {_PLACED}, at)
    SELECT $3 + row_number() OVER (ORDER BY id), {_PLACED}, statement_timestamp() FROM taken
    RETURNING position
)
SELECT (SELECT count(*) FROM placed), (SELECT max(id) FROM taken), statement_timestamp()
"""
_PLACE_SQLITE = f"""
INSERT INTO feed (position, {_PLACED}, at)
SELECT ?3 + row_number() OVER (ORDER BY id), {_PLACED}, {SQLITE_NOW}
FROM (SELECT id, {_PLACED} FROM changes WHERE id >= ?1 ORDER BY id LIMIT ?2) AS taken
"""
_TAKE_SQLITE = """
DELETE FROM changes WHERE id IN (SELECT id FROM changes WHERE id >= ? ORDER BY id LIMIT ?)
RETURNING id
"""


async def place(
    connection: AsyncConnection,
    *,
    holder: str,
    span: timedelta,
    limit: int,
    floor: Floor | None = None,
) -> Placed | None:
    """Give what was committed its place, up to `limit` changes, in the order of their ids.

    None if another process does that just now. The end of the feed is read by whoever has
    the lease's row already: that is why the two are statements of their own.
    """
    if await leases.hold(connection, LEASE, holder=holder, span=span) is None:
        return None
    end = await head(connection)
    is_floored = floor is None or floor.end == end
    start = floor.id if floor is not None and is_floored else BEGINNING
    count, last, end = await _give(connection, start, limit, end)
    return Placed(count, last, end, is_floored)


async def _give(
    connection: AsyncConnection, start: int, limit: int, end: Place | None
) -> tuple[int, int, Place | None]:
    position = end.position if end is not None else 0
    if is_postgresql(connection):
        rows = await fetch(connection, _PLACE_POSTGRESQL, (start, limit, position))
        count, last, at = rows[0]
        if not count:
            return 0, BEGINNING, end
        return count, last, Place(position + count, in_utc(at))
    await fetch(connection, _PLACE_SQLITE, (start, limit, position))
    taken = await fetch(connection, _TAKE_SQLITE, (start, limit))
    last = max((row[0] for row in taken), default=BEGINNING)
    return len(taken), last, await head(connection)


# Whoever has inserted a change keeps this lock until the end of its transaction.
_WRITERS = """
SELECT DISTINCT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND relation = 'changes'::regclass AND mode = 'RowExclusiveLock'
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


async def writers(connection: AsyncConnection) -> set[str]:
    """Name the transactions that may have made changes which nobody can see yet."""
    if not is_postgresql(connection):
        return set()
    return {row[0] for row in await fetch(connection, _WRITERS)}


_PENDING = "SELECT at FROM changes ORDER BY id LIMIT 1"


async def pending_since(connection: AsyncConnection) -> datetime | None:
    """Say since when something has been waiting for its place; None if nothing is."""
    rows = await fetch(connection, _PENDING)
    if not rows:
        return None
    moment: datetime = _TIME.read(rows[0], is_postgresql=is_postgresql(connection))[0]
    return moment


_LAG_POSTGRESQL = f"""
SELECT extract(epoch FROM statement_timestamp() - at)::float8 FROM changes
WHERE id >= CASE WHEN (SELECT at FROM feed ORDER BY position DESC LIMIT 1) = $2::timestamptz
    THEN $1::int8 ELSE '{BEGINNING}'::int8 END
ORDER BY id LIMIT 1
"""
_LAG_SQLITE = """
SELECT (julianday('now') - julianday(at)) * 86400.0 FROM changes ORDER BY id LIMIT 1
"""


async def lag(connection: AsyncConnection, floor: Floor | None = None) -> timedelta | None:
    """Say for how long the first change without a place has waited; None if there is none."""
    if is_postgresql(connection):
        known = (floor.id, floor.end.at) if floor is not None and floor.end else (BEGINNING, None)
        rows = await fetch(connection, _LAG_POSTGRESQL, known)
    else:
        rows = await fetch(connection, _LAG_SQLITE)
    return timedelta(seconds=max(0.0, rows[0][0])) if rows else None


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


# What is no event of its own carries a type all the same, so that readers can ask for it.
TYPES = {
    Kind.CORRECTION: "receiver.corrected",
    Kind.ERASURE: "receiver.erased",
    Kind.ARCHIVE: "receiver.archived",
}
_TYPE = (
    "CASE f.kind "
    + " ".join(f"WHEN '{kind.value}' THEN '{name}'" for kind, name in TYPES.items())
    + " ELSE e.type END"
)
_SELECT = (
    f"SELECT {', '.join(f'f.{name}' for name in _FEED.names)}, "
    f"{', '.join(_TYPE if name == 'type' else f'e.{name}' for name in _EVENT.names)}, n.tenant "
    "FROM feed f LEFT JOIN events e ON e.id = f.event_id "
    "LEFT JOIN envelopes n ON n.account = f.account AND n.id = f.envelope_id "
    "WHERE f.position > {after} "
)
_READ = _SELECT + "ORDER BY f.position LIMIT {limit}"
_READ_POSTGRESQL = _READ.format(after="$1::int8", limit="$2::int8")
_READ_SQLITE = _READ.format(after="?", limit="?")


async def read(connection: AsyncConnection, after: int, *, limit: int) -> list[Item]:
    """Give the items behind a position, in their order."""
    statement = _READ_POSTGRESQL if is_postgresql(connection) else _READ_SQLITE
    return _items(connection, await fetch(connection, statement, (after, limit)))


def _items(connection: AsyncConnection, rows: Sequence[Any]) -> list[Item]:
    on_postgresql = is_postgresql(connection)
    split = len(_FEED.names)
    return [
        Item(
            *(
                *_FEED.read(row[:split], is_postgresql=on_postgresql),
                *_EVENT.read(row[split:-1], is_postgresql=on_postgresql),
                row[-1],
            )
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Page:
    """Items that somebody asked for, and the position up to which all were looked at."""

    items: list[Item]
    last: int


_FILTERED = (
    _SELECT
    + f"""AND f.position <= {{last}} AND {{of_accounts}}
AND ({{tenant}} IS NULL OR EXISTS (
    SELECT 1 FROM envelopes o
    WHERE o.account = f.account AND o.id = f.envelope_id AND o.tenant = {{tenant}}))
AND ({{types}} IS NULL OR EXISTS (
    SELECT 1 FROM {{patterns}} WHERE pattern IN ('*', {_TYPE})
    OR (substr(pattern, length(pattern) - 1) = '.*'
        AND substr({_TYPE}, 1, length(pattern) - 1) = substr(pattern, 1, length(pattern) - 1))))
ORDER BY f.position LIMIT {{limit}}"""
)
_FILTERED_POSTGRESQL = _FILTERED.format(
    after="$1::int8",
    last="$2::int8",
    of_accounts="($3::text[] IS NULL OR f.account = ANY ($3::text[]))",
    tenant="$4::text",
    types="$5::text[]",
    patterns="unnest($5::text[]) AS pattern",
    limit="$6::int8",
)
_FILTERED_SQLITE = _FILTERED.format(
    after="?1",
    last="?2",
    of_accounts="(?3 IS NULL OR f.account IN (SELECT value FROM json_each(?3)))",
    tenant="?4",
    types="?5",
    patterns="(SELECT value AS pattern FROM json_each(?5))",
    limit="?6",
)


async def read_filtered(
    connection: AsyncConnection,
    after: int,
    *,
    sight: Sight,
    types: Sequence[str] | None,
    limit: int,
    scan: int,
) -> Page:
    """Give those items behind a position that may be seen and are of these types.

    `types` are names, prefixes as `envelope.*`, or `*`, which is everything; None or none
    of them is everything, too. At most `scan` items are looked at: a page that is short or
    empty says how far that was. At the end of the feed that is the end, or `after`.
    """
    end = await head(connection)
    # Places have no gaps, and what is placed later lies behind.
    last = min(after + scan, end.position if end is not None else 0)
    if last <= after:
        return Page([], after)
    accounts: Any = sight.accounts
    wanted: Any = list(types) if types else None
    if is_postgresql(connection):
        statement = _FILTERED_POSTGRESQL
    else:
        statement = _FILTERED_SQLITE
        accounts, wanted = (None if v is None else json.dumps(v) for v in (accounts, wanted))
    rows = await fetch(connection, statement, (after, last, accounts, sight.tenant, wanted, limit))
    items = _items(connection, rows)
    return Page(items, items[-1].position if len(items) == limit else last)
