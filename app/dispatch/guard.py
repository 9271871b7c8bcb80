"""Breakers at work: count how calls end, tell the database, and know who is left alone."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from app.dispatch.attempt import Done, Failed, Outcome
from app.dispatch.breaker import Condition, Tally, advance
from app.dispatch.registry import Callback
from app.store import breakers
from app.store.breakers import Gate
from app.store.claims import Claim, Held, Room
from app.telemetry import get_logger

log = get_logger("dispatch")

# After a failure the database hears of it so soon, and of all that ended meanwhile.
SOON = 0.1
# A worker that probes and is lost lets others probe so long after its lease has ended.
PROBE_MARGIN = timedelta(seconds=5)

Begin = Callable[..., AbstractAsyncContextManager[Any]]


class Probes:
    """Which of our claims probe a callback whose breaker is half open.

    The right to do so is in the database. It lasts as long as a lease and is renewed with
    the leases; without a claim that still probes, it is given back.
    """

    def __init__(self, *, lease: timedelta) -> None:
        self._hold = lease + PROBE_MARGIN
        # Callbacks for which a claim is under way, then the claims.
        self._admitted: set[str] = set()
        self._claims: dict[Held, str] = {}
        # Callbacks that others may probe; the database is still to be told.
        self._idle: set[str] = set()

    async def admit(self, connection: Any, callback: str) -> bool:
        """Win or lose the right to probe with the next claim."""
        if not await breakers.probe(connection, callback, hold=self._hold):
            return False
        self._idle.discard(callback)
        self._admitted.add(callback)
        return True

    def begin(self, claimed: Sequence[Claim]) -> None:
        """Note which claims probe; others may probe what there was nothing to probe with."""
        begun = {c.held: c.callback for c in claimed if c.callback in self._admitted}
        self._claims |= begun
        self._idle |= self._admitted - set(begun.values())
        self._admitted.clear()

    def end(self, held: Held) -> bool:
        """Note that a call has ended; True if it was a probe."""
        return self._claims.pop(held, None) is not None

    def release(self, held: Iterable[Held]) -> None:
        """Note that claims are ours no more and show nothing, so that others may probe."""
        released = {self._claims.pop(key) for key in held if key in self._claims}
        self._idle |= released - set(self._claims.values())

    async def tell(self, connection: Any) -> None:
        """Let others probe what none of our claims probes any more."""
        if idle := sorted(self._idle):
            await breakers.unprobe(connection, idle)
            self._idle.difference_update(idle)

    async def renew(self, connection: Any) -> None:
        """Keep what is being probed, however long the calls take."""
        if names := sorted(set(self._claims.values())):
            await breakers.renew(connection, names, hold=self._hold)

    @property
    def is_idle(self) -> bool:
        """True if there is something to tell."""
        return bool(self._idle)


class Guard:
    """The gates of one process's callbacks, used from the dispatch loop only.

    What is known here may be a second old. The claim asks the database itself, so it is
    never wrong about an open breaker.
    """

    def __init__(
        self,
        callbacks: Iterable[Callback],
        begin: Begin,
        *,
        every: timedelta,
        lease: timedelta,
        on_shut: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        breakers_by_name = {callback.name: callback.breaker for callback in callbacks}
        self._callbacks = sorted(breakers_by_name)
        self._breakers = {name: b for name, b in breakers_by_name.items() if b is not None}
        self._begin = begin
        self._every = every
        self._on_shut = on_shut
        self.probes = Probes(lease=lease)
        self._tallies: dict[str, Tally] = {}
        self._gates: dict[str, Gate] = {}
        self._has_failed = asyncio.Event()

    def note(self, outcomes: Sequence[Outcome]) -> None:
        """Count how calls have ended; what an author decided is neither good nor bad.

        Of a probe it is good: nothing failed, and nobody else will tell.
        """
        for outcome in outcomes:
            name = outcome.call.callback.name
            is_probe = self.probes.end(outcome.call.claim.held)
            if name not in self._breakers:
                continue
            match outcome.verdict:
                case Failed(is_asked_for=False):
                    self._count(name, Tally(failed=1))
                    self._has_failed.set()
                case verdict if is_probe or isinstance(verdict, Done):
                    self._count(name, Tally(succeeded=1))

    def _count(self, name: str, tally: Tally) -> None:
        self._tallies[name] = self._tallies.get(name, Tally()) + tally

    def lets_through(self, callback: str) -> bool:
        """Tell whether it is worth asking for deliveries of this callback."""
        gate = self._gates.get(callback)
        return gate is None or not gate.is_shut

    async def admit(self, connection: Any, rooms: Sequence[Room]) -> list[Room]:
        """Leave out the callbacks that another process probes; few calls for those we probe."""
        admitted = []
        for room in rooms:
            gate = self._gates.get(room.callback)
            if gate is None or not gate.is_half_open:
                admitted.append(room)
            elif await self.probes.admit(connection, room.callback):
                probes = self._breakers[room.callback].probes
                admitted.append(replace(room, limit=min(room.limit, probes), is_probe=True))
        return admitted

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
        self._gates = gates
        # Each time: a claim may have been on its way when one was shut.
        if shut := {name for name, gate in gates.items() if gate.is_shut}:
            await self._on_shut(shut)

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._every.total_seconds()):
                await self._has_failed.wait()
        if self._has_failed.is_set():
            await asyncio.sleep(SOON)

    async def _exchange(self, tallies: Mapping[str, Tally]) -> dict[str, Gate]:
        async with self._begin(is_reading=True) as connection:
            gates = {g.callback: g for g in await breakers.read(connection, self._callbacks)}
        told = [n for n, tally in tallies.items() if n in gates and _is_news(gates[n], tally)]
        if told or self.probes.is_idle:
            async with self._begin() as connection:
                for gate in await breakers.read(connection, told, lock=True):
                    gates[gate.callback] = await self._tell(connection, gate, tallies)
                await self.probes.tell(connection)
        return gates | await self._forget(gates)

    async def _forget(self, gates: Mapping[str, Gate]) -> dict[str, Gate]:
        """Let everything through where only an older release still has a breaker."""
        found = [g for n, g in gates.items() if g.open_until and n not in self._breakers]
        if found:
            async with self._begin() as connection:
                await breakers.forget(connection, [gate.callback for gate in found])
        return {gate.callback: replace(gate, open_until=None, counted=None) for gate in found}

    async def _tell(self, connection: Any, gate: Gate, tallies: Mapping[str, Tally]) -> Gate:
        breaker = self._breakers[gate.callback]
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
