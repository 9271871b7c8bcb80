"""Everything that the author of a callback imports.

Usage::

    from app.callbacks import Callbacks, Event, GiveUp, RetryLater

    callbacks = Callbacks()

    @callbacks.on("envelope.signed")
    async def start_onboarding(event: Event) -> None:
        if event.is_late:
            return
        ...

`CALLBACKS=my_package.onboarding:callbacks` loads it. A callback is called at least once
for each event; `event.delivery_id` is the same in every attempt. Raise `RetryLater` for
another try at a time of your choice, `GiveUp` to make the delivery a dead letter at once,
and anything else for another try after the usual wait.
"""

from app.dispatch.breaker import Breaker
from app.dispatch.event import Envelope, Event
from app.dispatch.registry import Callbacks
from app.dispatch.schedule import Backoff
from app.errors import GiveUp, RetryLater
from app.events.parties import Party

__all__ = [
    "Backoff",
    "Breaker",
    "Callbacks",
    "Envelope",
    "Event",
    "GiveUp",
    "Party",
    "RetryLater",
]
