"""Try callbacks without a server: make an event, and see what they answer to it.

Usage::

    from app.callbacks.testing import deliver, make_event

    async def test_starts_onboarding() -> None:
        event = make_event("envelope.signed", data={"metadata": {"external_id": "crm-7"}})

        assert {"start_onboarding": Done()} == await deliver(callbacks, event)
"""

import json
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from app.dispatch.attempt import Call, Dead, Done, Failed, Skipped, Verdict, run, run_plain
from app.dispatch.event import Envelope, Event, Lazy
from app.dispatch.registry import Callback, Callbacks
from app.events.lifecycle import BLANK, project
from app.events.payload import parse
from app.events.redaction import redact
from app.store.claims import Claim
from app.store.ids import new_id

__all__ = ["Dead", "Done", "Failed", "Skipped", "change_event", "deliver", "make_event"]


def make_event(
    event_type: str = "envelope.signed",
    *,
    envelope_id: str = "env_1",
    data: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Event:
    """Make the event that a callback would be given if Atlas sent `data`.

    The envelope is what this one event makes of it. `changes` are put in place of fields of
    the event: `attempt=3`, `is_late=True`, `envelope=None`. Raises `PayloadRejected` for
    data that would go to quarantine.
    """
    body = {"event": event_type, "envelope_id": envelope_id, **(data or {})}
    now = datetime.now(UTC)
    parsed = parse(json.dumps(body).encode(), received_at=now)
    state, effect = project(BLANK, parsed, received_at=now)
    envelope = _envelope(state, envelope_id=envelope_id, at=now)
    event = Event(
        id=str(new_id()),
        type=parsed.type,
        account="default",
        tenant=envelope.tenant,
        envelope_id=envelope_id,
        atlas_event_id=parsed.atlas_event_id,
        occurred_at=parsed.occurred_at,
        received_at=now,
        sequence=1,
        effect=effect.value,
        status=envelope.status,
        version=envelope.version,
        delivery_id=str(new_id()),
        attempt=1,
        is_late=False,
        is_replay=False,
        callback="",
        deadline=now + timedelta(seconds=30),
        _data=Lazy(lambda: redact(body)),
        _envelope=Lazy(lambda: envelope),
    )
    return change_event(event, **changes)


def change_event(event: Event, **changes: Any) -> Event:
    """Make the same event with other values: `envelope=None`, `data={…}`, `attempt=3`."""
    return replace(event, **dict(map(_field, changes, changes.values())))


def _field(name: str, value: Any) -> tuple[str, Any]:
    """Name the field behind a property."""
    return (f"_{name}", Lazy(lambda: value)) if name in {"data", "envelope"} else (name, value)


def _envelope(state: Any, *, envelope_id: str, at: datetime) -> Envelope:
    own = {"account": "default", "id": envelope_id, "version": 1}
    own |= {"first_seen_at": at, "updated_at": at}
    decided: dict[str, Any] = {
        field.name: getattr(state, field.name, None) for field in fields(Envelope)
    }
    return Envelope(**(decided | own))


async def deliver(callbacks: Callbacks, event: Event, *, session: Any = None) -> dict[str, Verdict]:
    """Give `event` to every callback that asks for it; say by name how each call ended.

    `session` is passed on to those that take one; committing it is the test's own affair.
    """
    wanted = [each for each in callbacks if each.subscription.wants(event.type, event.account)]
    return {each.name: await _deliver(each, event, session) for each in wanted}


async def _deliver(callback: Callback, event: Event, session: Any) -> Verdict:
    @asynccontextmanager
    async def lend(_: Call) -> Any:
        yield session

    claim = Claim(new_id(), 1, event.attempt, 0, callback.name, 1, new_id(), event.envelope_id)
    call = Call(callback, claim, None, replace(event, callback=callback.name))
    return await run(call, lend) if callback.is_async else run_plain(call)
