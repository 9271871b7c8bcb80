"""Events and deliveries for tests: recorded as intake would, read past the code under test."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import select, text

from app.dispatch.options import DispatchOptions
from app.dispatch.registry import Callbacks
from app.dispatch.worker import Dispatcher
from app.store import callbacks, claims, deliveries, events
from app.store.callbacks import Subscription
from app.store.claims import Claim, Room
from app.store.deliveries import Delivery
from app.store.ids import new_id
from app.store.models import AttemptRow, AuditRow, EnvelopeRow, EventRow
from app.store.session import Database, DatabaseAddress, Limits

LIMIT = timedelta(seconds=30)
# Who only looks on waits for its turn, however long a busy machine takes for a commit.
LIMITS = Limits(statement=LIMIT, sqlite_lock=LIMIT)
BODY = b'{"event": "envelope.signed", "data": {"id": "env_1"}}'
LEASE = timedelta(seconds=30)
PATIENCE = timedelta(minutes=15)
WORKER = "worker-1"

# Everything sooner than in production, but for what a busy machine makes late by itself.
QUICK: dict[str, Any] = {
    "poll": timedelta(milliseconds=50),
    "watch_every": timedelta(milliseconds=20),
    "sweep_every": timedelta(milliseconds=200),
}


class Ledger:
    """One database, seen from a test."""

    def __init__(self, url: str) -> None:
        self.address = DatabaseAddress(url)
        # A test may fill a table with more at once than anything in production ever writes.
        self.database = Database(self.address, size=3, limits=LIMITS)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        async with self.database.begin(limit=LIMIT) as connection:
            yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Any]:
        async with self.database.begin(limit=LIMIT, is_reading=True) as connection:
            yield connection

    async def record(
        self,
        event_type: str | None = "envelope.signed",
        *,
        envelope: str | None = "env_1",
        sequence: int | None = 1,
        account: str = "default",
        effect: str = "applied",
        body: bytes | None = BODY,
        received_at: datetime | None = None,
        event_id: UUID | None = None,
    ) -> UUID:
        """Record one event, owed to nobody."""
        identifier = event_id or new_id()
        values: dict[str, Any] = dict.fromkeys(events.COLUMNS.names)
        values |= {
            "id": identifier,
            "account": account,
            "envelope_id": envelope,
            "type": event_type,
            "received_at": received_at or datetime.now(UTC),
            "sequence": sequence,
            "effect": effect,
            "status": "signed",
        }
        row = tuple(values[name] for name in events.COLUMNS.names)
        bodies = [] if body is None else [(identifier, body)]
        async with self.transaction() as connection:
            await events.add(connection, [row], bodies)
        return identifier

    async def owe(self, *names: str, event: UUID | None = None, **about: Any) -> list[UUID]:
        """Record one event and owe it; gives a delivery for each callback."""
        event_id = event or await self.record(**about)
        key = (
            about.get("account", "default"),
            about.get("envelope", "env_1"),
            about.get("sequence", 1),
        )
        async with self.transaction() as connection:
            await deliveries.enqueue(connection, [(event_id, name, *key) for name in names])
        owed = {d.callback: d.id for d in await self.deliveries() if d.event_id == event_id}
        return [owed[name] for name in names]

    async def owe_one(self, name: str = "file", **about: Any) -> UUID:
        return (await self.owe(name, **about))[0]

    async def envelope(self, envelope: str = "env_1", **columns: Any) -> None:
        now = datetime.now(UTC)
        row = {"version": 1, "sequence": 1, "first_seen_at": now, "updated_at": now, **columns}
        async with self.transaction() as connection:
            await connection.execute(
                EnvelopeRow.__table__.insert().values(account="default", id=envelope, **row)  # type: ignore[attr-defined]
            )

    async def register(self, *names: str, patterns: Sequence[str] = ("*",)) -> None:
        async with self.transaction() as connection:
            wanted = [Subscription(name, tuple(patterns)) for name in names]
            await callbacks.register(connection, wanted)

    async def claim(
        self,
        *names: str,
        limit: int = 10,
        is_ordered: bool = True,
        lease: timedelta = LEASE,
        patience: timedelta = PATIENCE,
        worker: str = WORKER,
    ) -> list[Claim]:
        rooms = [Room(name, limit, is_ordered) for name in names or ("file",)]
        async with self.transaction() as connection:
            return await claims.claim(
                connection, rooms, worker=worker, lease=lease, patience=patience
            )

    async def deliveries(self, **filters: str) -> list[Delivery]:
        async with self.reading() as connection:
            found = await deliveries.page(connection, filters=filters, limit=100_000)
        return found[::-1]

    async def delivery(self, delivery_id: UUID) -> Delivery:
        return next(d for d in await self.deliveries() if d.id == delivery_id)

    async def states(self) -> list[str]:
        return [d.state for d in await self.deliveries()]

    async def attempts(self, delivery_id: UUID | None = None) -> list[Any]:
        query = select(AttemptRow.__table__).order_by(AttemptRow.token)
        if delivery_id is not None:
            query = query.where(AttemptRow.delivery_id == delivery_id)
        async with self.reading() as connection:
            return list((await connection.execute(query)).all())

    async def verdicts(self, delivery_id: UUID | None = None) -> list[str]:
        return [row.verdict for row in await self.attempts(delivery_id)]

    async def events(self, *types: str) -> list[UUID]:
        query = select(EventRow.id).where(EventRow.type.in_(types)).order_by(EventRow.id)
        async with self.reading() as connection:
            return list((await connection.execute(query)).scalars())

    async def audit(self) -> list[Any]:
        async with self.reading() as connection:
            query = select(AuditRow.__table__).order_by(AuditRow.id)
            return list((await connection.execute(query)).all())

    async def change(self, statement: str, **values: Any) -> None:
        """Make by hand what time, an operator or an accident would."""
        async with self.transaction() as connection:
            await connection.execute(text(statement), values)

    async def shift(self, table: str, column: str, by: timedelta, **where: str) -> None:
        """Move a column of times, as if that much time had passed between."""
        seconds = by.total_seconds()
        value = (
            f"{column} + make_interval(secs => {seconds})"
            if self.database.is_postgresql
            else f"strftime('%Y-%m-%d %H:%M:%f000', {column}, '{seconds:+.3f} seconds')"
        )
        condition = " AND ".join(f"{name} = :{name}" for name in where) or "true"
        await self.change(f"UPDATE {table} SET {column} = {value} WHERE {condition}", **where)  # noqa: S608

    async def make_due(self) -> None:
        """Let the waits after failed attempts pass."""
        await self.shift("deliveries", "due_at", timedelta(hours=-3), state="pending")

    @contextmanager
    def dispatching(
        self,
        wanted: Callbacks,
        *,
        worker: str = WORKER,
        grace: float = 10,
        listens_at: DatabaseAddress | None = None,
        is_pressed: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Iterator[Dispatcher]:
        """Run a dispatcher for the length of a block."""
        dispatcher = Dispatcher(
            self.address,
            tuple(wanted),
            options=DispatchOptions(**{**QUICK, **options}),
            worker=worker,
            listens_at=listens_at,
            is_pressed=is_pressed,
        )
        dispatcher.start()
        try:
            yield dispatcher
        finally:
            dispatcher.stop(timedelta(seconds=grace))
            assert not dispatcher._thread.is_alive(), "a stop must end the thread"


async def until(condition: Callable[[], Any], *, limit: float = 30) -> None:
    """Wait for a condition, sync or async, instead of for a time."""
    end = time.monotonic() + limit
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < end, "what the test waits for did not come"
        await asyncio.sleep(0.01)
