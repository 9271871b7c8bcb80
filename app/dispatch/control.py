"""What an operator may do: look, retry, discard, pause, forget; every act is written down."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Any
from uuid import UUID

from app.dispatch.options import DispatchOptions
from app.errors import NotAllowed, NotFound
from app.store import acts, deliveries, forgetting, pauses
from app.store import callbacks as subscriptions
from app.store.callbacks import Registered, Subscription
from app.store.deliveries import (
    DEAD,
    DISCARDED,
    DONE,
    EVERYTHING,
    PARKED,
    PENDING,
    RUNNING,
    Delivery,
    Wanted,
)
from app.store.pauses import Flow
from app.store.session import Connection, Database
from app.store.sight import Sight

LIMIT = timedelta(seconds=5)
LARGEST_PAGE = 1000
# So many are looked at, at once, for those that fit; and so often for one page, if it is a
# person who waits for it.
LOOKED_AT, LOOKS = 1000, 200
DISCARDED_AT_ONCE = 500
# Intake remembers for a second who is owed an event, and takes a moment to commit.
MEMORY = timedelta(seconds=3)
RETRIED, GIVEN_UP = "delivery.retried", "delivery.discarded"
STATES = (PENDING, RUNNING, DONE, DEAD, DISCARDED, PARKED)


@dataclass(frozen=True, slots=True)
class Page:
    """Some deliveries, newest first, and where the next page begins."""

    items: tuple[Delivery, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class CallbackStatus:
    """A callback, whether a process serves it, and how many deliveries wait for what."""

    registered: Registered
    counts: Mapping[str, int]
    flow: Flow
    # Why somebody paused it.
    pause_reason: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """One delivery, every attempt at it, and what operators did to it."""

    delivery: Delivery
    attempts: Sequence[Any]
    acts: Sequence[Any]


async def list_deliveries(  # noqa: PLR0913  # each filter is a word that operators write by name
    database: Database,
    *,
    state: str | None = None,
    callback: str | None = None,
    envelope_id: str | None = None,
    sight: Sight = EVERYTHING,
    limit: int = 50,
    cursor: str | None = None,
    looks: int = LOOKS,
) -> Page:
    """Give the newest deliveries that match; `cursor` continues after an earlier page.

    One look is at a bounded number of deliveries, so that a page may be short, or empty, and
    still not the last one.
    """
    if state is not None and state not in STATES:
        raise NotFound(f"there is no state {state!r}: the states are {', '.join(STATES)}")
    before = None if cursor is None else as_id(cursor, "a cursor")
    search = _Search(Wanted(state, callback, envelope_id), sight, min(limit, LARGEST_PAGE), before)
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        while looks > 0 and await search.look(connection):
            looks -= 1
        items = await deliveries.read(connection, search.found, sight)
        if callback is not None and not items:
            require_callback(await subscriptions.read(connection), callback, sight=sight)
    return Page(tuple(reversed(items)), search.next_cursor)


class _Search:
    """Goes through deliveries, newest first, for those that a list shows."""

    def __init__(self, wanted: Wanted, sight: Sight, size: int, before: UUID | None) -> None:
        self._wanted = wanted
        self._sight = sight
        self._size = max(1, size)
        self._at_once = LOOKED_AT if wanted.is_narrow(sight) else self._size + 1
        self._before = before
        self._is_over = False
        self.found: list[UUID] = []

    async def look(self, connection: Connection) -> bool:
        """Look at some more; False once the page is full, or there are no more."""
        seen = await deliveries.scan(
            connection, self._wanted, self._sight, before=self._before, limit=self._at_once
        )
        self._is_over = len(seen) < self._at_once
        for id_, fits in seen:
            if fits and len(self.found) == self._size:
                self._is_over = False
                return False
            if fits:
                self.found.append(id_)
            self._before = id_
        return not self._is_over

    @property
    def next_cursor(self) -> str | None:
        """Where to look on; None if everything was looked at."""
        return None if self._is_over or self._before is None else str(self._before)


async def find(database: Database, delivery_id: UUID | str, *, sight: Sight = EVERYTHING) -> Found:
    """Give one delivery with its history."""
    wanted = as_id(delivery_id, "a delivery")
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        found = await deliveries.read(connection, [wanted], sight)
        if not found:
            raise NotFound(f"there is no delivery {wanted}")
        attempts = await deliveries.attempts_of(connection, [wanted])
        return Found(found[0], attempts, await acts.of(connection, f"delivery:{wanted}"))


async def retry(
    database: Database, delivery_id: UUID | str, *, actor: str, sight: Sight = EVERYTHING
) -> Delivery:
    """Make a delivery due now and give it a fresh round of attempts; gives it as it was."""
    act = _Act(RETRIED, actor)
    return await act.do(database, delivery_id, sight)


async def discard(
    database: Database,
    delivery_id: UUID | str,
    *,
    reason: str,
    actor: str,
    sight: Sight = EVERYTHING,
) -> Delivery:
    """Owe a delivery no longer, also if it is just being tried; gives it as it was."""
    act = _Act(GIVEN_UP, actor, reason)
    return await act.do(database, delivery_id, sight)


async def list_callbacks(
    database: Database,
    *,
    unserved_after: timedelta | None = None,
    sight: Sight = EVERYTHING,
) -> list[CallbackStatus]:
    """Give every callback that was ever registered, with what is owed to it.

    Who sees only some accounts is not told of the callbacks of others.
    """
    after = unserved_after or DispatchOptions().served_within
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        registered = await subscriptions.read_all(connection, unserved_after=after)
        counts = await deliveries.count_unsettled(connection, sight)
        flows = await pauses.read(connection)
        reasons = await _pause_reasons(connection, flows.values())
    return [
        CallbackStatus(
            each,
            {
                state: number
                for (name, state), number in sorted(counts.items())
                if name == each.subscription.name
            },
            flows[each.subscription.name],
            reasons.get(each.subscription.name),
        )
        for each in registered
        # One may be forgotten in between.
        if each.subscription.name in flows and is_seen(each.subscription, sight)
    ]


def is_seen(subscription: Subscription, sight: Sight) -> bool:
    """Whether a callback may have to do with what is seen."""
    is_shared = sight.accounts is None or subscription.account is None
    return is_shared or subscription.account in (sight.accounts or ())


async def _pause_reasons(connection: Connection, flows: Iterable[Flow]) -> dict[str, str | None]:
    paused = {f"callback:{flow.name}": flow.name for flow in flows if flow.paused_at is not None}
    if not paused:
        return {}
    found = await acts.latest(connection, paused, "callback.paused")
    return {paused[subject]: (row.details or {}).get("reason") for subject, row in found.items()}


async def pause(database: Database, name: str, *, reason: str, actor: str) -> bool:
    """Deliver nothing more to a callback: its deliveries gather. False if it was paused."""
    async with database.begin(limit=LIMIT) as connection:
        require_callback(await subscriptions.read(connection), name)
        is_changed = await pauses.pause(connection, name)
        if is_changed:
            await deliveries.audit(
                connection,
                actor=actor,
                action="callback.paused",
                subject=f"callback:{name}",
                details={"reason": reason},
            )
    return is_changed


async def resume(database: Database, name: str, *, actor: str) -> bool:
    """Deliver to a callback again, also if its breaker stopped that. False if nothing did."""
    async with database.begin(limit=LIMIT) as connection:
        require_callback(await subscriptions.read(connection), name)
        flow = (await pauses.read(connection))[name]
        is_changed = await pauses.resume(connection, name)
        if is_changed:
            await deliveries.audit(
                connection,
                actor=actor,
                action="callback.resumed",
                subject=f"callback:{name}",
                details={"was": describe_hold(flow)},
            )
    return is_changed


async def forget(database: Database, name: str, *, reason: str, actor: str) -> int:
    """Take a callback that is gone for good out of the register; say how much was owed to it.

    What is owed to it or parked for it is discarded, its dead letters stay. Cut off in the
    middle, it can be said again; who registers under this name later, begins anew.
    """
    async with database.begin(limit=LIMIT) as connection:
        await forgetting.lock(connection, name)
        flow = (await pauses.read(connection)).get(name)
        if flow is not None and is_served(flow):
            raise NotAllowed(_still_served(flow))
        if flow is None and not await forgetting.is_owed(connection, name):
            require_callback(await subscriptions.read(connection), name)
        await forgetting.forget(connection, name)
        await deliveries.audit(
            connection,
            actor=actor,
            action="callback.forgotten",
            subject=f"callback:{name}",
            details={"reason": reason},
        )
    discarded = await _give_up(database, name)
    # Twice: intake may have owed it something more meanwhile.
    await asyncio.sleep(MEMORY.total_seconds())
    return discarded + await _give_up(database, name)


async def _give_up(database: Database, name: str) -> int:
    total = 0
    while True:
        async with database.begin(limit=LIMIT) as connection:
            discarded = await forgetting.give_up(connection, name, limit=DISCARDED_AT_ONCE)
        if not discarded:
            return total
        total += discarded


def is_served(flow: Flow) -> bool:
    """Whether some process has said lately that it serves the callback."""
    return flow.seen_ago <= DispatchOptions().served_within


def _still_served(flow: Flow) -> str:
    within = DispatchOptions().served_within.total_seconds()
    return (
        f"a process served {flow.name!r} {flow.seen_ago.total_seconds():.0f} s ago: take it out of "
        f"CALLBACKS everywhere, restart, and wait for {within:.0f} s"
    )


def require_callback(
    registered: Sequence[Subscription], name: str, *, sight: Sight = EVERYTHING
) -> Subscription:
    """Give the callback of this name. Raises `NotFound`, which names those that are seen."""
    seen = [each for each in registered if is_seen(each, sight)]
    for each in seen:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in seen) or "none: no process has loaded any"
    raise NotFound(
        f"there is no callback {name!r}; registered: {known} (a new one is registered once a "
        "process that has it was started)"
    )


def describe_hold(flow: Flow) -> str | None:
    """Say what keeps a callback from being given anything, if something does."""
    if flow.paused_at is not None:
        return f"callback {flow.name!r} is paused: `callbacks resume {flow.name}`"
    if flow.open_until is not None:
        until = flow.open_until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"the breaker of callback {flow.name!r} is open until {until}"
    return None


@dataclass(frozen=True, slots=True)
class _Act:
    """What somebody does to one delivery, and why."""

    action: str
    actor: str
    reason: str | None = None

    async def do(self, database: Database, delivery_id: UUID | str, sight: Sight) -> Delivery:
        wanted = as_id(delivery_id, "a delivery")
        refusal, change = _ACTS[self.action]
        async with database.begin(limit=LIMIT) as connection:
            delivery = await deliveries.lock(connection, wanted, sight)
            if delivery is None:
                raise NotFound(f"there is no delivery {wanted}")
            if (text := refusal(delivery)) is not None:
                raise NotAllowed(f"delivery {wanted} {text}")
            if self.action == RETRIED:
                # Of one that was forgotten nobody would ever try it, nor set it aside.
                registered = await subscriptions.read(connection)
                require_callback(registered, delivery.callback, sight=sight)
            await change(connection, wanted)
            await self._write_down(connection, delivery)
        return delivery

    async def _write_down(self, connection: Connection, was: Delivery) -> None:
        details = {"from_state": was.state, "attempts": was.attempts, "reason": self.reason}
        await deliveries.audit(
            connection,
            actor=self.actor,
            action=self.action,
            subject=f"delivery:{was.id}",
            details=details,
        )


def _refuse_retry(delivery: Delivery) -> str | None:
    """Say why a delivery cannot be retried, if it cannot."""
    return {
        DONE: f"is done; {_redispatch(delivery)} delivers its event once more: that makes a new "
        "generation, with an idempotency key of its own",
        DISCARDED: f"is discarded; {_redispatch(delivery)} delivers its event all the same",
        RUNNING: "is being tried right now; wait for the end of the attempt",
        PARKED: f"is parked, because no process serves {delivery.callback!r} any more; it is owed "
        "again as soon as one does",
    }.get(delivery.state)


def _redispatch(delivery: Delivery) -> str:
    return f"`events redispatch {delivery.event_id} --callback {delivery.callback}`"


def _refuse_discard(delivery: Delivery) -> str | None:
    """Say why a delivery cannot be discarded, if it cannot."""
    return {
        DONE: "is done: there is nothing left to discard",
        DISCARDED: "is discarded already",
    }.get(delivery.state)


_ACTS = {
    RETRIED: (_refuse_retry, deliveries.retry),
    GIVEN_UP: (_refuse_discard, deliveries.discard),
}


def as_id(value: UUID | str, what: str) -> UUID:
    """Read the id of something; what is none is not found."""
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except ValueError:
        raise NotFound(f"{value!r} is not the id of {what}: that is a UUID") from None
