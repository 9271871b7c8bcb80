"""Breakers at work: count how calls end, tell the database, and know who is left alone."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from app.dispatch.attempt import Done, Failed, Outcome
from app.dispatch.breaker import Breaker, Condition, Tally, advance
from app.dispatch.registry import Callback
from app.store import breakers
from app.store.breakers import Gate
from app.store.claims import Room
from app.telemetry import get_logger

log = get_logger("dispatch")

# After a failure the database hears of it so soon, and of all that ended meanwhile.
SOON = 0.1
# A worker that probes and is lost lets others probe so long after its call had to end.
PROBE_MARGIN = timedelta(seconds=5)

Begin = Callable[..., AbstractAsyncContextManager[Any]]


class Guard:
    """The breakers of one process's callbacks, used from the dispatch loop only.

    What is known here may be a second old. The claim asks the database itself, so it is
    never wrong about an open breaker.
    """

    def __init__(
        self,
        callbacks: Iterable[Callback],
        begin: Begin,
        *,
        every: timedelta,
        on_open: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        self._callbacks = {c.name: c for c in callbacks if c.breaker is not None}
        self._begin = begin
        self._every = every
        self._on_open = on_open
        self._tallies: dict[str, Tally] = {}
        self._gates: dict[str, Gate] = {}
        self._has_failed = asyncio.Event()

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Count how calls have ended; what an author decided is neither good nor bad."""
        for outcome in outcomes:
            name = outcome.call.callback.name
            if name not in self._callbacks:
                continue
            match outcome.verdict:
                case Done():
                    self._count(name, Tally(succeeded=1))
                case Failed(is_asked_for=False):
                    self._count(name, Tally(failed=1))
                    self._has_failed.set()

    def _count(self, name: str, tally: Tally) -> None:
        self._tallies[name] = self._tallies.get(name, Tally()) + tally

    def lets_through(self, callback: str) -> bool:
        """Tell whether it is worth asking for deliveries of this callback."""
        gate = self._gates.get(callback)
        return gate is None or gate.open_until is None or gate.is_half_open

    async def admit(self, connection: Any, rooms: Sequence[Room]) -> list[Room]:
        """Leave out the callbacks that another process probes; few calls for those we probe."""
        admitted = []
        for room in rooms:
            gate = self._gates.get(room.callback)
            if gate is None or not gate.is_half_open:
                admitted.append(room)
            elif (probe := await self._probe(connection, room)) is not None:
                admitted.append(probe)
        return admitted

    async def _probe(self, connection: Any, room: Room) -> Room | None:
        callback = self._callbacks[room.callback]
        hold = callback.timeout + PROBE_MARGIN
        if not await breakers.probe(connection, room.callback, hold=hold):
            return None
        return replace(room, limit=min(room.limit, _breaker(callback).probes), is_probe=True)

    async def release_idle(
        self, connection: Any, rooms: Sequence[Room], claimed: Iterable[str]
    ) -> None:
        """Let others probe what there was nothing to probe with."""
        idle = {room.callback for room in rooms if room.is_probe} - set(claimed)
        if idle:
            await breakers.unprobe(connection, sorted(idle))

    async def step(self) -> None:
        """Tell the database what was counted, and read how things are."""
        await self._wait()
        self._has_failed.clear()
        tallies, self._tallies = self._tallies, {}
        try:
            gates = await self._exchange(tallies)
        except BaseException:
            for name, tally in tallies.items():
                self._count(name, tally)
            raise
        opened = {name for name, gate in gates.items() if _is_shut(gate)}
        opened -= {name for name, gate in self._gates.items() if _is_shut(gate)}
        self._gates = gates
        if opened:
            await self._on_open(opened)

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._every.total_seconds()):
                await self._has_failed.wait()
        if self._has_failed.is_set():
            await asyncio.sleep(SOON)

    async def _exchange(self, tallies: Mapping[str, Tally]) -> dict[str, Gate]:
        if not self._callbacks:
            return {}
        async with self._begin(is_reading=True) as connection:
            gates = {g.callback: g for g in await breakers.read(connection, self._callbacks)}
        told = [n for n, tally in tallies.items() if n in gates and _is_news(gates[n], tally)]
        if told:
            async with self._begin() as connection:
                for gate in await breakers.read(connection, told, lock=True):
                    gates[gate.callback] = await self._tell(connection, gate, tallies)
        return gates

    async def _tell(self, connection: Any, gate: Gate, tallies: Mapping[str, Tally]) -> Gate:
        breaker = _breaker(self._callbacks[gate.callback])
        before = _condition(gate)
        after = advance(before, tallies[gate.callback], breaker=breaker, now=gate.at)
        if after == before:
            return gate
        counted = None if after.is_clean else _document(after)
        changed = replace(gate, open_until=after.open_until, counted=counted)
        await breakers.write(connection, changed)
        if after.trips > before.trips:
            tally = before.tally + tallies[gate.callback]
            log.warning(
                "breaker.opened",
                callback=gate.callback,
                failed=tally.failed,
                ended=tally.total,
                until=after.open_until.isoformat() if after.open_until else None,
            )
        elif before.open_until is not None and after.open_until is None:
            log.info("breaker.closed", callback=gate.callback)
        return changed


def _breaker(callback: Callback) -> Breaker:
    assert callback.breaker is not None  # others are not kept here
    return callback.breaker


def _is_shut(gate: Gate) -> bool:
    return gate.open_until is not None and not gate.is_half_open


def _is_news(gate: Gate, tally: Tally) -> bool:
    """Tell whether the database wants to hear of it: not of successes where all is well."""
    return tally.failed > 0 or not _condition(gate).is_clean


def _condition(gate: Gate) -> Condition:
    counted = gate.counted or {}
    try:
        return Condition(
            since=datetime.fromisoformat(counted["since"]) if counted else gate.at,
            tally=Tally(int(counted.get("succeeded", 0)), int(counted.get("failed", 0))),
            trips=int(counted.get("trips", 0)),
            open_until=gate.open_until,
        )
    except (KeyError, TypeError, ValueError):
        # What cannot be read is counted anew.
        return Condition(since=gate.at, open_until=gate.open_until)


def _document(condition: Condition) -> dict[str, Any]:
    return {
        "since": condition.since.isoformat(),
        "succeeded": condition.tally.succeeded,
        "failed": condition.tally.failed,
        "trips": condition.trips,
    }
