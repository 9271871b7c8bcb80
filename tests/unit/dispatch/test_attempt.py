"""One call of one callback, and the only way out of it: a verdict."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.callbacks.testing import make_event
from app.dispatch import blame
from app.dispatch.attempt import (
    COMMITTED,
    Call,
    Dead,
    Done,
    Failed,
    Skipped,
    Verdict,
    exhausted,
    run,
    run_plain,
    timed_out,
)
from app.store.claims import Claim
from app.store.contents import Content
from app.store.ids import new_id

# As PostgreSQL's driver gives them: id, is late, body, then the event, then no envelope.
EVENT = (
    new_id(),
    "envelope.signed",
    "default",
    "env_1",
    None,
    None,
    None,
    1,
    "applied",
    "signed",
    1,
)
ROW = (new_id(), False, b"{}", *EVENT, *[None] * 40)
CONTENT = Content(ROW, is_postgresql=True, event_type="envelope.signed", fields_status=None)


def call(function: Callable[..., Any], content: Content | None = CONTENT, **options: Any) -> Call:
    callbacks = Callbacks()
    callbacks.on("*", name="it", **options)(function)
    claim = Claim(new_id(), 1, 1, 0, "it", 1, new_id(), "env_1")
    return Call(next(iter(callbacks)), claim, content)


async def run_async(call: Call) -> Verdict:
    return await run(call, lambda _: nullcontext())


def raising(error: BaseException) -> Callable[[Event], None]:
    def function(_: Event) -> None:
        raise error

    return function


class TestPlainFunction:
    def test_that_returns_is_done(self) -> None:
        assert Done() == run_plain(call(lambda _: None))

    def test_that_does_not_want_the_event_is_skipped(self) -> None:
        assert isinstance(run_plain(call(raising(ValueError()), where=lambda _: False)), Skipped)

    def test_whose_where_raises_has_failed(self) -> None:
        verdict = run_plain(call(lambda _: None, where=raising(KeyError("x"))))

        assert isinstance(verdict, Failed)
        line = raising.__code__.co_firstlineno + 2
        assert f"KeyError: 'x' (test_attempt.py:{line} in function)" == verdict.error

    def test_that_returns_a_coroutine_is_told_to_be_async(self) -> None:
        """Nobody would ever await it, so the work would silently not happen."""

        async def work() -> None: ...

        verdict = run_plain(call(lambda _: work()))

        assert isinstance(verdict, Failed)
        assert "async def" in verdict.error

    def test_that_returns_another_awaitable_too(self) -> None:
        class Later:
            def __await__(self) -> Any: ...

        assert isinstance(run_plain(call(lambda _: Later())), Failed)

    def test_that_raises_has_not_asked_for_another_try(self) -> None:
        verdict = run_plain(call(raising(ValueError())))

        assert isinstance(verdict, Failed)
        assert not verdict.is_asked_for

    def test_that_gives_up_is_dead(self) -> None:
        verdict = run_plain(call(raising(GiveUp("gone"))))

        assert isinstance(verdict, Dead)
        assert "GiveUp: gone" == verdict.error

    @pytest.mark.parametrize(
        "after, wait",
        [
            (timedelta(minutes=1), timedelta(minutes=1)),
            (90, timedelta(seconds=90)),
            (None, None),
            ("soon", None),
            (1e300, None),
        ],
    )
    def test_that_asks_for_a_time_gets_it(self, after: Any, wait: timedelta | None) -> None:
        verdict = run_plain(call(raising(RetryLater(after=after))))

        assert isinstance(verdict, Failed)
        assert wait == verdict.after
        assert verdict.is_asked_for
        assert "RetryLater: the callback asked for another try" == verdict.error

    def test_of_a_delivery_that_is_gone_has_failed(self) -> None:
        verdict = run_plain(call(lambda _: None, content=None))

        assert isinstance(verdict, Failed)
        assert "not in the database any more" in verdict.error

    def test_of_a_row_that_cannot_be_read_has_failed(self) -> None:
        broken = (new_id().hex, 0, b"{}", "no-uuid", *ROW[4:])
        content = Content(broken, is_postgresql=False, event_type="x", fields_status=None)

        verdict = run_plain(call(lambda _: None, content=content))

        assert isinstance(verdict, Failed)
        assert "can no longer be read" in verdict.error


class TestCoroutine:
    async def test_that_ends_is_done(self) -> None:
        async def function(_: Event) -> None:
            await asyncio.sleep(0)

        assert Done() == await run_async(call(function))

    async def test_that_takes_too_long_has_failed(self) -> None:
        async def function(_: Event) -> None:
            await asyncio.sleep(60)

        verdict = await run_async(call(function, timeout=0.01))

        assert isinstance(verdict, Failed)
        assert "the callback did not end within its timeout of 0.01 s" == verdict.error

    async def test_whose_own_timeout_ends_has_failed_with_that(self) -> None:
        async def function(_: Event) -> None:
            async with asyncio.timeout(0.001):
                await asyncio.sleep(60)

        verdict = await run_async(call(function))

        assert isinstance(verdict, Failed)
        assert verdict.error.startswith("TimeoutError (test_attempt.py:")
        assert verdict.error.endswith(" in function)")

    async def test_that_does_not_want_the_event_is_skipped(self) -> None:
        async def function(_: Event) -> None:
            raise ValueError

        assert isinstance(await run_async(call(function, where=lambda _: False)), Skipped)

    async def test_that_raises_has_failed(self) -> None:
        async def function(_: Event) -> None:
            raise KeyError("x")

        verdict = await run_async(call(function))

        assert isinstance(verdict, Failed)
        assert verdict.error.startswith("KeyError: 'x' (test_attempt.py:")


class TestSessionCallback:
    """It writes in the transaction that settles its delivery: there is nothing left to settle."""

    async def test_is_lent_a_session_and_has_committed(self) -> None:
        seen: list[str] = []

        @asynccontextmanager
        async def transact(call: Call) -> AsyncIterator[str]:
            yield f"session of {call.callback.name}"
            seen.append("committed")

        async def function(event: Event, session: Any) -> None:
            seen.append(f"{event.type}, {session}")

        verdict = await run(call(function), transact)

        assert ["envelope.signed, session of it", "committed"] == seen
        assert isinstance(verdict, Done)
        assert verdict.is_committed

    async def test_is_as_done_as_any_other(self) -> None:
        async def function(_: Event) -> None: ...

        verdict = await run_async(call(function))

        assert isinstance(verdict, Done)
        assert not verdict.is_committed
        assert not Done().is_committed
        assert verdict == COMMITTED


class TestTheEvent:
    def test_says_when_the_call_will_be_given_up(self) -> None:
        seen: list[Event] = []
        before = datetime.now(UTC)

        run_plain(call(seen.append, timeout=3600))

        hour = timedelta(hours=1)
        assert before + hour <= seen[0].deadline <= datetime.now(UTC) + hour

    def test_that_is_there_already_is_the_one_that_is_given(self) -> None:
        seen: list[Event] = []
        event = make_event("envelope.voided")

        owed = replace(call(seen.append, content=None), event=event)

        assert Done() == run_plain(owed)
        assert [event] == seen
        assert "envelope.voided" == owed.event_type


class TestFingerprint:
    def test_tells_causes_apart(self) -> None:
        first, again, other = (
            run_plain(call(raising(error))) for error in (ValueError(1), ValueError(2), KeyError())
        )

        assert isinstance(first, Failed)
        assert isinstance(again, Failed)
        assert isinstance(other, Failed)
        assert first.fingerprint == again.fingerprint != other.fingerprint

    def test_stays_what_it_is_when_lines_move(self) -> None:
        def one_line(_: Event) -> None:
            raise ValueError

        code = one_line.__code__
        before = run_plain(call(one_line))
        one_line.__code__ = code.replace(co_firstlineno=code.co_firstlineno + 7)
        after = run_plain(call(one_line))

        assert isinstance(before, Failed)
        assert isinstance(after, Failed)
        assert before.error != after.error
        assert before.fingerprint == after.fingerprint

    def test_a_delivery_lost_too_often_has_one_as_well(self) -> None:
        assert 16 == len(exhausted(call(lambda _: None), counted=12).fingerprint)
        assert "" == call(lambda _: None, content=None).event_type

    def test_is_the_same_in_the_next_release(self) -> None:
        """Dead letters are counted by it, also those of before."""
        slow = call(lambda _: None)
        place = blame.home_of(slow.callback.function)

        def named(kind: str) -> str:
            return blame.fingerprint(kind, place, callback="it", event_type="envelope.signed")

        assert named("timeout") == timed_out(slow).fingerprint
        assert named("lost") == exhausted(slow, counted=12).fingerprint


class TestAccount:
    def test_is_that_of_the_event(self) -> None:
        event = make_event("envelope.signed", account="beta")
        gone = (new_id(), False, None, *[None] * 51)

        known = call(lambda _: None)

        assert "default" == known.account
        assert "beta" == Call(known.callback, known.claim, None, event).account
        assert "" == Call(known.callback, known.claim, None).account
        nothing = Content(gone, is_postgresql=True, event_type=None, fields_status=None)
        assert "" == Call(known.callback, known.claim, nothing).account
