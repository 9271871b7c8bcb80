"""Notice an expected envelope of which nothing was ever heard: `receiver.silent`.

Whoever creates an envelope may say so. If then no event about it comes in time, every one of
its webhooks may have been lost, and without this nobody would know.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

from app.store import expectations, own_events
from app.store.expectations import Expectation
from app.store.own_events import OwnEvent
from app.store.session import Database, DatabaseError
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
            raised = {each: _silence_of(each) for each in silent}
            owed = await own_events.add(connection, list(raised.values()))
            for each in overdue:
                key = (each.expectation.account, each.expectation.envelope_id)
                await expectations.settle(connection, key, is_silent=not each.is_seen)
        for expectation, event in raised.items():
            _tell(event.id, expectation)
        if owed:
            self._on_owed({row[1] for row in owed})
        return len(overdue)

    async def _is_wanted(self) -> bool:
        async with self._database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            return await expectations.is_any_overdue(connection)


def _silence_of(expectation: Expectation) -> OwnEvent:
    said = {
        "expected_by": expectation.consumer,
        "expected_at": expectation.created_at.isoformat(),
    }
    # Without a place in the order of its envelope, which nothing is known of.
    return OwnEvent(SILENT, expectation.account, expectation.envelope_id, said)


def _tell(event_id: UUID, expectation: Expectation) -> None:
    log.warning(
        "envelope.silent",
        event_id=str(event_id),
        envelope_id=expectation.envelope_id,
        account=expectation.account,
        expected_by=expectation.consumer,
    )
