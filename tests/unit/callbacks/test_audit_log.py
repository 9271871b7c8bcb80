"""The built-in callback writes one line, with the three words that Atlas' guides ask for."""

import structlog

from app.callbacks import Event
from app.callbacks.audit_log import audit_log
from app.callbacks.testing import change_event, make_event

EVENT = make_event(
    envelope_id="env_1",
    data={"parties": [{"email": "ada@example.com"}], "fields_status": "ready"},
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
    line = await logged(change_event(EVENT, envelope=None, envelope_id=None))

    assert line["fields_status"] is None
