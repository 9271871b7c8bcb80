"""Which callbacks are owed an event: the `callbacks` table, remembered for a second.

A process that takes webhooks needs no callbacks of its own. What is recorded while the
memory is behind the table is owed by the sweep of `app.dispatch`.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from app.store import callbacks
from app.store.callbacks import Subscription
from app.store.session import Database, DatabaseError
from app.telemetry import get_logger

log = get_logger("intake")

# Types come from outside: without a bound their answers could fill the memory.
_MAX_ANSWERS = 1024


class Subscriptions:
    """Answers who wants an event, without asking the database."""

    def __init__(self, database: Database, *, every: timedelta = timedelta(seconds=1)) -> None:
        self._database = database
        self._every = every
        # Replaced together: on SQLite, a thread of its own asks.
        self._state: tuple[Sequence[Subscription], dict[tuple[str, str], tuple[str, ...]]] = (
            (),
            {},
        )

    def names_for(self, event_type: str, account: str) -> tuple[str, ...]:
        """Give the names of the callbacks that are owed an event of this type."""
        known, answers = self._state
        question = (event_type, account)
        answer = answers.get(question)
        if answer is None:
            answer = tuple(s.name for s in known if s.wants(event_type, account))
            if len(answers) >= _MAX_ANSWERS:
                answers.clear()
            answers[question] = answer
        return answer

    async def refresh(self) -> None:
        """Read the table now."""
        async with self._database.begin(limit=timedelta(seconds=3), is_reading=True) as connection:
            known = await callbacks.read(connection)
        if known != self._state[0]:
            self._state = known, {}

    async def run(self) -> None:
        """Keep up with the table, for ever."""
        is_behind = False
        while True:
            try:
                await self.refresh()
                is_behind = False
            except DatabaseError as error:
                if not is_behind:
                    log.warning("subscriptions.delayed", error=type(error).__name__)
                is_behind = True
            await asyncio.sleep(self._every.total_seconds())
