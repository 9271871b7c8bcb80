"""Write verdicts down, many at a time, until they are written or somebody else's matter."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, assert_never
from uuid import UUID

from app.dispatch.attempt import Call, Dead, Done, Failed, Outcome, Skipped
from app.dispatch.obituary import announce_dead
from app.dispatch.schedule import next_try
from app.store import deliveries, verdicts
from app.store.session import DatabaseError, blames_data
from app.store.verdicts import Settlement
from app.telemetry import get_logger

log = get_logger("dispatch")

BATCH = 500
UNWRITABLE = "the verdict could not be written as it was"

# Opens a transaction on the database of the dispatch loop.
Begin = Callable[..., AbstractAsyncContextManager[Any]]
# Is told of calls whose verdicts are on disk, many at once; it must not fail.
Attempted = Callable[[Sequence[tuple[Outcome, Settlement]]], None]


def settlement(outcome: Outcome, *, noise: float) -> Settlement:
    """Decide what a verdict means for its delivery."""
    match outcome.verdict:
        case Done():
            return _row(outcome, "done", deliveries.DONE)
        case Skipped():
            return _row(outcome, "skipped", deliveries.DONE)
        case Dead(error, fingerprint):
            return _row(outcome, "dead", deliveries.DEAD, error, fingerprint)
        case Failed(error, fingerprint, after, _):
            wait = _wait(outcome.call, after, noise)
            if wait is None:
                return _row(outcome, "dead", deliveries.DEAD, error, fingerprint)
            failed = _row(outcome, "failed", deliveries.PENDING, error, fingerprint)
            return replace(failed, wait=wait)
        case _:
            assert_never(outcome.verdict)


def _wait(call: Call, after: timedelta | None, noise: float) -> timedelta | None:
    return next_try(
        call.claim.attempt - call.claim.spent,
        max_attempts=call.callback.max_attempts,
        backoff=call.callback.backoff,
        noise=noise,
        after=after,
    )


def _row(
    outcome: Outcome,
    verdict: str,
    state: str,
    error: str | None = None,
    fingerprint: str | None = None,
) -> Settlement:
    claim = outcome.call.claim
    return Settlement(
        id=claim.id,
        token=claim.token,
        attempt=claim.attempt,
        verdict=verdict,
        state=state,
        wait=None,
        error=error,
        fingerprint=fingerprint,
        started_at=outcome.began_at,
        finished_at=outcome.finished_at,
    )


class Settler:
    """The queue of verdicts. What is in it is tried until the database takes it."""

    def __init__(
        self,
        begin: Begin,
        *,
        worker: str,
        on_settled: Callable[[], None],
        on_attempted: Attempted = lambda _: None,
    ) -> None:
        self._begin = begin
        self._worker = worker
        self._on_settled = on_settled
        self._on_attempted = on_attempted
        self._waiting: list[Outcome] = []
        self._batch: list[tuple[Outcome, Settlement]] = []
        self._is_filled = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._batch)

    def put(self, outcomes: Sequence[Outcome]) -> None:
        """Take verdicts; of those that are committed already, only tell."""
        committed = [outcome for outcome in outcomes if _is_committed(outcome)]
        told = [(outcome, settlement(outcome, noise=0.0)) for outcome in committed]
        if told:
            _tell(told, dict.fromkeys((row.id for _, row in told), None))
            self._on_attempted(told)
            self._on_settled()
        if len(committed) < len(outcomes):
            self._waiting += [outcome for outcome in outcomes if not _is_committed(outcome)]
            self._is_empty.clear()
            self._is_filled.set()

    async def wait_until_empty(self) -> None:
        """Return once everything that was put in is written."""
        await self._is_empty.wait()

    async def step(self) -> None:
        """Write the next batch; if that raises, the next step tries the same again."""
        if not self._batch:
            await self._is_filled.wait()
            taken, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            self._batch = [(o, settlement(o, noise=random.random())) for o in taken]  # noqa: S311
        due = await self._settle([row for _, row in self._batch])
        self._log(due)
        self._batch = []
        if not self._waiting:
            self._is_filled.clear()
            self._is_empty.set()
        self._on_settled()

    async def _settle(self, rows: Sequence[Settlement]) -> dict[UUID, datetime | None]:
        written = await self._write(rows)
        if written is not None:
            return written
        due: dict[UUID, datetime | None] = {}
        for row in rows:
            due |= await self._settle_alone(row)
        return due

    async def _settle_alone(self, row: Settlement) -> dict[UUID, datetime | None]:
        plain = replace(row, error=UNWRITABLE if row.error else None, fingerprint=None)
        for attempted in (row, plain):
            due = await self._write([attempted])
            if due is not None:
                return due
        log.error("verdict.unwritable", delivery_id=str(row.id), verdict=row.verdict)
        return {}

    async def _write(self, rows: Sequence[Settlement]) -> dict[UUID, datetime | None] | None:
        """Write rows in one transaction; None if the database refuses one for what it says."""
        try:
            dead = [row.id for row in rows if row.verdict == "dead"]
            async with self._begin(is_split=not dead) as connection:
                due = await verdicts.settle(connection, rows, worker=self._worker)
                await announce_dead(connection, [id_ for id_ in dead if id_ in due])
                return due
        except DatabaseError as error:
            if not blames_data(error):
                raise
        return None

    def _log(self, due: dict[UUID, datetime | None]) -> None:
        kept = [(outcome, row) for outcome, row in self._batch if row.id in due]
        dropped = [(outcome, row) for outcome, row in self._batch if row.id not in due]
        _tell(kept, due)
        if dropped:
            log.warning("verdict.dropped", each=[_fields(*each) for each in dropped])
        self._on_attempted(kept)


def _is_committed(outcome: Outcome) -> bool:
    return isinstance(outcome.verdict, Done) and outcome.verdict.is_committed


def _tell(told: Sequence[tuple[Outcome, Settlement]], due: Mapping[UUID, datetime | None]) -> None:
    """Write a line for each attempt; of a dead one somebody has to know."""
    for level, is_dead in ((log.warning, True), (log.info, False)):
        lines = [_told(*one, due) for one in told if (one[1].verdict == "dead") is is_dead]
        if lines:
            level("delivery.attempted", each=lines)


def _told(outcome: Outcome, row: Settlement, due: Mapping[UUID, datetime | None]) -> dict[str, Any]:
    due_at = due[row.id]
    return {**_fields(outcome, row), "due_at": due_at.isoformat() if due_at else None}


def _fields(outcome: Outcome, row: Settlement) -> dict[str, Any]:
    claim, content = outcome.call.claim, outcome.call.content
    return {
        "delivery_id": str(claim.id),
        "event_id": str(claim.event_id),
        "envelope_id": claim.envelope_id,
        "event_type": outcome.call.event_type,
        "fields_status": content.fields_status if content else None,
        "callback": claim.callback,
        "attempt": claim.attempt,
        "verdict": row.verdict,
        "error": row.error,
    }
