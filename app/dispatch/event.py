"""What a callback is given: one event, as its author wants to read it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from app.errors import AppError
from app.events.redaction import redact
from app.store.claims import Claim
from app.store.contents import Content, Decoded, decode


class Undecodable(AppError):
    """What is stored can no longer be read; the text says which part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that Atlas said, owed to one callback.

    A callback may be called more than once for one event: after a failure, after a crash,
    and when an operator replays it. `delivery_id` is the same in every attempt, so give it
    to whatever you call as the idempotency key.
    """

    id: str
    type: str
    account: str
    # Atlas' connected account, if the envelope belongs to one.
    tenant: str | None
    envelope_id: str | None
    # The sender's own id, if it gave one.
    atlas_event_id: str | None
    occurred_at: datetime | None
    received_at: datetime
    # The place among the events of this envelope; they are delivered in this order.
    sequence: int | None
    # What it did to the envelope: applied, stale, milestone, …
    effect: str
    # The envelope's status after this event.
    status: str | None
    # The parsed body without its secrets; None once the bytes are pruned.
    data: Any
    # The envelope as it is now, which may be ahead of this event.
    envelope: Mapping[str, Any] | None
    delivery_id: str
    attempt: int
    # A later event of this envelope has been delivered already.
    is_late: bool
    # Somebody asked for this event to be delivered again.
    is_replay: bool
    callback: str
    # When the call will be given up.
    deadline: datetime


def build(claim: Claim, content: Content | None, *, deadline: datetime) -> Event:
    """Make the event of a claimed delivery. Raises `Undecodable` for a damaged row."""
    stored = _decoded(content)
    event, envelope = stored.event, stored.envelope
    if event is None:
        raise Undecodable("the event of this delivery is not in the database any more")
    return Event(
        id=str(event["id"]),
        type=event["type"] or "",
        account=event["account"],
        tenant=envelope["tenant"] if envelope else None,
        envelope_id=event["envelope_id"],
        atlas_event_id=event["atlas_event_id"],
        occurred_at=event["occurred_at"],
        received_at=event["received_at"],
        sequence=event["sequence"],
        effect=event["effect"],
        status=event["status"],
        data=_data(stored.body),
        envelope=MappingProxyType(dict(envelope)) if envelope else None,
        delivery_id=str(claim.id),
        attempt=claim.attempt,
        is_late=stored.is_late,
        is_replay=claim.generation > 1,
        callback=claim.callback,
        deadline=deadline,
    )


def _decoded(content: Content | None) -> Decoded:
    if content is None:
        raise Undecodable("the delivery is not in the database any more")
    try:
        return decode(content)
    except (ValueError, TypeError) as error:
        raise Undecodable(f"a stored value can no longer be read: {error}") from error


def _data(body: bytes | None) -> Any:
    if body is None:
        return None
    try:
        return redact(json.loads(body))
    except (ValueError, RecursionError) as error:
        # The text of a decoding error may quote the body.
        name = type(error).__name__
        raise Undecodable(f"the stored body can no longer be decoded ({name})") from None
