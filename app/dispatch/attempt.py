"""Call one callback once, and name what happened.

Nothing that a callback does or raises gets past here: a verdict is the only way out.
"""

import asyncio
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from app.dispatch import blame
from app.dispatch.event import Event, build
from app.dispatch.registry import Callback
from app.errors import GiveUp, RetryLater
from app.events.frozen import frozen
from app.store.claims import Claim
from app.store.contents import Content


@dataclass(frozen=True, slots=True)
class Done:
    """The callback returned."""

    # The delivery is settled already, together with what was written with its session.
    is_committed: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """Worth another try, `after` a time of the callback's own choice if it named one."""

    error: str
    fingerprint: str
    after: timedelta | None = None
    # The callback asked for another try, which is no sign that something is broken.
    is_asked_for: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """Not to be tried again, until an operator says so."""

    error: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The callback did not want this event after all."""

    reason: str


Verdict = Done | Failed | Dead | Skipped

DONE = Done()
COMMITTED = Done(is_committed=True)


@frozen
class Call:
    """One claimed delivery, and the callback that it is for."""

    callback: Callback
    claim: Claim
    content: Content | None
    # An event that is there already; else it is made of the content.
    event: Event | None = None

    @property
    def event_type(self) -> str:
        """The type of its event, as far as it is known."""
        if self.event is not None:
            return self.event.type
        return (self.content.event_type if self.content else None) or ""

    @property
    def account(self) -> str:
        """The account of its event, as far as it is known."""
        if self.event is not None:
            return self.event.account
        return (self.content.account if self.content else None) or ""


@frozen
class Outcome:
    """A call and how it ended, on the way to the database."""

    call: Call
    verdict: Verdict
    # None if it never began.
    began_at: datetime | None
    finished_at: datetime


# Opens a session whose writes are committed together with the end of the delivery.
Transact = Callable[[Call], AbstractAsyncContextManager[Any]]


async def run(call: Call, transact: Transact) -> Verdict:
    """Call an `async def`, for as long as its time-out allows."""
    timer = asyncio.timeout(call.callback.timeout.total_seconds())
    try:
        async with timer:
            event = _event(call)
            if not _is_wanted(call.callback, event):
                return Skipped("where= answered false")
            return await _call(call, event, transact)
    except TimeoutError as error:
        return timed_out(call) if timer.expired() else judge(call, error)
    except BaseException as error:  # noqa: BLE001  # the fence: whatever a callback raises
        return judge(call, error)


async def _call(call: Call, event: Event, transact: Transact) -> Verdict:
    if not call.callback.takes_session:
        await call.callback.function(event)
        return DONE
    async with transact(call) as session:
        await call.callback.function(event, session)
    return COMMITTED


def run_plain(call: Call) -> Verdict:
    """Call a plain `def`, in the thread of the caller."""
    try:
        event = _event(call)
        if not _is_wanted(call.callback, event):
            return Skipped("where= answered false")
        _refuse_awaitable(call.callback.function(event))
    except BaseException as error:  # noqa: BLE001  # the fence: whatever a callback raises
        return judge(call, error)
    return DONE


def _event(call: Call) -> Event:
    if call.event is not None:
        return call.event
    return build(call.claim, call.content, deadline=datetime.now(UTC) + call.callback.timeout)


def _is_wanted(callback: Callback, event: Event) -> bool:
    return callback.where is None or bool(callback.where(event))


def _refuse_awaitable(result: Any) -> None:
    if inspect.isawaitable(result):
        close: Callable[[], object] = getattr(result, "close", lambda: None)
        close()
        raise TypeError(
            "the callback returned something to be awaited, which nobody would await: "
            "declare it with async def"
        )


def judge(call: Call, error: BaseException) -> Verdict:
    """Turn what a callback raised into a verdict."""
    function = call.callback.function
    fingerprint = _fingerprint(call, type(error).__name__, blame.place_of(error, function))
    if isinstance(error, GiveUp):
        return Dead(blame.describe(error), fingerprint)
    if isinstance(error, RetryLater):
        after = _duration(error.after)
        return Failed(blame.describe(error), fingerprint, after, is_asked_for=True)
    return Failed(blame.describe(error, at=blame.line_of(error, function)), fingerprint)


def timed_out(call: Call, remark: str = "") -> Failed:
    """Make the verdict on a call that took longer than it may."""
    seconds = f"{call.callback.timeout.total_seconds():g}"
    place = blame.home_of(call.callback.function)
    text = f"the callback did not end within its timeout of {seconds} s"
    return Failed(text + remark, _fingerprint(call, "timeout", place))


def exhausted(call: Call, *, counted: int) -> Dead:
    """Make the verdict on a delivery that has no attempt left to begin with."""
    allowed = call.callback.max_attempts
    text = f"its attempts are used up: the callback now allows {allowed}, {counted} were counted"
    return Dead(text, _fingerprint(call, "lost", blame.home_of(call.callback.function)))


def _fingerprint(call: Call, kind: str, place: str) -> str:
    return blame.fingerprint(kind, place, callback=call.callback.name, event_type=call.event_type)


def _duration(after: Any) -> timedelta | None:
    # Authors write after=30 and mean seconds, whatever the annotation says.
    if isinstance(after, timedelta):
        return after
    try:
        return timedelta(seconds=after)
    except (TypeError, ValueError, OverflowError):
        return None
