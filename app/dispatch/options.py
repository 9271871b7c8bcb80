"""How a dispatcher works; every number has a default that serves most."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """Limits and intervals, as plain values."""

    # A claim that is not renewed for so long belongs to whoever comes next.
    lease: timedelta = timedelta(seconds=30)
    # How often to look for due deliveries if nobody says that there are some.
    poll: timedelta = timedelta(seconds=1)
    # Calls at once, of all callbacks together.
    slots: int = 64
    order_max_wait: timedelta = timedelta(minutes=15)
    # Calls that do not end after their time-out are written off and replaced, up to here.
    stuck_cap: int = 8
    # How long a cancelled call may take to end.
    cancel_grace: timedelta = timedelta(seconds=2)
    # An event loop that has not turned for so long gets no more calls.
    block_limit: timedelta = timedelta(seconds=2)
    # How long the dispatch loop itself may be silent before readiness shows it.
    silence_limit: timedelta = timedelta(seconds=15)
    watch_every: timedelta = timedelta(milliseconds=250)
    sweep_every: timedelta = timedelta(seconds=5)
    # How often to look at the breakers of callbacks; after a failure, sooner.
    guard_every: timedelta = timedelta(seconds=1)
    # Who was seen within this is served; it says so every few seconds.
    served_within: timedelta = timedelta(seconds=30)
    park_after: timedelta = timedelta(minutes=10)
    # Every transaction is cut off after this.
    database_limit: timedelta = timedelta(seconds=5)
