"""Envelope rows: locked together, projected elsewhere, written back together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import AppError
from app.events.lifecycle import Envelope
from app.events.payload import Party
from app.store.bulk import Columns, RowsOfSqlite, dumps
from app.store.models import EnvelopeRow
from app.store.session import fetch

# (account, envelope id)
EnvelopeKey = tuple[str, str]

_DECIDED = tuple(each.name for each in fields(Envelope))
_PARTIES = _DECIDED.index("parties")
_PARTY = tuple(each.name for each in fields(Party))
_decided = attrgetter(*_DECIDED)
_party = attrgetter(*_PARTY)
_OWN = ("account", "id", "version", "sequence", "first_seen_at", "updated_at", "erased_at")
COLUMNS = Columns(EnvelopeRow.__table__, [*_OWN, *_DECIDED])  # type: ignore[arg-type]
_CHANGED = (*_OWN[2:4], "updated_at", *_DECIDED)

LISTED = ", ".join(f"e.{name}" for name in COLUMNS.names)
_POSTGRESQL_WAIT = (
    f"SELECT {LISTED} FROM envelopes e "
    "JOIN unnest($1::text[], $2::text[]) AS wanted (account, id) "
    "ON e.account = wanted.account AND e.id = wanted.id "
    "ORDER BY e.account, e.id FOR UPDATE OF e"
)
_POSTGRESQL_LOCK = f"{_POSTGRESQL_WAIT} SKIP LOCKED"
_SQLITE_LOCK = (
    f"SELECT {LISTED} FROM envelopes e "
    "WHERE (e.account, e.id) IN (SELECT value ->> 0, value ->> 1 FROM json_each(?))"
)


def inserting(incoming: str) -> str:
    """Write the statement that makes rows, for PostgreSQL; `incoming` is where they come from."""
    return (
        f"INSERT INTO envelopes ({COLUMNS.listed}) SELECT {COLUMNS.selected} "
        f"FROM {incoming} ON CONFLICT DO NOTHING RETURNING account, id"
    )


def updating(incoming: str) -> str:
    """Write the statement that changes rows, likewise."""
    pairs = zip(COLUMNS.names, COLUMNS.selected.split(", "), strict=True)
    changes = ", ".join(f"{name} = {value}" for name, value in pairs if name in _CHANGED)
    return (
        f"UPDATE envelopes e SET {changes} FROM {incoming} "
        "WHERE e.account = incoming.account AND e.id = incoming.id"
    )


_POSTGRESQL_INSERT = inserting(COLUMNS.unnested)
_POSTGRESQL_UPDATE = updating(COLUMNS.unnested)
SQLITE_WRITE = RowsOfSqlite(
    f"INSERT INTO envelopes ({COLUMNS.listed})",
    f"({', '.join('?' for _ in COLUMNS.names)})",
    "ON CONFLICT (account, id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _CHANGED),
)


class EnvelopesBusy(AppError):
    """Somebody holds some of these rows, or has just made them: try without them."""

    def __init__(self, keys: Iterable[EnvelopeKey]) -> None:
        super().__init__("envelopes are locked by somebody else")
        self.keys = frozenset(keys)


@dataclass(slots=True)
class Held:
    """One envelope row as it was read, and as it is to be written.

    Nobody else changes it meanwhile: it is locked, or is written only if its version is still
    the one that was read.
    """

    key: EnvelopeKey
    envelope: Envelope
    version: int
    sequence: int
    first_seen_at: datetime
    updated_at: datetime
    # Set once a person has had it erased: of what comes later, next to nothing is kept.
    erased_at: datetime | None = None
    is_new: bool = False
    is_changed: bool = False
    version_read: int = field(init=False)

    def __post_init__(self) -> None:
        self.version_read = self.version


async def lock(connection: AsyncConnection, keys: Iterable[EnvelopeKey]) -> dict[EnvelopeKey, Held]:
    """Lock the rows that exist and that nobody holds; never wait for one that is held."""
    return await _lock(connection, keys, _POSTGRESQL_LOCK)


async def wait(connection: AsyncConnection, keys: Iterable[EnvelopeKey]) -> dict[EnvelopeKey, Held]:
    """Lock the rows that exist; wait for those that are held, for as long as the session may."""
    return await _lock(connection, keys, _POSTGRESQL_WAIT)


async def _lock(
    connection: AsyncConnection, keys: Iterable[EnvelopeKey], on_postgresql: str
) -> dict[EnvelopeKey, Held]:
    wanted = sorted(keys)
    if not wanted:
        return {}
    is_postgresql = connection.dialect.name != "sqlite"
    if is_postgresql:
        arrays = ([key[0] for key in wanted], [key[1] for key in wanted])
        rows = await fetch(connection, on_postgresql, arrays)
    else:
        rows = await fetch(connection, _SQLITE_LOCK, [dumps(wanted)])
    return by_key(rows, is_postgresql=is_postgresql)


def by_key(rows: Iterable[Sequence[Any]], *, is_postgresql: bool) -> dict[EnvelopeKey, Held]:
    """Make of rows, with the columns of `LISTED`, what can be projected."""
    held = [_held(COLUMNS.read(row, is_postgresql=is_postgresql)) for row in rows]
    return {each.key: each for each in held}


def _held(row: Sequence[Any]) -> Held:
    account, envelope_id, version, sequence, first_seen_at, updated_at, erased_at = row[: len(_OWN)]
    return Held(
        key=(account, envelope_id),
        envelope=_envelope(row[len(_OWN) :]),
        version=version,
        sequence=sequence,
        first_seen_at=first_seen_at,
        updated_at=updated_at,
        erased_at=erased_at,
    )


def _envelope(values: Sequence[Any]) -> Envelope:
    decided = list(values)
    parties = decided[_PARTIES]
    if parties is not None:
        decided[_PARTIES] = tuple(Party(**party) for party in parties)
    return Envelope(*decided)


async def write(connection: AsyncConnection, held: Iterable[Held]) -> None:
    """Write the rows that changed.

    Raises `EnvelopesBusy` if a row that was not to be seen is there after all: held by
    somebody, or just made by another replica. The transaction must then be rolled back.
    """
    changed = sorted((h for h in held if h.is_changed), key=lambda h: h.key)
    if connection.dialect.name == "sqlite":
        if changed:
            await SQLITE_WRITE.run(connection, tuples(changed))
        return
    await _insert(connection, [h for h in changed if h.is_new])
    if known := [h for h in changed if not h.is_new]:
        await fetch(connection, _POSTGRESQL_UPDATE, COLUMNS.arrays(map(_row, known)))


async def _insert(connection: AsyncConnection, new: Sequence[Held]) -> None:
    if not new:
        return
    rows = await fetch(connection, _POSTGRESQL_INSERT, COLUMNS.arrays(map(_row, new)))
    if len(rows) != len(new):
        raise EnvelopesBusy({h.key for h in new} - {(row[0], row[1]) for row in rows})


def tuples(held: Iterable[Held]) -> list[tuple[Any, ...]]:
    """Give rows of `COLUMNS` as SQLite takes them."""
    return COLUMNS.tuples(map(_row, held))


def rows(held: Iterable[Held]) -> list[tuple[Any, ...]]:
    """Give rows of `COLUMNS` as PostgreSQL takes them, each with the version that was read."""
    guarded = ((*_row(each), each.version_read) for each in held)
    return COLUMNS.tuples(guarded, is_postgresql=True)


def _row(held: Held) -> tuple[Any, ...]:
    decided = list(_decided(held.envelope))
    if (parties := held.envelope.parties) is not None:
        decided[_PARTIES] = [dict(zip(_PARTY, _party(party), strict=True)) for party in parties]
    return (
        *held.key,
        held.version,
        held.sequence,
        held.first_seen_at,
        held.updated_at,
        held.erased_at,
        *decided,
    )
