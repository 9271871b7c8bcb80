"""What envelopes are computed from anew: their rows, and what was said of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.lifecycle import Envelope
from app.events.payload import Party
from app.store.bulk import Columns, dumps
from app.store.dialects import is_postgresql
from app.store.envelopes import EnvelopeKey
from app.store.models import AuditRow, EnvelopeRow, EventRow
from app.store.session import fetch

_DECIDED = tuple(field.name for field in fields(Envelope))
_envelopes: Any = EnvelopeRow.__table__
_audit: Any = AuditRow.__table__


@dataclass(frozen=True, slots=True)
class Live:
    """An envelope as it stands in its row."""

    key: EnvelopeKey
    envelope: Envelope
    version: int
    is_erased: bool


@dataclass(frozen=True, slots=True)
class Said:
    """One event of an envelope, as far as it says when and how it was applied."""

    id: UUID
    account: str
    envelope_id: str
    type: str
    effect: str
    original_id: UUID | None
    sequence: int | None
    version: int | None
    core_status: str | None
    received_at: datetime
    key_label: str | None


_SAID = Columns(EventRow.__table__, [field.name for field in fields(Said)])  # type: ignore[arg-type]

_HISTORY = f"SELECT {', '.join(f'e.{name}' for name in _SAID.names)} FROM "
_HISTORY_POSTGRESQL = (
    _HISTORY + "unnest($1::text[], $2::text[]) AS wanted (account, envelope_id) "
    "JOIN events e ON e.account = wanted.account AND e.envelope_id = wanted.envelope_id"
)
_HISTORY_SQLITE = (
    _HISTORY + "json_each(?) AS wanted CROSS JOIN events e "
    "ON e.account = wanted.value ->> 0 AND e.envelope_id = wanted.value ->> 1"
)
# From one account to the next by the index: there are few of them, and many envelopes.
_ACCOUNTS = """
WITH RECURSIVE accounts (account) AS (
    SELECT min(account) FROM envelopes
    UNION ALL
    SELECT (SELECT min(e.account) FROM envelopes e WHERE e.account > accounts.account)
    FROM accounts WHERE accounts.account IS NOT NULL
)
SELECT account FROM accounts WHERE account IS NOT NULL
"""


async def count(connection: AsyncConnection, account: str | None) -> int:
    """Count the envelopes, of one account or of all."""
    query = select(func.count()).select_from(_envelopes)
    if account is not None:
        query = query.where(_envelopes.c.account == account)
    return int((await connection.execute(query)).scalar_one())


async def page(
    connection: AsyncConnection, after: EnvelopeKey, *, account: str | None, limit: int
) -> list[Live]:
    """Give the envelopes behind a place, in the order of their keys."""
    columns = (_envelopes.c.account, _envelopes.c.id)
    query = select(_envelopes).where(tuple_(*columns) > tuple_(*after))
    if account is not None:
        query = query.where(_envelopes.c.account == account)
    found = await connection.execute(query.order_by(*columns).limit(limit))
    return [_live(row) for row in found]


async def find(connection: AsyncConnection, envelope_id: str, account: str | None) -> list[Live]:
    """Give the envelopes with this id, in one account or in all."""
    if account is None:
        accounts = [row[0] for row in await fetch(connection, _ACCOUNTS)]
    else:
        accounts = [account]
    query = select(_envelopes).where(
        _envelopes.c.account.in_(accounts), _envelopes.c.id == envelope_id
    )
    return [_live(row) for row in await connection.execute(query.order_by(_envelopes.c.account))]


def _live(row: Row[Any]) -> Live:
    said = row._mapping  # noqa: SLF001  # SQLAlchemy's public way
    decided = {name: said[name] for name in _DECIDED}
    if decided["parties"] is not None:
        decided["parties"] = tuple(Party(**party) for party in decided["parties"])
    return Live(
        key=(row.account, row.id),
        envelope=Envelope(**decided),
        version=row.version,
        is_erased=row.erased_at is not None,
    )


async def histories(
    connection: AsyncConnection, keys: Sequence[EnvelopeKey]
) -> dict[EnvelopeKey, list[Said]]:
    """Give what was said of each of these envelopes, in no order."""
    on_postgresql = is_postgresql(connection)
    if on_postgresql:
        wanted = ([key[0] for key in keys], [key[1] for key in keys])
        rows = await fetch(connection, _HISTORY_POSTGRESQL, wanted)
    else:
        rows = await fetch(connection, _HISTORY_SQLITE, (dumps(keys),))
    found: dict[EnvelopeKey, list[Said]] = {key: [] for key in keys}
    for row in rows:
        said = Said(*_SAID.read(row, is_postgresql=on_postgresql))
        found[said.account, said.envelope_id].append(said)
    return found


async def effects(connection: AsyncConnection, ids: Iterable[UUID]) -> Sequence[Row[Any]]:
    """Give what these events did, to which envelope, and what they contradict."""
    table = EventRow.__table__
    columns = [table.c[name] for name in ("id", "envelope_id", "effect", "original_id")]
    return (await connection.execute(select(*columns).where(table.c.id.in_(list(ids))))).all()


async def accepted_at(connection: AsyncConnection, ids: Iterable[UUID]) -> Mapping[UUID, datetime]:
    """Give when the word of these events was taken by a person, as the audit says it."""
    subjects = {f"event:{id_}": id_ for id_ in ids}
    query = select(_audit.c.subject, _audit.c.at).where(
        _audit.c.subject.in_(list(subjects)), _audit.c.action == "event.accepted"
    )
    return {subjects[row.subject]: row.at for row in await connection.execute(query)}
