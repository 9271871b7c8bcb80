"""One envelope by its id, as other services ask for it."""

import json
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns
from app.store.dialects import is_postgresql
from app.store.models import EnvelopeRow
from app.store.session import fetch
from app.store.sight import Sight

_FIND = (
    "SELECT {columns} FROM envelopes e WHERE e.account {accounts} AND e.id = {id} "
    "AND ({tenant} IS NULL OR e.tenant = {tenant}) ORDER BY e.account LIMIT 100"
)
# Looked up in each account that may be seen, one by one: no index begins with the id. By
# whether it is PostgreSQL's, and whether every account is seen.
_ACCOUNTS = {
    (True, True): "= ANY (ARRAY(SELECT account FROM keys))",
    (True, False): "= ANY ($3::text[])",
    (False, True): "IN (SELECT account FROM keys)",
    (False, False): "IN (SELECT value FROM json_each(?3))",
}
_MARKS = {True: {"id": "$1::text", "tenant": "$2::text"}, False: {"id": "?1", "tenant": "?2"}}

Statements = Mapping[tuple[bool, bool], str]


def _finding(columns: Sequence[str]) -> Statements:
    listed = ", ".join(f"e.{name}" for name in columns)
    return {
        of: _FIND.format(columns=listed, accounts=accounts, **_MARKS[of[0]])
        for of, accounts in _ACCOUNTS.items()
    }


SHOWN = Columns(
    EnvelopeRow.__table__,  # type: ignore[arg-type]
    [column.name for column in EnvelopeRow.__table__.columns if column.name != "marks"],
)
Shown: Any = namedtuple("Shown", [*SHOWN.names])  # type: ignore[misc]  # noqa: PYI024  # by the table


class Progress(NamedTuple):
    """How far an envelope is, and whose it is."""

    account: str
    status: str | None
    signed_count: int | None
    total: int | None
    next_signer_email: str | None


_FIND_SHOWN = _finding(SHOWN.names)
_FIND_PROGRESS = _finding(Progress._fields)


async def find(connection: AsyncConnection, sight: Sight, envelope_id: str) -> list[Any]:
    """Give the rows with this id that may be seen, one for each account that has it."""
    rows = await _find(connection, _FIND_SHOWN, sight, envelope_id)
    return read(connection, rows)


def read(connection: AsyncConnection, rows: Iterable[Sequence[Any]]) -> list[Any]:
    """Turn what a driver gave for the columns of `SHOWN` into rows with names."""
    on_postgresql = is_postgresql(connection)
    return [Shown._make(SHOWN.read(row, is_postgresql=on_postgresql)) for row in rows]


async def find_progress(
    connection: AsyncConnection, sight: Sight, envelope_id: str
) -> list[Progress]:
    """Give only how far the envelopes with this id are: this is asked more often than all else."""
    rows = await _find(connection, _FIND_PROGRESS, sight, envelope_id)
    return [Progress._make(row) for row in rows]


async def _find(
    connection: AsyncConnection,
    statements: Statements,
    sight: Sight,
    envelope_id: str,
) -> Sequence[Sequence[Any]]:
    on_postgresql, accounts = is_postgresql(connection), sight.accounts
    wanted: tuple[Any, ...] = (envelope_id, sight.tenant)
    if accounts is not None:
        wanted += (accounts if on_postgresql else json.dumps(accounts),)
    return await fetch(connection, statements[on_postgresql, accounts is None], wanted)
