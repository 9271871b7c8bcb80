"""Compute envelopes anew from their events, and say where the rows differ, or mend them.

What differs is looked at again until its row has not changed meanwhile; and it is mended
under the lock of the row, if that has still not changed. So intake goes on, and nothing that
it writes is written over.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from uuid import UUID

from app.errors import NotFound
from app.events.lifecycle import Effect
from app.store import deliveries, envelopes, own_events, rebuilding
from app.store.envelopes import EnvelopeKey, Held
from app.store.own_events import OwnEvent
from app.store.rebuilding import Live
from app.store.session import Connection, Database
from app.telemetry import get_logger
from app.upkeep.comparison import LIMIT, Compared, Difference, compare

log = get_logger("upkeep")

REBUILT = "receiver.rebuilt"
ENVELOPES_AT_ONCE, EVENTS_AT_ONCE = 100, 2000
COUNT_LIMIT = timedelta(seconds=60)
# How long one envelope is tried that others hold or change all the time.
PATIENCE, PAUSE = timedelta(seconds=10), timedelta(milliseconds=50)
_FIRST: EnvelopeKey = ("", "")


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which envelopes: one id, one account, or all; and behind which of them to go on."""

    envelope_id: str | None = None
    account: str | None = None
    after: EnvelopeKey | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come, and which differences were found since the last time."""

    total: int
    last: EnvelopeKey | None = None
    done: int = 0
    different: int = 0
    applied: int = 0
    from_row: int = 0
    erased: int = 0
    # Held or changed by others all the time: nothing is known of them.
    busy: int = 0
    found: tuple[Difference, ...] = ()


class _Fate(Enum):
    """What became of an envelope that seemed to differ."""

    EQUAL = auto()
    DIFFERENT = auto()
    APPLIED = auto()
    BUSY = auto()


async def rebuild(
    database: Database,
    chosen: Chosen,
    *,
    actor: str,
    is_applied: bool,
    patience: timedelta = PATIENCE,
) -> AsyncGenerator[Progress, None]:
    """Compare the chosen envelopes with what their events make of them; mend them if so told.

    It can be stopped at any time, and goes on behind `last`. Raises `NotFound` if one is
    named that is not there.
    """
    progress = Progress(await _count(database, chosen), chosen.after)
    yield progress
    run = _Run(database, actor, is_applied, patience)
    while lives := await _read(database, chosen, progress.last):
        for share in _shares(lives):
            progress = await run.advance(progress, share)
            yield progress
        if chosen.envelope_id is not None:
            return


async def _count(database: Database, chosen: Chosen) -> int:
    if chosen.envelope_id is not None:
        return len(await _read(database, chosen, None))
    async with database.begin(limit=COUNT_LIMIT, is_reading=True) as connection:
        return await rebuilding.count(connection, chosen.account)


async def _read(database: Database, chosen: Chosen, after: EnvelopeKey | None) -> list[Live]:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        if chosen.envelope_id is None:
            return await rebuilding.page(
                connection, after or _FIRST, account=chosen.account, limit=ENVELOPES_AT_ONCE
            )
        found = await rebuilding.find(connection, chosen.envelope_id, chosen.account)
    if not found:
        raise NotFound(f"there is no envelope {chosen.envelope_id} here")
    return found


def _shares(lives: Sequence[Live]) -> Iterator[list[Live]]:
    """Split a page so that not too many events are in memory; versions say how many there are."""
    share: list[Live] = []
    for live in lives:
        if share and sum(each.version for each in share) + live.version > EVENTS_AT_ONCE:
            yield share
            share = []
        share.append(live)
    yield share


@dataclass(frozen=True, slots=True)
class _Run:
    """One run over many envelopes: by whom, and whether anything is mended."""

    database: Database
    actor: str
    is_applied: bool
    patience: timedelta

    async def advance(self, progress: Progress, lives: Sequence[Live]) -> Progress:
        """Compare some envelopes, and look again at those that differ."""
        compared = await compare(self.database, [live for live in lives if not live.is_erased])
        fates = [(each, *await self._settle(each)) for each in compared if each.differences]
        found = [fate for _, _, fate in fates]
        return replace(
            progress,
            last=lives[-1].key,
            done=progress.done + len(lives),
            different=progress.different
            + found.count(_Fate.DIFFERENT)
            + found.count(_Fate.APPLIED),
            applied=progress.applied + found.count(_Fate.APPLIED),
            from_row=progress.from_row + sum(each.is_from_row for each in compared),
            erased=progress.erased + len(lives) - len(compared),
            busy=progress.busy + found.count(_Fate.BUSY),
            found=tuple(each for _, differences, _ in fates for each in differences),
        )

    async def _settle(self, compared: Compared) -> tuple[tuple[Difference, ...], _Fate]:
        """Look again until the row has not changed since it was compared."""
        end = asyncio.get_running_loop().time() + self.patience.total_seconds()
        while compared.differences and not await self._holds(compared):
            if asyncio.get_running_loop().time() > end:
                return (), _Fate.BUSY
            await asyncio.sleep(PAUSE.total_seconds())
            compared = await self._again(compared)
        return compared.differences, self._fate_of(compared)

    def _fate_of(self, compared: Compared) -> _Fate:
        if not compared.differences:
            return _Fate.EQUAL
        return _Fate.APPLIED if self.is_applied else _Fate.DIFFERENT

    async def _again(self, compared: Compared) -> Compared:
        """Compare one envelope once more, unless it was erased meanwhile."""
        account, envelope_id = compared.live.key
        async with self.database.begin(limit=LIMIT, is_reading=True) as connection:
            [live] = await rebuilding.find(connection, envelope_id, account)
        if live.is_erased:
            return replace(compared, envelope=compared.live.envelope)
        [compared] = await compare(self.database, [live])
        return compared

    async def _holds(self, compared: Compared) -> bool:
        """Whether what was found is still true; if it is to be mended, it is now."""
        if self.is_applied:
            return await self._mend(compared)
        account, envelope_id = compared.live.key
        async with self.database.begin(limit=LIMIT, is_reading=True) as connection:
            return await rebuilding.find(connection, envelope_id, account) == [compared.live]

    async def _mend(self, compared: Compared) -> bool:
        account, envelope_id = key = compared.live.key
        async with self.database.begin(limit=LIMIT) as connection:
            held = (await envelopes.lock(connection, [key])).get(key)
            live = await rebuilding.find(connection, envelope_id, account)
            if held is None or live != [compared.live]:
                return False
            event_id = await _write(connection, held, compared, actor=self.actor)
        log.info(
            "envelope.rebuilt",
            envelope_id=envelope_id,
            event_id=str(event_id),
            columns=[each.column for each in compared.differences],
        )
        return True


async def _write(connection: Connection, held: Held, compared: Compared, *, actor: str) -> UUID:
    """Let a row say what its events make of it, and tell so by an event of our own."""
    was, held.envelope = held.envelope.status, compared.envelope
    held.version += 1
    held.sequence += 1
    held.updated_at, held.is_changed = datetime.now(UTC), True
    said = {
        "columns": [each.column for each in compared.differences],
        "was": was,
        "status": held.envelope.status,
    }
    account, envelope_id = held.key
    raised = OwnEvent(
        REBUILT,
        account,
        envelope_id,
        said,
        effect=Effect.APPLIED,
        sequence=held.sequence,
        status=held.envelope.status,
        version=held.version,
        at=held.updated_at,
    )
    await envelopes.write(connection, [held])
    await own_events.add(connection, [raised])
    await deliveries.audit(
        connection,
        actor=actor,
        action="envelope.rebuilt",
        subject=f"envelope:{envelope_id}",
        details={"account": account, "event_id": str(raised.id), **said},
    )
    return raised.id
