"""Say of a delivery that died that it did: `receiver.dead`, an event of our own.

It is raised in the transaction that buries the delivery, and owed to whoever asks for it.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from app.store import deliveries, own_events
from app.store.callbacks import OWN_EVENTS
from app.store.deliveries import Delivery
from app.store.own_events import OwnEvent

DEAD = "receiver.dead"


async def announce_dead(connection: Any, delivery_ids: Sequence[UUID]) -> None:
    """Raise an event for each of these deliveries, which this transaction has buried.

    The death of a delivery that is about an event of our own raises none: who is told of
    dead letters may be the one who fails.
    """
    if not delivery_ids:
        return
    dead = [
        delivery
        for delivery in await deliveries.read(connection, delivery_ids)
        if not (delivery.event_type or "").startswith(OWN_EVENTS)
    ]
    if not dead:
        return
    known = await deliveries.dead_fingerprints(
        connection, {d.fingerprint for d in dead if d.fingerprint}, but=delivery_ids
    )
    raised = []
    for delivery in dead:
        raised.append(_death_of(delivery, known=known))
        known.add(delivery.fingerprint or "")
    await own_events.add(connection, raised)


def _death_of(delivery: Delivery, *, known: set[str]) -> OwnEvent:
    said = {
        "about": str(delivery.event_id),
        "type": delivery.event_type,
        "delivery_id": str(delivery.id),
        "callback": delivery.callback,
        "attempts": delivery.attempts,
        "error": delivery.last_error,
        "fingerprint": delivery.fingerprint,
        # One message for a whole group of dead letters may be enough.
        "is_first": (delivery.fingerprint or "") not in known,
    }
    # Without a place in the order of its envelope: it is no news about the envelope, and
    # must not wait for the events that it is about.
    return OwnEvent(
        DEAD,
        delivery.account,
        delivery.envelope_id,
        {name: value for name, value in said.items() if value is not None},
        original_id=delivery.event_id,
    )
