"""Turn an event into a CloudEvent 1.0, as one JSON document.

The format is that of the CloudEvents specification, "JSON Event Format", in structured
mode: the document is the whole message, whatever carries it.
"""

import json
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Final

from app.callbacks import Event

CONTENT_TYPE: Final = "application/cloudevents+json"
# What Atlas said has Atlas' name in front, as the specification wants; what this service
# says of itself does not.
PREFIX: Final = "ai.atlaswork."
OWN: Final = "receiver."


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent, and what brokers need to know of it."""

    # The same in every attempt, so that a duplicate can be told.
    id: str
    # As callbacks know it: `envelope.signed`.
    event_type: str
    envelope_id: str | None
    body: bytes


def make(event: Event, *, source: str) -> Message:
    """Make the message of an event; `source` and its id together are unique."""
    attributes = {
        "specversion": "1.0",
        "id": event.delivery_id,
        "source": source,
        "type": type_of(event.type),
        "subject": event.envelope_id,
        "time": (event.occurred_at or event.received_at).astimezone(UTC).isoformat(),
        "datacontenttype": "application/json",
        "eventid": event.id,
        "atlaseventid": event.atlas_event_id,
    }
    # An attribute without a value is left out: empty ones are not allowed.
    known = {name: value for name, value in attributes.items() if value}
    document = {**known, "data": _data(event)}
    body = json.dumps(document, default=_plain, separators=(",", ":")).encode()
    return Message(event.delivery_id, event.type, event.envelope_id, body)


def type_of(event_type: str) -> str:
    """Name a type for the world: `ai.atlaswork.envelope.signed`."""
    return event_type if event_type.startswith(OWN) else f"{PREFIX}{event_type or 'unknown'}"


def _data(event: Event) -> dict[str, Any]:
    return {
        "account": event.account,
        "tenant": event.tenant,
        "envelope_id": event.envelope_id,
        "status": event.status,
        "sequence": event.sequence,
        "effect": event.effect,
        "is_late": event.is_late,
        "is_replay": event.is_replay,
        "event": event.data,
        "envelope": event.envelope,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    raise TypeError(f"{type(value).__name__} has no form in JSON")
