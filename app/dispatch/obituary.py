"""Say of a delivery that died that it did: `receiver.dead`, an event of our own.

It is raised in the transaction that buries the delivery, and owed to whoever asks for it.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from app.events.lifecycle import Effect
from app.store import callbacks, deliveries, events
from app.store.callbacks import OWN_EVENTS
from app.store.deliveries import Delivery, Owed
from app.store.ids import new_id

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
    subscriptions = await callbacks.read(connection)
    rows, bodies, owed = [], [], list[Owed]()
    for delivery in dead:
        event_id = new_id()
        rows.append(_row(event_id, delivery))
        bodies.append((event_id, _body(event_id, delivery, known=known)))
        owed += [
            (event_id, each.name, delivery.account, delivery.envelope_id, None)
            for each in subscriptions
            if each.wants(DEAD, delivery.account)
        ]
        known.add(delivery.fingerprint or "")
    await events.add(connection, rows, bodies)
    await deliveries.enqueue(connection, owed)


def _row(event_id: UUID, delivery: Delivery) -> tuple[Any, ...]:
    now = datetime.now(UTC)
    # Without a place in the order of its envelope: it is no news about the envelope, and
    # must not wait for the events that it is about.
    said = {
        "id": event_id,
        "account": delivery.account,
        "envelope_id": delivery.envelope_id,
        "type": DEAD,
        "occurred_at": now,
        "received_at": now,
        "effect": Effect.MILESTONE.value,
        "original_id": delivery.event_id,
    }
    return tuple(said.get(name) for name in events.COLUMNS.names)


def _body(event_id: UUID, delivery: Delivery, *, known: set[str]) -> bytes:
    said = {
        "event": DEAD,
        "event_id": str(event_id),
        "about": str(delivery.event_id),
        "type": delivery.event_type,
        "envelope_id": delivery.envelope_id,
        "delivery_id": str(delivery.id),
        "callback": delivery.callback,
        "attempts": delivery.attempts,
        "error": delivery.last_error,
        "fingerprint": delivery.fingerprint,
        # One message for a whole group of dead letters may be enough.
        "is_first": (delivery.fingerprint or "") not in known,
    }
    return json.dumps({name: value for name, value in said.items() if value is not None}).encode()
