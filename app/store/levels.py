"""How much is owed, set aside and waiting just now: what gauges and pictures show."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import feed
from app.store.bulk import Columns
from app.store.dialects import SQLITE_NOW, is_postgresql
from app.store.models import CallbackRow, DeliveryRow, KeyRow
from app.store.session import Database, fetch


@dataclass(frozen=True, slots=True)
class Queue:
    """The deliveries of one account to one callback that are in the same state."""

    account: str
    callback: str
    state: str
    count: int
    # When the first of them is due; None for those that nobody is to call.
    due_at: datetime | None


@dataclass(frozen=True, slots=True)
class Gate:
    """A callback, and what keeps deliveries from it."""

    callback: str
    paused_at: datetime | None
    open_until: datetime | None


@dataclass(frozen=True, slots=True)
class Use:
    """An API key, and when it last proved a request genuine to any process."""

    account: str
    label: str
    last_match_at: datetime


@dataclass(frozen=True, slots=True)
class Levels:
    """Everything, as it was at one moment by the database's clock."""

    at: datetime
    queues: Sequence[Queue]
    gates: Sequence[Gate]
    uses: Sequence[Use]
    # The newest place of the feed, and since when something waits for the next one.
    position: int
    waiting_since: datetime | None


# By the indexes of what is owed and of what is set aside; what is done is never looked at.
_QUEUES = (
    "SELECT account, callback, state, count(*), min(due_at) FROM deliveries "
    "WHERE due_at IS NOT NULL GROUP BY account, callback, state "
    "UNION ALL SELECT account, callback, state, count(*), NULL FROM deliveries "
    "WHERE state IN ('dead', 'parked') GROUP BY account, callback, state"
)
_GATES = "SELECT name, paused_at, open_until FROM callbacks ORDER BY name"
_USES = (
    "SELECT account, label, last_match_at FROM keys WHERE last_match_at IS NOT NULL "
    "ORDER BY fingerprint"
)
_NOW_POSTGRESQL, _NOW_SQLITE = "SELECT statement_timestamp()", f"SELECT {SQLITE_NOW}"
_TIME = Columns(DeliveryRow.__table__, ["due_at"])  # type: ignore[arg-type]
_GATE = Columns(CallbackRow.__table__, ["name", "paused_at", "open_until"])  # type: ignore[arg-type]
_USE = Columns(KeyRow.__table__, ["account", "label", "last_match_at"])  # type: ignore[arg-type]


async def read(connection: AsyncConnection) -> Levels:
    """Look at everything once."""
    on_postgresql = is_postgresql(connection)
    [(moment,)] = await fetch(connection, _NOW_POSTGRESQL if on_postgresql else _NOW_SQLITE)
    head = await feed.head(connection)
    return Levels(
        _time(moment, on_postgresql=on_postgresql),
        [_queue(row, on_postgresql=on_postgresql) for row in await fetch(connection, _QUEUES)],
        [
            Gate(*_GATE.read(tuple(row), is_postgresql=on_postgresql))
            for row in await fetch(connection, _GATES)
        ],
        [
            Use(*_USE.read(tuple(row), is_postgresql=on_postgresql))
            for row in await fetch(connection, _USES)
        ],
        head.position if head is not None else 0,
        await feed.pending_since(connection),
    )


def _queue(row: Sequence[Any], *, on_postgresql: bool) -> Queue:
    account, callback, state, count, due_at = row
    return Queue(account, callback, state, count, _time(due_at, on_postgresql=on_postgresql))


def _time(value: Any, *, on_postgresql: bool) -> Any:
    return _TIME.read((value,), is_postgresql=on_postgresql)[0]


def pool_of(database: Database) -> tuple[int, int]:
    """Say how many connections a pool may have, and how many are in use; zeros for none."""
    pool: Any = database.engine.pool
    if not hasattr(pool, "checkedout"):
        return 0, 0
    return pool.size(), pool.checkedout()
