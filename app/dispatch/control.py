"""What an operator may do about deliveries: look, retry, discard; every act is written down."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from app.dispatch.options import DispatchOptions
from app.errors import NotAllowed, NotFound
from app.store import callbacks as subscriptions
from app.store import deliveries
from app.store.callbacks import Registered
from app.store.deliveries import DEAD, DISCARDED, DONE, PARKED, PENDING, RUNNING, Delivery
from app.store.session import Database

LIMIT = timedelta(seconds=5)
LARGEST_PAGE = 1000
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


async def list_deliveries(  # noqa: PLR0913  # each filter is a word that operators write by name
    database: Database,
    *,
    state: str | None = None,
    callback: str | None = None,
    envelope_id: str | None = None,
    account: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> Page:
    """Give the newest deliveries that match; `cursor` continues after an earlier page."""
    if state is not None and state not in STATES:
        raise NotFound(f"there is no state {state!r}: the states are {', '.join(STATES)}")
    filters = {
        "state": state,
        "callback": callback,
        "envelope_id": envelope_id,
        "account": account,
    }
    size = max(1, min(limit, LARGEST_PAGE))
    before = None if cursor is None else _id(cursor, "a cursor")
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        items = await deliveries.page(connection, filters=filters, limit=size + 1, before=before)
    is_last = len(items) <= size
    return Page(tuple(items[:size]), None if is_last else str(items[size - 1].id))


async def retry(database: Database, delivery_id: UUID | str, *, actor: str) -> Delivery:
    """Make a delivery due now and give it a fresh round of attempts; gives it as it was."""
    return await _act(database, delivery_id, "delivery.retried", actor=actor)


async def discard(
    database: Database, delivery_id: UUID | str, *, reason: str, actor: str
) -> Delivery:
    """Owe a delivery no longer, also if it is just being tried; gives it as it was."""
    return await _act(database, delivery_id, "delivery.discarded", actor=actor, reason=reason)


async def list_callbacks(
    database: Database, *, unserved_after: timedelta | None = None
) -> list[CallbackStatus]:
    """Give every callback that was ever registered, with what is owed to it."""
    after = unserved_after or DispatchOptions().park_after
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        registered = await subscriptions.read_all(connection, unserved_after=after)
        counts = await deliveries.count_unsettled(connection)
    return [
        CallbackStatus(
            each,
            {
                state: number
                for (name, state), number in sorted(counts.items())
                if name == each.subscription.name
            },
        )
        for each in registered
    ]


async def _act(
    database: Database,
    delivery_id: UUID | str,
    action: str,
    *,
    actor: str,
    reason: str | None = None,
) -> Delivery:
    wanted = _id(delivery_id, "a delivery")
    refusal, change = _ACTS[action]
    async with database.begin(limit=LIMIT) as connection:
        delivery = await deliveries.lock(connection, wanted)
        if delivery is None:
            raise NotFound(f"there is no delivery {wanted}")
        if (text := refusal(delivery)) is not None:
            raise NotAllowed(f"delivery {wanted} {text}")
        await change(connection, wanted)
        details = {"from_state": delivery.state, "attempts": delivery.attempts, "reason": reason}
        await deliveries.audit(
            connection, actor=actor, action=action, subject=f"delivery:{wanted}", details=details
        )
    return delivery


def _refuse_retry(delivery: Delivery) -> str | None:
    """Say why a delivery cannot be retried, if it cannot."""
    return {
        DONE: "is done; to deliver its event once more, redispatch the event: that makes a new "
        "generation, with an idempotency key of its own",
        RUNNING: "is being tried right now; wait for the end of the attempt",
        PARKED: f"is parked, because no process serves {delivery.callback!r} any more; it is owed "
        "again as soon as one does",
    }.get(delivery.state)


def _refuse_discard(delivery: Delivery) -> str | None:
    """Say why a delivery cannot be discarded, if it cannot."""
    return {
        DONE: "is done: there is nothing left to discard",
        DISCARDED: "is discarded already",
    }.get(delivery.state)


_ACTS = {
    "delivery.retried": (_refuse_retry, deliveries.retry),
    "delivery.discarded": (_refuse_discard, deliveries.discard),
}


def _id(value: UUID | str, what: str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except ValueError:
        raise NotFound(f"{value!r} is not the id of {what}: that is a UUID") from None
