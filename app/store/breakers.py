"""What all processes together know of how calls ended lately, and who may probe."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, now, seconds
from app.store.models import CallbackRow

_callbacks = CallbackRow.__table__


@dataclass(frozen=True, slots=True)
class Gate:
    """The breaker of one callback as it stands in the database, and when it was read."""

    callback: str
    open_until: datetime | None
    counted: dict[str, Any] | None
    at: datetime
    # Since when a person holds it.
    paused_at: datetime | None = None

    @property
    def is_half_open(self) -> bool:
        """True if somebody may probe."""
        return self.open_until is not None and self.open_until <= self.at

    @property
    def is_shut(self) -> bool:
        """True if nothing is given to it: it is paused, or its breaker is open."""
        is_open = self.open_until is not None and not self.is_half_open
        return is_open or self.paused_at is not None


async def read(
    connection: AsyncConnection, names: Iterable[str], *, lock: bool = False
) -> list[Gate]:
    """Give the gates of these callbacks; with `lock`, keep others from changing them."""
    columns = [_callbacks.c[n] for n in ("name", "open_until", "breaker", "paused_at")]
    query = select(*columns, now(connection)).where(_callbacks.c.name.in_(sorted(names)))
    query = query.order_by(_callbacks.c.name)
    rows = await connection.execute(query.with_for_update() if lock else query)
    return [Gate(row[0], row[1], row[2], row[4], row[3]) for row in rows]


async def write(connection: AsyncConnection, gate: Gate) -> None:
    """Write down what was counted and decided; whoever was probing no longer is."""
    await connection.execute(
        _callbacks.update()  # type: ignore[attr-defined]
        .where(_callbacks.c.name == gate.callback)
        .values(open_until=gate.open_until, breaker=gate.counted, probe_until=None)
    )


_PROBE = """
UPDATE callbacks SET probe_until = {later}
WHERE name = {name} AND open_until <= {now} AND (probe_until IS NULL OR probe_until <= {now})
"""
_PROBE_POSTGRESQL = _PROBE.format(
    later="statement_timestamp() + $1::interval", name="$2", now="statement_timestamp()"
)
_PROBE_SQLITE = _PROBE.format(later=SQLITE_LATER, name="?", now=SQLITE_NOW)


async def probe(connection: AsyncConnection, callback: str, *, hold: timedelta) -> bool:
    """Become the one who probes a half-open callback, for as long as `hold`; False if not."""
    if is_postgresql(connection):
        result = await connection.exec_driver_sql(_PROBE_POSTGRESQL, (hold, callback))
    else:
        parameters = (seconds(hold), callback)
        result = await connection.exec_driver_sql(_PROBE_SQLITE, parameters)
    return result.rowcount == 1


_RENEW = """
UPDATE callbacks SET probe_until = {later}
WHERE name {names} AND open_until <= {now} AND probe_until IS NOT NULL
"""
_RENEW_POSTGRESQL = _RENEW.format(
    later="statement_timestamp() + $1::interval",
    names="= ANY ($2::text[])",
    now="statement_timestamp()",
)
_RENEW_SQLITE = _RENEW.format(
    later=SQLITE_LATER, names="IN (SELECT value FROM json_each(?))", now=SQLITE_NOW
)


async def renew(connection: AsyncConnection, callbacks: Sequence[str], *, hold: timedelta) -> None:
    """Keep the right to probe these for as long as `hold` again."""
    if is_postgresql(connection):
        await connection.exec_driver_sql(_RENEW_POSTGRESQL, (hold, list(callbacks)))
    else:
        parameters = (seconds(hold), json.dumps(list(callbacks)))
        await connection.exec_driver_sql(_RENEW_SQLITE, parameters)


_UNPROBE_POSTGRESQL = "UPDATE callbacks SET probe_until = NULL WHERE name = ANY ($1::text[])"
_UNPROBE_SQLITE = (
    "UPDATE callbacks SET probe_until = NULL WHERE name IN (SELECT value FROM json_each(?))"
)


async def unprobe(connection: AsyncConnection, callbacks: Sequence[str]) -> None:
    """Let others probe: we have nothing to probe with."""
    await _change(connection, _UNPROBE_POSTGRESQL, _UNPROBE_SQLITE, callbacks)


_FORGET = """
UPDATE callbacks SET open_until = NULL, probe_until = NULL, breaker = NULL
WHERE name {names} AND (open_until IS NOT NULL OR breaker IS NOT NULL)
"""
_FORGET_POSTGRESQL = _FORGET.format(names="= ANY ($1::text[])")
_FORGET_SQLITE = _FORGET.format(names="IN (SELECT value FROM json_each(?))")


async def forget(connection: AsyncConnection, callbacks: Sequence[str]) -> None:
    """Let everything through to callbacks that have no breaker any more."""
    await _change(connection, _FORGET_POSTGRESQL, _FORGET_SQLITE, callbacks)


async def _change(
    connection: AsyncConnection, postgresql: str, sqlite: str, callbacks: Sequence[str]
) -> None:
    if is_postgresql(connection):
        await connection.exec_driver_sql(postgresql, (list(callbacks),))
    else:
        await connection.exec_driver_sql(sqlite, (json.dumps(list(callbacks)),))
