"""Built in: one line in the log for every event. `CALLBACKS=app.callbacks.audit_log:callbacks`.

It goes through the public door only, so it is also the smallest example of a callback.
"""

from app.callbacks import Callbacks, Event
from app.telemetry import get_logger

log = get_logger("audit_log")
callbacks = Callbacks()


@callbacks.on("*")
async def audit_log(event: Event) -> None:
    """Write down that an event came, without what it says."""
    log.info(
        "event.delivered",
        event_id=event.id,
        event_type=event.type,
        envelope_id=event.envelope_id,
        fields_status=event.envelope.fields_status if event.envelope else None,
        status=event.status,
        is_late=event.is_late,
    )
