"""A replica as intake sees it: a pool of connections and the loop that commits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, Select, Table, event, func, select, text

from app.errors import NotDurable
from app.intake import DATABASE_LIMITS, Intake, IntakeLimits, Outcome, Receipt
from app.intake.projection import Interested
from app.store.models import BodyRow, DeliveryRow, EnvelopeRow, EventRow, IdentityRow
from app.store.session import Database, DatabaseAddress

EVENTS: Table = EventRow.__table__  # type: ignore[assignment]
BODIES: Table = BodyRow.__table__  # type: ignore[assignment]
ENVELOPES: Table = EnvelopeRow.__table__  # type: ignore[assignment]
IDENTITIES: Table = IdentityRow.__table__  # type: ignore[assignment]
DELIVERIES: Table = DeliveryRow.__table__  # type: ignore[assignment]

# The only answers that a sender may get from a database that is in trouble.
NOT_DURABLE = "not durable"
Answer = Outcome | str

# Where the time to an answer is not what is tested, a busy machine may take longer than a
# sender would wait.
PATIENT = IntakeLimits(answer=timedelta(seconds=30), transaction=timedelta(seconds=25))
_PATIENT_DATABASE = replace(
    DATABASE_LIMITS,
    connect=timedelta(seconds=10),
    statement=timedelta(seconds=25),
    idle=timedelta(seconds=60),
    sqlite_lock=timedelta(seconds=25),
)


def archive_and_crm(event_type: str, _: str) -> tuple[str, ...]:
    """Two callbacks that want everything but events of the service about itself."""
    return () if event_type.startswith("receiver.") else ("archive", "crm")


@dataclass
class Replica:
    """One process's worth of intake."""

    database: Database
    intake: Intake
    running: asyncio.Task[None]
    account: str = "acme"
    _sqlite_commits: list[None] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.database.is_postgresql:
            event.listen(self.database.writer.engine, "commit", self._note_commit)

    def _note_commit(self, connection: Any) -> None:
        if not connection.get_execution_options().get("is_reading", False):
            self._sqlite_commits.append(None)

    async def transactions(self) -> int:
        """How many transactions it took to record what is there."""
        if not self.database.is_postgresql:
            return len(self._sqlite_commits)
        count = select(text("count(DISTINCT xmin::text)")).select_from(EVENTS)
        [row] = await self.rows(count.where(EVENTS.c.account == self.account))
        return int(row[0])

    async def record(self, body: bytes, *, account: str | None = None) -> Receipt:
        return await self.intake.record(body, account=account or self.account, key_label="main")

    async def outcome(self, body: bytes, *, account: str | None = None) -> Answer:
        """What the sender is told; any error but `NotDurable` is a defect and is raised."""
        try:
            return (await self.record(body, account=account)).outcome
        except NotDurable:
            return NOT_DURABLE

    async def in_turn(self, *bodies: bytes) -> list[Answer]:
        return [await self.outcome(body) for body in bodies]

    async def together(self, *bodies: bytes) -> list[Answer]:
        """Send all before the first is committed: they share one transaction."""
        return list(await asyncio.gather(*map(self.outcome, bodies)))

    async def rows(self, query: Select[Any]) -> Sequence[Row[Any]]:
        return await read(self.database, query)

    async def count(self, table: Table) -> int:
        count = select(func.count()).select_from(table)
        [row] = await self.rows(count.where(table.c.account == self.account))
        return int(row[0])

    async def said_by_atlas(self) -> list[Row[Any]]:
        """Events in the order of arrival, without those of the service about itself."""
        return [row for row in await self._events() if not _is_own(row)]

    async def own_events(self) -> list[str]:
        return sorted(row.type for row in await self._events() if _is_own(row))

    async def _events(self) -> Sequence[Row[Any]]:
        ours = EVENTS.c.account == self.account
        order = (EVENTS.c.received_at, EVENTS.c.id)
        return await self.rows(select(EVENTS).where(ours).order_by(*order))

    async def envelope(self, envelope_id: str, *, account: str | None = None) -> Row[Any]:
        key = (account or self.account, envelope_id)
        same = (ENVELOPES.c.account == key[0]) & (ENVELOPES.c.id == key[1])
        [row] = await self.rows(select(ENVELOPES).where(same))
        return row


def _is_own(row: Row[Any]) -> bool:
    return row.type is not None and str(row.type).startswith("receiver.")


async def read(database: Database, query: Select[Any]) -> Sequence[Row[Any]]:
    async with database.begin(limit=timedelta(seconds=10), is_reading=True) as connection:
        rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
    return rows


async def execute(database: Database, statement: Any, *arguments: Any) -> None:
    """Run one statement of a test's own: text of SQL, or an expression."""
    async with database.begin(limit=timedelta(seconds=10)) as connection:
        if isinstance(statement, str):
            await connection.exec_driver_sql(statement, arguments)
        else:
            await connection.execute(statement)


@asynccontextmanager
async def replica(
    url: str,
    *,
    account: str = "acme",
    size: int = 4,
    pgbouncer: bool = False,
    limits: IntakeLimits = PATIENT,
    is_strict: bool = False,
    interested: Interested = archive_and_crm,
    on_owed: Callable[[set[str]], None] = lambda _: None,
) -> AsyncIterator[Replica]:
    """Run intake for the length of a block; one that is strict answers as soon as in production."""
    address = DatabaseAddress(url, pgbouncer=pgbouncer)
    database = Database(
        address, size=size, limits=DATABASE_LIMITS if is_strict else _PATIENT_DATABASE
    )
    limits = IntakeLimits() if is_strict and limits is PATIENT else limits
    intake = Intake(database, interested=interested, on_owed=on_owed, limits=limits)
    running = asyncio.create_task(intake.run())
    one = Replica(database, intake, running, account)
    try:
        yield one
    finally:
        await intake.close()
        done, _ = await asyncio.wait([one.running], timeout=60)
        await database.close()
    assert done


async def eventually(is_true: Callable[[], Any], *, within: float = 30) -> None:
    """Wait until `is_true` gives something true; it may be a coroutine function."""
    async with asyncio.timeout(within):
        while True:
            answer = is_true()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.01)
