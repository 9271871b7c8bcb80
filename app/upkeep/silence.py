"""Notice an expected envelope of which nothing was ever heard: `receiver.silent`.

Whoever creates an envelope may say so. If then no event about it comes in time, every one of
its webhooks may have been lost, and without this nobody would know.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from app.events.lifecycle import Effect
from app.store import callbacks, deliveries, events, expectations
from app.store.callbacks import Subscription
from app.store.deliveries import Owed
from app.store.expectations import Expectation
from app.store.ids import new_id
from app.store.session import Connection, Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("silence")

SILENT = "receiver.silent"
LIMIT = timedelta(seconds=5)
TICK, PAUSE = timedelta(seconds=1), timedelta(seconds=5)
AT_ONCE = 100


class Silence:
    """Looks for what is overdue, for ever; several processes share it."""

    def __init__(self, database: Database, *, on_owed: Callable[[set[str]], object]) -> None:
        self._database = database
        self._on_owed = on_owed

    async def run(self) -> None:
        """Notice what is overdue; a database that is away is waited for."""
        is_failing = False
        while True:
            wait = TICK
            try:
                while await self.step() == AT_ONCE:
                    pass
                is_failing = False
            except DatabaseError as error:
                if not is_failing:
                    log.warning("silence.delayed", error=type(error).__name__)
                is_failing, wait = True, PAUSE
            await asyncio.sleep(wait.total_seconds())

    async def step(self) -> int:
        """Notice some of what is overdue; say how many expectations were looked at."""
        if not await self._is_wanted():
            return 0
        async with self._database.begin(limit=LIMIT) as connection:
            overdue = await expectations.take_overdue(connection, limit=AT_ONCE)
            silent = [each.expectation for each in overdue if not each.is_seen]
            raised, owed = await _raise(connection, silent)
            for each in overdue:
                key = (each.expectation.account, each.expectation.envelope_id)
                await expectations.settle(connection, key, is_silent=not each.is_seen)
        for event_id, expectation in raised:
            _tell(event_id, expectation)
        if owed:
            self._on_owed({row[1] for row in owed})
        return len(overdue)

    async def _is_wanted(self) -> bool:
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            return await expectations.is_any_overdue(connection)


async def _raise(
    connection: Connection, silent: Sequence[Expectation]
) -> tuple[list[tuple[UUID, Expectation]], list[Owed]]:
    """Raise an event for each of these, and owe it to whoever asks for it."""
    if not silent:
        return [], []
    subscriptions = await callbacks.read(connection)
    raised = [(new_id(), each) for each in silent]
    owed = [row for event_id, each in raised for row in _owed(event_id, each, subscriptions)]
    await events.add(
        connection,
        [_row(event_id, each) for event_id, each in raised],
        [(event_id, _body(event_id, each)) for event_id, each in raised],
    )
    await deliveries.enqueue(connection, owed)
    return raised, owed


def _owed(
    event_id: UUID, expectation: Expectation, subscriptions: Sequence[Subscription]
) -> list[Owed]:
    account = expectation.account
    return [
        (event_id, each.name, account, expectation.envelope_id, None)
        for each in subscriptions
        if each.wants(SILENT, account)
    ]


def _row(event_id: UUID, expectation: Expectation) -> tuple[Any, ...]:
    now = datetime.now(UTC)
    # Without a place in the order of its envelope, which nothing is known of.
    said = {
        "id": event_id,
        "account": expectation.account,
        "envelope_id": expectation.envelope_id,
        "type": SILENT,
        "occurred_at": now,
        "received_at": now,
        "effect": Effect.MILESTONE.value,
    }
    return tuple(said.get(name) for name in events.COLUMNS.names)


def _body(event_id: UUID, expectation: Expectation) -> bytes:
    said = {
        "event": SILENT,
        "event_id": str(event_id),
        "envelope_id": expectation.envelope_id,
        "expected_by": expectation.consumer,
        "expected_at": expectation.created_at.isoformat(),
    }
    return json.dumps(said).encode()


def _tell(event_id: UUID, expectation: Expectation) -> None:
    log.warning(
        "envelope.silent",
        event_id=str(event_id),
        envelope_id=expectation.envelope_id,
        account=expectation.account,
        expected_by=expectation.consumer,
    )
