"""Callbacks and what they ask for: the decorator that authors use, and its options."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from app.dispatch.breaker import Breaker
from app.dispatch.event import Event
from app.dispatch.schedule import LONGEST_CAP, MAX_ATTEMPTS, Backoff
from app.errors import ConfigError, DuplicateCallback
from app.store.callbacks import Subscription

# Of one argument, the event; or of two, the event and a session.
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

TIMEOUT = timedelta(seconds=30)
LARGEST_COUNT = 1_000_000
LONGEST_TIMEOUT = timedelta(hours=24)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}")
_PATTERN = re.compile(r"\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?")


@dataclass(frozen=True, slots=True)
class Callback:
    """One function of an author, and how it is to be called."""

    name: str
    function: Function
    patterns: tuple[str, ...]
    timeout: timedelta
    max_attempts: int
    backoff: Backoff
    concurrency: int | None
    is_ordered: bool
    account: str | None
    # None: it is never left alone.
    breaker: Breaker | None
    where: Callable[[Event], Any] | None
    is_async: bool
    # True if it writes in the transaction that settles its delivery.
    takes_session: bool
    # Module and line, for messages.
    place: str

    @property
    def subscription(self) -> Subscription:
        """What other processes may know of it."""
        options = {
            "timeout": self.timeout.total_seconds(),
            "max_attempts": self.max_attempts,
            "backoff": self.backoff.base.total_seconds(),
            "concurrency": self.concurrency,
            "ordered": self.is_ordered,
            "breaker": self.breaker is not None,
        }
        return Subscription(self.name, self.patterns, self.account, options)


class Callbacks:
    """A set of callbacks; `CALLBACKS` names one or several such objects.

    Usage::

        callbacks = Callbacks()

        @callbacks.on("envelope.signed")
        async def start_onboarding(event: Event) -> None: ...
    """

    def __init__(self) -> None:
        self._callbacks: dict[str, Callback] = {}

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks.values())

    def __len__(self) -> int:
        return len(self._callbacks)

    def on(  # noqa: PLR0913  # each option is a word that authors write by name
        self,
        *patterns: str,
        name: str | None = None,
        timeout: timedelta | float = TIMEOUT,
        max_attempts: int = MAX_ATTEMPTS,
        backoff: Backoff | timedelta | float | None = None,
        concurrency: int | None = None,
        ordered: bool = True,
        breaker: Breaker | None = Breaker(),  # noqa: B008  # it is immutable
        account: str | None = None,
        where: Callable[[Event], Any] | None = None,
    ) -> Callable[[F], F]:
        """Ask for events by pattern: `envelope.signed`, `envelope.*`, `*`.

        `name` is under which deliveries are kept, so renaming a function should not change
        it. A call is given up after `timeout` and repeated up to `max_attempts` times;
        `backoff` is the first wait. At most `concurrency` calls run at once in a process.
        With `ordered`, an event waits for the earlier ones of its envelope. `breaker` says
        when calls that fail are left alone for a while; None means never. `account`
        narrows to one account, `where` to the events for which it answers true.
        """

        def add(function: F) -> F:
            self._add(
                Callback(
                    name=_checked_name(name, function),
                    function=function,
                    patterns=_checked_patterns(patterns, function),
                    timeout=_duration("timeout", timeout, LONGEST_TIMEOUT, function),
                    max_attempts=_count("max_attempts", max_attempts, function),
                    backoff=_backoff(backoff, function),
                    concurrency=None
                    if concurrency is None
                    else _count("concurrency", concurrency, function),
                    is_ordered=bool(ordered),
                    account=account,
                    breaker=_checked_breaker(breaker, function),
                    where=_checked_where(where, function),
                    is_async=_checked_kind(function),
                    takes_session=_takes_session(function),
                    place=_place(function),
                )
            )
            return function

        return add

    def include(self, other: "Callbacks") -> None:
        """Take over the callbacks of another set; those of both are taken once."""
        for callback in other:
            self._add(callback)

    def _add(self, callback: Callback) -> None:
        known = self._callbacks.setdefault(callback.name, callback)
        if known is not callback:
            raise duplicate(known, callback)


def duplicate(known: Callback, callback: Callback) -> DuplicateCallback:
    """Name both places that claim one name."""
    return DuplicateCallback(
        f"two callbacks are called {callback.name!r}: {known.place} and {callback.place}; "
        "give one of them another name with @callbacks.on(…, name=…)"
    )


def _place(function: Function) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    line = f":{code.co_firstlineno}" if code else ""
    return f"{getattr(function, '__module__', '?')}{line}"


def _label(function: Function) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _checked_name(name: object, function: Function) -> str:
    chosen: object = _label(function) if name is None else name
    if not isinstance(chosen, str) or not _NAME.fullmatch(chosen):
        raise ConfigError(
            f"{chosen!r} ({_place(function)}) cannot be the name of a callback: write "
            "@callbacks.on(…, name=…) with letters, digits and . _ : - (at most 100)"
        )
    return chosen


def _checked_patterns(patterns: Sequence[Any], function: Function) -> tuple[str, ...]:
    if not patterns or callable(patterns[0]):
        raise ConfigError(
            f"@callbacks.on at {_place(function)} names no event: write "
            '@callbacks.on("envelope.signed"), or "*" for all of them'
        )
    for pattern in patterns:
        if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
            raise ConfigError(
                f"{pattern!r} at {_place(function)} is no pattern for events: it is an exact type "
                '("envelope.signed"), a prefix ("envelope.*"), or "*"'
            )
    return tuple(dict.fromkeys(patterns))


def _named(function: Function) -> str:
    return f"{_label(function)} ({_place(function)})"


def _duration(
    option: str, value: timedelta | float, longest: timedelta, function: Function
) -> timedelta:
    try:
        duration = value if isinstance(value, timedelta) else timedelta(seconds=value)
    except (TypeError, ValueError, OverflowError):
        duration = timedelta(0)
    if not timedelta(0) < duration <= longest:
        raise ConfigError(
            f"{option}={value!r} of {_named(function)} must be seconds or a timedelta, "
            f"above 0 and at most {longest}"
        )
    return duration


def _count(option: str, value: object, function: Function) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
        raise ConfigError(
            f"{option}={value!r} of {_named(function)} must be a whole number from 1 on"
        )
    return value


def _backoff(value: Backoff | timedelta | float | None, function: Function) -> Backoff:
    if value is None:
        return Backoff()
    if isinstance(value, Backoff):
        return value
    base = _duration("backoff", value, LONGEST_CAP, function)
    return Backoff(base=base, cap=max(base, Backoff().cap))


def _checked_breaker(value: Any, function: Function) -> Breaker | None:
    if value is None:
        return None
    problem = (
        "be a Breaker, or None"
        if not isinstance(value, Breaker)
        else "have a failure_rate above 0 and at most 1"
        if not 0 < value.failure_rate <= 1
        else "count at least one call, and probe with one"
        if min(value.calls, value.probes) < 1
        else "have times above 0"
        if min(value.window, value.pause, value.longest) <= timedelta(0)
        else None
    )
    if problem is not None:
        raise ConfigError(f"breaker={value!r} of {_named(function)} must {problem}")
    checked: Breaker = value
    return checked


def _checked_where(where: Any, function: Function) -> Callable[[Event], Any] | None:
    if where is None:
        return None
    if not callable(where) or _is_async(where):
        raise ConfigError(
            f"where= of {_named(function)} must be a plain function of the event, not async"
        )
    chosen: Callable[[Event], Any] = where
    return chosen


def _checked_kind(function: Any) -> bool:
    """Say whether the function is `async def`; refuse what cannot be called with an event."""
    if not callable(function):
        raise ConfigError(f"{function!r} is no function: put @callbacks.on(…) above a def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{_label(function)} ({_place(function)}) yields: a callback returns")
    _check_arguments(function)
    return _is_async(function)


def _is_async(function: Callable[..., Any]) -> bool:
    called = type(function).__call__ if not inspect.isroutine(function) else function
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _takes_session(function: Function) -> bool:
    parameters = list(inspect.signature(function).parameters.values())
    return any(parameter.name == "session" for parameter in parameters[1:])


def _check_arguments(function: Function) -> None:
    takes_session = _takes_session(function)
    if takes_session and not _is_async(function):
        raise ConfigError(
            f"{_label(function)} ({_place(function)}) takes a `session`, so it must be async def: "
            "its transaction belongs to an event loop, and a thread cannot share it"
        )
    try:
        inspect.signature(function).bind(None, **({"session": None} if takes_session else {}))
    except TypeError:
        raise ConfigError(
            f"{_label(function)} ({_place(function)}) must take exactly one argument, the event, "
            "and perhaps a second one called `session`"
        ) from None
