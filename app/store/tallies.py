"""What all processes have counted, in steps of a minute, an hour and a day.

Each count is added to all three, so that a long time is read from few rows: those of the
instants at which its steps begin.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.base import time_to_text
from app.store.bulk import Columns
from app.store.dialects import is_postgresql
from app.store.models import TallyRow
from app.store.session import fetch

# The account of what was counted before it was known whose it is.
NOBODY = ""
DROPPED_AT_ONCE = 5000


class Step(StrEnum):
    """How finely time is cut."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"

    @property
    def span(self) -> timedelta:
        """How long one step is."""
        return _SPANS[self]

    def floor(self, moment: datetime) -> datetime:
        """Give the beginning of the step that `moment` is in."""
        return moment - (moment - _EPOCH) % self.span


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SPANS = {
    Step.MINUTE: timedelta(minutes=1),
    Step.HOUR: timedelta(hours=1),
    Step.DAY: timedelta(days=1),
}
# Days are kept for ever: one is a few rows.
KEPT: Mapping[Step, timedelta] = {Step.MINUTE: timedelta(days=3), Step.HOUR: timedelta(days=90)}


@dataclass(frozen=True, slots=True, order=True)
class Tally:
    """What is counted: in which minute, for which account, and what."""

    at: datetime
    account: str
    name: str
    label: str


_ROW = Columns(
    TallyRow.__table__,  # type: ignore[arg-type]
    ["at", "account", "name", "label", "count"],
)
_KEY = "at, account, name, label"
_ADD_POSTGRESQL = (
    f"INSERT INTO tallies ({_ROW.listed}) SELECT {_ROW.selected} FROM {_ROW.unnested} "
    f"ON CONFLICT ({_KEY}) DO UPDATE SET count = tallies.count + excluded.count"
)
_ADD_SQLITE = (
    f"INSERT INTO tallies ({_ROW.listed}) VALUES (?, ?, ?, ?, ?) "
    f"ON CONFLICT ({_KEY}) DO UPDATE SET count = tallies.count + excluded.count"
)


async def add(connection: AsyncConnection, counts: Mapping[Tally, int]) -> None:
    """Add to what all processes have counted; rows are locked in one order by all of them."""
    rows = [(t.at, t.account, t.name, t.label, n) for t, n in sorted(_in_steps(counts).items())]
    if not rows:
        return
    if is_postgresql(connection):
        await fetch(connection, _ADD_POSTGRESQL, _ROW.arrays(rows))
    else:
        await connection.exec_driver_sql(_ADD_SQLITE, _ROW.tuples(rows))


def _in_steps(counts: Mapping[Tally, int]) -> dict[Tally, int]:
    rows: dict[Tally, int] = {}
    for tally, count in counts.items():
        for step in Step:
            name = _stored(tally.name, step)
            row = Tally(step.floor(tally.at), tally.account, name, tally.label)
            rows[row] = rows.get(row, 0) + count
    return rows


def _stored(name: str, step: Step) -> str:
    return f"{step.value}:{name}"


@dataclass(frozen=True, slots=True)
class Point:
    """How often something was counted in one step, over all the accounts that were asked for."""

    at: datetime
    name: str
    label: str
    count: int


_READ = (
    "SELECT at, name, label, CAST(sum(count) AS bigint) AS count FROM tallies "
    "WHERE at {instants} AND name {names} AND {accounts} "
    "GROUP BY at, name, label ORDER BY at, name, label"
)
_READ_POSTGRESQL = _READ.format(
    instants="= ANY ($1::timestamptz[])",
    names="= ANY ($2::text[])",
    accounts="($3::text[] IS NULL OR account = ANY ($3::text[]))",
)
_READ_SQLITE = _READ.format(
    instants="IN (SELECT value FROM json_each(?1))",
    names="IN (SELECT value FROM json_each(?2))",
    accounts="(?3 IS NULL OR account IN (SELECT value FROM json_each(?3)))",
)
_POINT = Columns(TallyRow.__table__, ["at", "name", "label", "count"])  # type: ignore[arg-type]


async def read(
    connection: AsyncConnection,
    instants: Sequence[datetime],
    *,
    step: Step,
    names: Iterable[str],
    accounts: Sequence[str] | None,
) -> list[Point]:
    """Give what was counted in the steps that begin at `instants`; None means every account."""
    stored = [_stored(name, step) for name in names]
    on_postgresql = is_postgresql(connection)
    if on_postgresql:
        seen = None if accounts is None else list(accounts)
        rows = await fetch(connection, _READ_POSTGRESQL, (list(instants), stored, seen))
    else:
        times = json.dumps([time_to_text(moment) for moment in instants])
        shown = None if accounts is None else json.dumps(list(accounts))
        rows = await fetch(connection, _READ_SQLITE, (times, json.dumps(stored), shown))
    found = (_POINT.read(tuple(row), is_postgresql=on_postgresql) for row in rows)
    return [
        Point(at, name.partition(":")[2], label, int(count)) for at, name, label, count in found
    ]


_DROP = (
    "DELETE FROM tallies WHERE ({key}) IN (SELECT {key} FROM tallies "
    "WHERE at < {before} AND name >= {first} AND name < {last} ORDER BY at LIMIT {limit})"
)
_DROP_POSTGRESQL = _DROP.format(
    key=_KEY, before="$1::timestamptz", first="$2::text", last="$3::text", limit="$4::int8"
)
_DROP_SQLITE = _DROP.format(key=_KEY, before="?", first="?", last="?", limit="?")


async def drop_old(connection: AsyncConnection, step: Step, *, before: datetime) -> bool:
    """Drop steps of this length that began before; True if there may be more of them."""
    # From `minute:` up to what sorts behind all that begin so.
    span = (f"{step.value}:", f"{step.value};")
    if is_postgresql(connection):
        statement, arguments = _DROP_POSTGRESQL, (before, *span, DROPPED_AT_ONCE)
        result = await connection.exec_driver_sql(statement, arguments)
    else:
        values = (time_to_text(before), *span, DROPPED_AT_ONCE)
        result = await connection.exec_driver_sql(_DROP_SQLITE, values)
    return result.rowcount >= DROPPED_AT_ONCE
