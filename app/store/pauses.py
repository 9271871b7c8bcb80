"""Callbacks that are given nothing for a time: paused by a person, or by their breaker."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import now
from app.store.models import CallbackRow

_callbacks: Any = CallbackRow.__table__


@dataclass(frozen=True, slots=True)
class Flow:
    """Whether a callback is given anything now, by the clock of the database."""

    name: str
    paused_at: datetime | None
    # Until then the breaker lets nothing through; None if it does.
    open_until: datetime | None
    seen_ago: timedelta


async def read(connection: AsyncConnection) -> dict[str, Flow]:
    """Give the flow of every callback that was ever registered."""
    columns = [_callbacks.c[name] for name in ("name", "paused_at", "open_until", "last_seen_at")]
    query = select(*columns, now(connection).label("now")).order_by(_callbacks.c.name)
    rows = (await connection.execute(query)).all()
    return {row.name: _flow(row) for row in rows}


def _flow(row: Any) -> Flow:
    is_open = row.open_until is not None and row.open_until > row.now
    until = row.open_until if is_open else None
    return Flow(row.name, row.paused_at, until, row.now - row.last_seen_at)


async def pause(connection: AsyncConnection, name: str) -> bool:
    """Give a callback nothing more; False if it is paused already."""
    change = _callbacks.update().values(paused_at=now(connection))
    chosen = change.where(_callbacks.c.name == name, _callbacks.c.paused_at.is_(None))
    return bool((await connection.execute(chosen)).rowcount)


async def resume(connection: AsyncConnection, name: str) -> bool:
    """Give a callback what is owed to it; False if nothing held it.

    A breaker is not closed but half open: a few calls show whether it may be trusted again,
    before everything that has gathered is let loose on it.
    """
    moment = now(connection)
    change = _callbacks.update().values(
        paused_at=None,
        probe_until=None,
        open_until=case((_callbacks.c.open_until.is_not(None), moment)),
    )
    is_held = or_(_callbacks.c.paused_at.is_not(None), _callbacks.c.open_until > moment)
    chosen = change.where(_callbacks.c.name == name, is_held)
    return bool((await connection.execute(chosen)).rowcount)
