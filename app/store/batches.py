"""A batch of news in two statements: one that reads what it needs, one that writes it all.

No lock is held between them, and no transaction waits for the client. The second statement
writes everything or nothing: it undoes itself if a key has been claimed, or an envelope has
been made or changed, since the first. For PostgreSQL.

Rows travel as arrays of row types, which a migration has made. An array for each column, as
elsewhere, costs this process and the database several microseconds more for each event.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import deliveries, envelopes, events
from app.store.deliveries import Owed
from app.store.envelopes import EnvelopeKey, Held
from app.store.events import Claim
from app.store.session import fetch

_READ = f"""
SELECT known.keys, {envelopes.LISTED} FROM (
    SELECT count(*) AS keys FROM identities i
    JOIN unnest($1::text[], $2::text[]) AS wanted (account, key)
        ON i.account = wanted.account AND i.key = wanted.key
) AS known LEFT JOIN (
    unnest($3::text[], $4::text[]) AS named (account, id)
    JOIN envelopes e ON e.account = named.account AND e.id = named.id
) ON true
"""


def _rows(kind: str, position: int) -> str:
    return f"unnest(${position}::{kind}[]) AS incoming"


# The counts are compared in the order in which this service takes its locks.
_WRITE = f"""
WITH claimed AS ({events.CLAIM.text(_rows("incoming_identity", 1))} RETURNING 1),
noted AS ({events.INSERT.text(_rows("incoming_event", 2))}),
kept AS ({events.INSERT_BODIES.text(_rows("incoming_body", 3))}),
made AS ({envelopes.inserting(_rows("incoming_envelope", 4))}),
moved AS (
    {envelopes.updating(_rows("incoming_envelope", 5))}
    AND e.version = incoming.version_read RETURNING 1
),
owed AS ({deliveries.enqueuing(_rows("incoming_delivery", 6))})
SELECT insist(
    (SELECT count(*) FROM claimed) = cardinality($1)
    AND (SELECT count(*) FROM made) = cardinality($4)
    AND (SELECT count(*) FROM moved) = cardinality($5)
)
"""


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that one batch writes; of envelopes those that changed."""

    claims: Mapping[Claim, UUID]
    envelopes: Sequence[Held]
    events: Sequence[Sequence[Any]]
    bodies: Sequence[tuple[UUID, bytes]]
    deliveries: Sequence[Owed]


async def read(
    connection: AsyncConnection, claims: Iterable[Claim], keys: Iterable[EnvelopeKey]
) -> dict[EnvelopeKey, Held] | None:
    """Give the envelopes that exist, none of them locked; None if some claims are known."""
    arguments = (*_halves(list(claims)), *_halves(list(keys)))
    rows = await fetch(connection, _READ, arguments)
    if rows[0][0]:
        return None
    found = [row[1:] for row in rows if row[1] is not None]
    return envelopes.by_key(found, is_postgresql=True)


def _halves(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


async def write(connection: AsyncConnection, changes: Changes) -> None:
    """Write all of it, and commit.

    Raises a serialization failure (40001) if anything that it was made of has changed.
    """
    changed = sorted(changes.envelopes, key=attrgetter("key"))
    arguments = (
        [(*claim, changes.claims[claim]) for claim in sorted(changes.claims)],
        events.COLUMNS.tuples(changes.events, is_postgresql=True),
        changes.bodies,
        envelopes.rows(each for each in changed if each.is_new),
        envelopes.rows(each for each in changed if not each.is_new),
        deliveries.numbered(changes.deliveries),
    )
    await fetch(connection, _WRITE, arguments)
