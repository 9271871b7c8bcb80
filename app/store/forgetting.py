"""Callbacks that are gone for good: taken out of the register, what they are owed given up."""

from typing import Any

from sqlalchemy import ColumnElement, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.deliveries import DISCARDED
from app.store.dialects import now
from app.store.models import CallbackRow, DeliveryRow

_callbacks: Any = CallbackRow.__table__
_deliveries: Any = DeliveryRow.__table__
# Written out, not sent as a value: the small index of what is parked is found only so.
_IS_PARKED = literal_column("deliveries.state") == literal_column("'parked'")
_IS_OWED = _deliveries.c.due_at.is_not(None)


async def lock(connection: AsyncConnection, name: str) -> None:
    """Keep processes from saying that they serve a callback, until the transaction ends."""
    chosen = select(_callbacks.c.name).where(_callbacks.c.name == name)
    await connection.execute(chosen.with_for_update())


async def forget(connection: AsyncConnection, name: str) -> None:
    """Owe a callback nothing more that is recorded from now on."""
    await connection.execute(_callbacks.delete().where(_callbacks.c.name == name))


async def is_owed(connection: AsyncConnection, name: str) -> bool:
    """Whether something is owed to a callback or parked for it."""
    return bool(
        await _locked(connection, name, _IS_OWED, 1)
        or await _locked(connection, name, _IS_PARKED, 1)
    )


async def give_up(connection: AsyncConnection, name: str, *, limit: int) -> int:
    """Discard some of what is owed to a callback or parked for it; say how many.

    None of it if the callback is registered again: then it is owed to the new one.
    """
    chosen = [
        *await _locked(connection, name, _IS_OWED, limit),
        *await _locked(connection, name, _IS_PARKED, limit),
    ]
    if chosen:
        # The token rises, so that the verdict of a worker that comes back no longer counts.
        values = {
            "state": DISCARDED,
            "due_at": None,
            "token": _deliveries.c.token + 1,
            "settled_at": now(connection),
        }
        changed = _deliveries.update().where(_deliveries.c.id.in_(chosen)).values(**values)
        await connection.execute(changed)
    return len(chosen)


async def _locked(
    connection: AsyncConnection, name: str, condition: ColumnElement[bool], limit: int
) -> list[Any]:
    is_back = select(_callbacks.c.name).where(_callbacks.c.name == name).exists()
    query = select(_deliveries.c.id).where(_deliveries.c.callback == name, condition, ~is_back)
    locked = query.limit(limit).with_for_update(of=_deliveries, skip_locked=True)
    return list((await connection.execute(locked)).scalars())
