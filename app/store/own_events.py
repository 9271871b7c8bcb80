"""Events that the service raises about itself: stored and owed like any other, in one place.

Intake makes those that belong to a batch by itself, among the rows of the batch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.lifecycle import Effect
from app.store import callbacks, deliveries, events
from app.store.callbacks import Subscription
from app.store.deliveries import Owed
from app.store.ids import new_id


@dataclass(frozen=True, slots=True)
class OwnEvent:
    """One event of ours; what it says beside its name and envelope is in `said`.

    Without a `sequence` it has no place in the order of its envelope, and waits for nothing.
    """

    type: str
    account: str
    envelope_id: str | None
    said: Mapping[str, Any]
    effect: Effect = Effect.MILESTONE
    sequence: int | None = None
    status: str | None = None
    version: int | None = None
    original_id: UUID | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: UUID = field(default_factory=new_id)


async def add(connection: AsyncConnection, raised: Sequence[OwnEvent]) -> list[Owed]:
    """Store events of ours, and owe them to whoever asks for them; give what is owed."""
    if not raised:
        return []
    subscriptions = await callbacks.read(connection)
    owed = [row for each in raised for row in _owed(each, subscriptions)]
    bodies = [(each.id, _body(each)) for each in raised]
    await events.add(connection, [_row(each) for each in raised], bodies)
    await deliveries.enqueue(connection, owed)
    return owed


def _owed(raised: OwnEvent, subscriptions: Iterable[Subscription]) -> list[Owed]:
    return [
        (raised.id, each.name, raised.account, raised.envelope_id, raised.sequence)
        for each in subscriptions
        if each.wants(raised.type, raised.account)
    ]


def _row(raised: OwnEvent) -> tuple[Any, ...]:
    values = {
        "id": raised.id,
        "account": raised.account,
        "envelope_id": raised.envelope_id,
        "type": raised.type,
        "occurred_at": raised.at,
        "received_at": raised.at,
        "sequence": raised.sequence,
        "effect": raised.effect.value,
        "status": raised.status,
        "version": raised.version,
        "original_id": raised.original_id,
    }
    return tuple(values.get(name) for name in events.COLUMNS.names)


def _body(raised: OwnEvent) -> bytes:
    named = {"event": raised.type, "event_id": str(raised.id)}
    if raised.envelope_id is not None:
        named["envelope_id"] = raised.envelope_id
    return json.dumps({**named, **raised.said}).encode()
