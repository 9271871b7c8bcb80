"""Replay with intent: an event owed again, and the past owed to a new callback."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from app.dispatch.control import LIMIT, as_id, is_seen, require_callback
from app.errors import NotAllowed, NotFound
from app.store import callbacks, deliveries, events, replays
from app.store.callbacks import OVERLAP, Subscription
from app.store.deliveries import EVERYTHING
from app.store.ids import first_id_at
from app.store.replays import Owed
from app.store.session import Connection, Database, DatabaseError
from app.store.sight import Sight

# How far ahead of their time deliveries of the past are made. What is live and of the same
# envelope waits behind them for no longer, and an end by hand leaves no more than this behind.
AHEAD = timedelta(minutes=1)
RATE = 50.0
SPAN = 2000
AT_ONCE = 500
# Events that were never owed to anybody; the sweep of `store.callbacks` leaves them out, too.
NEVER_OWED = {"conflict", "quarantined", "refreshed"}


@dataclass(frozen=True, slots=True)
class Redelivery:
    """A delivery made by a redispatch."""

    id: UUID
    callback: str
    generation: int


async def redispatch(
    database: Database,
    event_id: UUID | str,
    *,
    actor: str,
    to: Collection[str] | None = None,
    sight: Sight = EVERYTHING,
) -> list[Redelivery]:
    """Owe an event again to every callback that asks for it now, or to some of them.

    Each gets a delivery of its own, with an idempotency key of its own, whatever became of
    those before. If one that is named does not ask for it, none gets any. Callbacks that are
    not seen are neither given it nor named.
    """
    wanted = as_id(event_id, "an event")
    async with database.begin(limit=LIMIT) as connection:
        event = await events.lock(connection, wanted)
        if event is None:
            raise NotFound(f"there is no event {wanted}")
        _refuse_redispatch(event)
        registered = [each for each in await callbacks.read(connection) if is_seen(each, sight)]
        names = _interested(registered, event, to)
        made = await _owe_again(connection, event, names)
        details = {each.callback: each.generation for each in made}
        await deliveries.audit(
            connection,
            actor=actor,
            action="event.redispatched",
            subject=f"event:{wanted}",
            details={"generations": details},
        )
    return made


def _refuse_redispatch(event: Any) -> None:
    if event.effect == "quarantined":
        raise NotAllowed(
            f"event {event.id} was not understood ({event.reason}), so nobody asked for it: "
            "reproject it first"
        )
    if event.effect == "conflict":
        raise NotAllowed(
            f"event {event.id} contradicts event {event.original_id} and was not applied: "
            f"if its word is the right one, `events reproject {event.id} --accept`"
        )


def _interested(
    registered: Sequence[Subscription], event: Any, to: Collection[str] | None
) -> list[str]:
    if to is not None:
        registered = [require_callback(registered, name) for name in dict.fromkeys(to)]
    names = [each.name for each in registered if each.wants(event.type, event.account)]
    if not names or (to is not None and len(names) < len(registered)):
        others = [each for each in registered if each.name not in names]
        asked = "; ".join(map(_described, others)) or "none is registered"
        raise NotAllowed(f"no such callback asks for {event.type} of {event.account}: {asked}")
    return names


def _described(subscription: Subscription) -> str:
    account = f" of {subscription.account}" if subscription.account else ""
    return f"{subscription.name} asks for {', '.join(subscription.patterns)}{account}"


async def _owe_again(connection: Connection, event: Any, names: Sequence[str]) -> list[Redelivery]:
    made: list[Redelivery] = []
    while names:
        latest = await replays.generations(connection, event.id)
        owed = await replays.owe(
            connection,
            [
                Owed(
                    event.id,
                    name,
                    event.account,
                    event.envelope_id,
                    event.sequence,
                    latest.get(name, 0) + 1,
                )
                for name in names
            ],
        )
        made += [Redelivery(id_, each.callback, each.generation) for id_, each in owed.items()]
        # The first generation of one may just have been made by intake or by the sweep.
        names = [name for name in names if name not in {each.callback for each in made}]
    return made


@dataclass(frozen=True, slots=True)
class Backfilled:
    """How far a backfill has come: events that were missing, and those that are owed now."""

    total: int
    owed: int


async def count_backfill(
    database: Database, name: str, *, since: datetime, until: datetime | None = None
) -> Mapping[str, int]:
    """Count, by type, what a backfill would owe; change nothing."""
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        subscription = require_callback(await callbacks.read(connection), name)
    counts: Counter[str] = Counter()
    async for missing in _missing(database, subscription, _Span.of(since, until)):
        counts.update(row.type for row in missing)
    return dict(sorted(counts.items()))


async def backfill(
    database: Database,
    name: str,
    *,
    since: datetime,
    until: datetime | None = None,
    rate: float = RATE,
    actor: str,
) -> AsyncGenerator[Backfilled, None]:
    """Owe a callback the events of the past that it asks for and was never owed.

    They become due one after the other, `rate` a second, in the order of their receipt;
    what arrives meanwhile is due between them. Ended in the middle it can be said again,
    and goes on where it was.
    """
    if not rate > 0:
        raise NotAllowed("a rate is how many a second, so it must be above 0")
    until = until or datetime.now(UTC)
    counts = await count_backfill(database, name, since=since, until=until)
    run = _Backfill(database, name, rate=rate, total=sum(counts.values()))
    details = {"since": since.isoformat(), "until": until.isoformat(), "rate": rate}
    start = {**details, "count": run.total}
    await _note(database, name, "callback.backfilled", actor=actor, details=start)
    try:
        yield run.progress()
        async for progress in run.steps(_Span.of(since, until)):
            yield progress
    finally:
        end = {"owed": run.owed, "is_complete": run.is_complete}
        with suppress(*DatabaseError):
            await _note(database, name, "callback.backfill_ended", actor=actor, details=end)


async def _note(
    database: Database, name: str, action: str, *, actor: str, details: Mapping[str, Any]
) -> None:
    async with database.begin(limit=LIMIT) as connection:
        await deliveries.audit(
            connection, actor=actor, action=action, subject=f"callback:{name}", details=details
        )


@dataclass(frozen=True, slots=True)
class _Span:
    """A length of time, as times of receipt and as the ids made in it."""

    since: datetime
    until: datetime
    after: UUID
    last: UUID

    @classmethod
    def of(cls, since: datetime, until: datetime | None) -> "_Span":
        end = until or datetime.now(UTC)
        # An id may be made a moment before or behind the time of receipt beside it.
        margin = OVERLAP.total_seconds()
        first, last = since.timestamp() - margin, end.timestamp() + margin
        return cls(since, end, first_id_at(first), first_id_at(last))


async def _missing(
    database: Database, subscription: Subscription, span: _Span
) -> AsyncIterator[list[Any]]:
    """Give, some at a time and in order, the events that a callback asks for and never got."""
    while True:
        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            past = await replays.span(
                connection, subscription.name, after=span.after, last=span.last, limit=SPAN
            )
        if not past:
            return
        yield [
            each.row
            for each in past
            if not each.is_owed
            and each.row.effect not in NEVER_OWED
            and span.since <= each.row.received_at < span.until
            and subscription.wants(each.row.type, each.row.account)
        ]
        span = replace(span, after=past[-1].row.id)


class _Backfill:
    """One backfill while it goes on."""

    def __init__(self, database: Database, name: str, *, rate: float, total: int) -> None:
        self._database = database
        self._name = name
        self._rate = rate
        self._at_once = max(1, min(AT_ONCE, int(rate * AHEAD.total_seconds() / 4)))
        self._next = _clock()
        self.total = total
        self.owed = 0
        self.is_complete = False

    def progress(self) -> Backfilled:
        return Backfilled(max(self.total, self.owed), self.owed)

    async def steps(self, span: _Span) -> AsyncGenerator[Backfilled, None]:
        async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
            subscription = require_callback(await callbacks.read(connection), self._name)
        async for missing in _missing(self._database, subscription, span):
            for start in range(0, len(missing), self._at_once):
                await self._owe(missing[start : start + self._at_once])
                yield self.progress()
                while (early := self._next - _clock() - AHEAD.total_seconds()) > 0:
                    await asyncio.sleep(min(early, 1))
                    yield self.progress()
        self.is_complete = True

    async def _owe(self, rows: Sequence[Any]) -> None:
        """Owe some events, each at its time."""
        ahead = max(0.0, self._next - _clock())
        owed = [
            Owed(
                row.id,
                self._name,
                row.account,
                row.envelope_id,
                row.sequence,
                wait=timedelta(seconds=ahead + number / self._rate),
            )
            for number, row in enumerate(rows)
        ]
        async with self._database.begin(limit=LIMIT) as connection:
            made = await replays.owe(connection, owed)
        self.owed += len(made)
        self._next = _clock() + ahead + len(rows) / self._rate


def _clock() -> float:
    return asyncio.get_running_loop().time()
