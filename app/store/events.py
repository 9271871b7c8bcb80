"""Events, their bytes, and the identities that make a copy recognisable."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.identity import Core, Known, content_digest
from app.store.bulk import Columns, Insert, dumps
from app.store.models import BodyRow, EventRow, IdentityRow
from app.store.session import fetch

# (account, key): one key of one account.
Claim = tuple[str, str]

COLUMNS = Columns(
    EventRow.__table__,  # type: ignore[arg-type]
    [
        "id",
        "account",
        "envelope_id",
        "type",
        "atlas_event_id",
        "occurred_at",
        "received_at",
        "sequence",
        "effect",
        "status",
        "version",
        "core_status",
        "core_reason",
        "content",
        "reason",
        "degraded",
        "original_id",
        "key_label",
    ],
)
BODIES = Columns(BodyRow.__table__, ["event_id", "body"])  # type: ignore[arg-type]
IDENTITIES = Columns(IdentityRow.__table__, ["account", "key", "event_id"])  # type: ignore[arg-type]

INSERT = Insert(COLUMNS)
INSERT_BODIES = Insert(BODIES)
CLAIM = Insert(IDENTITIES, lenient=True)

_KNOWN = (
    "SELECT i.account, i.key, e.id, e.type, e.envelope_id, e.core_status, e.core_reason, e.content "
    "FROM identities i JOIN events e ON e.id = i.event_id "
)
_POSTGRESQL_KNOWN = (
    _KNOWN + "JOIN unnest($1::text[], $2::text[]) AS wanted (account, key) "
    "ON i.account = wanted.account AND i.key = wanted.key"
)
_SQLITE_WANTED = "SELECT value ->> 0, value ->> 1 FROM json_each(?)"
_SQLITE_KNOWN = _KNOWN + f"WHERE (i.account, i.key) IN ({_SQLITE_WANTED})"


async def claim(connection: AsyncConnection, wanted: Mapping[Claim, UUID]) -> dict[Claim, Known]:
    """Claim each key for its event; give the events that own those claimed before.

    The keys are taken in one order by every writer, so two batches never wait for each
    other crosswise. A key that another transaction is just claiming is waited for.
    """
    rows = [(*key, wanted[key]) for key in sorted(wanted)]
    if connection.dialect.name == "sqlite":
        known = await read_known(connection, wanted)
        await CLAIM.run(connection, [row for row in rows if row[:2] not in known])
        return known
    statement = CLAIM.postgresql + " RETURNING 1"
    claimed = await fetch(connection, statement, IDENTITIES.arrays(rows))
    if len(claimed) == len(rows):
        return {}
    # Read after the wait: a statement of its own sees what was committed meanwhile. It
    # also sees our own new claims, whose events do not exist yet; the join drops them.
    return await read_known(connection, wanted)


async def read_known(connection: AsyncConnection, wanted: Iterable[Claim]) -> dict[Claim, Known]:
    """Give the events that own some of these keys."""
    claims = list(wanted)
    if connection.dialect.name == "sqlite":
        rows = await fetch(connection, _SQLITE_KNOWN, [dumps(claims)])
    else:
        arrays = ([claim[0] for claim in claims], [claim[1] for claim in claims])
        rows = await fetch(connection, _POSTGRESQL_KNOWN, arrays)
    return {(row[0], row[1]): _known(row) for row in rows}


def _known(row: Sequence[Any]) -> Known:
    event_id = row[2] if isinstance(row[2], UUID) else UUID(row[2])
    core = Core(type=row[3], envelope_id=row[4], status=row[5], reason=row[6])
    return Known(event_id=event_id, core=core, content=row[7])


async def repoint(connection: AsyncConnection, owners: Mapping[Claim, UUID]) -> None:
    """Make keys just claimed point to the event that they turned out to belong to."""
    table = IdentityRow.__table__
    for account, key in sorted(owners):
        await connection.execute(
            table.update()  # type: ignore[attr-defined]
            .where(table.c.account == account, table.c.key == key)
            .values(event_id=owners[account, key])
        )


async def disown(connection: AsyncConnection, claims: Iterable[Claim]) -> None:
    """Give up keys just claimed, by an event that turned out to have no right to them."""
    table = IdentityRow.__table__
    for account, key in sorted(claims):
        await connection.execute(
            table.delete().where(table.c.account == account, table.c.key == key)  # type: ignore[attr-defined]
        )


async def add(
    connection: AsyncConnection,
    rows: Sequence[Sequence[Any]],
    bodies: Sequence[tuple[UUID, bytes]],
) -> None:
    """Insert events, as `COLUMNS` orders them, and their bytes."""
    await INSERT.run(connection, rows)
    await INSERT_BODIES.run(connection, bodies)


async def count_copies(
    connection: AsyncConnection, copies: Mapping[UUID, int], *, at: datetime
) -> None:
    """Add to each event the number of copies that came of it."""
    table = EventRow.__table__
    for event_id in sorted(copies):
        await connection.execute(
            table.update()  # type: ignore[attr-defined]
            .where(table.c.id == event_id)
            .values(copies=table.c.copies + copies[event_id], last_copy_at=at)
        )


async def read_content(connection: AsyncConnection, event_id: UUID) -> str | None:
    """Give the content digest of a stored event; it is computed while its bytes are kept.

    Read at once with the bytes: whoever takes these away leaves the digest.
    """
    query = select(EventRow.content, BodyRow.body).where(EventRow.id == event_id)
    joined = query.outerjoin(BodyRow, BodyRow.event_id == EventRow.id)
    row = (await connection.execute(joined)).one_or_none()
    if row is None or row.content is not None or row.body is None:
        return None if row is None else row.content
    return content_digest(row.body)


async def read_body(connection: AsyncConnection, event_id: UUID) -> bytes | None:
    """Give the bytes as received; None if they are pruned, or there is no such event."""
    query = select(BodyRow.body).where(BodyRow.event_id == event_id)
    return (await connection.execute(query)).scalar()


async def get(connection: AsyncConnection, event_id: UUID) -> Row[Any] | None:
    """Give one event."""
    query = select(EventRow.__table__).where(EventRow.id == event_id)
    return (await connection.execute(query)).one_or_none()


async def lock(connection: AsyncConnection, event_id: UUID) -> Row[Any] | None:
    """Give one event, and keep others from changing it until the transaction ends."""
    query = select(EventRow.__table__).where(EventRow.id == event_id).with_for_update()
    return (await connection.execute(query)).one_or_none()


async def restate(connection: AsyncConnection, row: Mapping[str, Any]) -> None:
    """Write down what an event that is stored already has turned out to say and to do."""
    table: Any = EventRow.__table__
    await connection.execute(table.update().where(table.c.id == row["id"]).values(**row))


async def history(
    connection: AsyncConnection, account: str, envelope_id: str
) -> Sequence[Row[Any]]:
    """Give what was said of one envelope, all of it."""
    table = EventRow.__table__
    columns = [table.c[name] for name in ("id", "type", "core_status", "effect", "original_id")]
    query = select(*columns).where(table.c.account == account, table.c.envelope_id == envelope_id)
    return (await connection.execute(query)).all()


async def effects_of(connection: AsyncConnection, ids: Iterable[UUID]) -> dict[UUID, str]:
    """Give what some events did to their envelopes."""
    query = select(EventRow.id, EventRow.effect).where(EventRow.id.in_(list(ids)))
    return {row.id: row.effect for row in await connection.execute(query)}


async def page(
    connection: AsyncConnection,
    *,
    envelope_id: str | None = None,
    event_type: str | None = None,
    effect: str | None = None,
    before: UUID | None = None,
    limit: int = 50,
) -> Sequence[Row[Any]]:
    """Give the newest events that match, newest first; `before` continues a page."""
    query = select(EventRow.__table__).order_by(EventRow.id.desc()).limit(limit)
    if envelope_id is not None:
        query = query.where(EventRow.envelope_id == envelope_id)
    if event_type is not None:
        query = query.where(EventRow.type == event_type)
    if effect is not None:
        query = query.where(EventRow.effect == effect)
    if before is not None:
        query = query.where(EventRow.id < before)
    return (await connection.execute(query)).all()
