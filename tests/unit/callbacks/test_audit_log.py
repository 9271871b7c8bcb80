"""The built-in callback writes one line, with the three words that Atlas' guides ask for."""

import dataclasses
from datetime import UTC, datetime
from types import MappingProxyType

import structlog

from app.callbacks import Event
from app.callbacks.audit_log import audit_log

EVENT = Event(
    id="e1",
    type="envelope.signed",
    account="default",
    tenant=None,
    envelope_id="env_1",
    atlas_event_id=None,
    occurred_at=None,
    received_at=datetime(2026, 1, 1, tzinfo=UTC),
    sequence=1,
    effect="applied",
    status="signed",
    data={"parties": [{"email": "ada@example.com"}]},
    envelope=MappingProxyType({"fields_status": "ready"}),
    delivery_id="d1",
    attempt=1,
    is_late=False,
    is_replay=False,
    callback="audit_log",
    deadline=datetime(2026, 1, 1, tzinfo=UTC),
)


async def logged(event: Event) -> dict[str, object]:
    with structlog.testing.capture_logs() as lines:
        await audit_log(event)
    (line,) = lines
    return dict(line)


async def test_says_what_came_and_not_what_it_says() -> None:
    line = await logged(EVENT)

    assert ("event.delivered", "env_1", "ready", "envelope.signed") == (
        line["event"],
        line["envelope_id"],
        line["fields_status"],
        line["event_type"],
    )
    assert "ada" not in str(line)


async def test_an_event_about_no_envelope_is_fine() -> None:
    line = await logged(dataclasses.replace(EVENT, envelope=None, envelope_id=None))

    assert line["fields_status"] is None
