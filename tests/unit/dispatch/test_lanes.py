"""Where callbacks run: threads that come when they are needed and go when they are not."""

import asyncio
import threading
import time
from collections.abc import Callable
from queue import Empty

import pytest

from app.callbacks import Callbacks, Event
from app.dispatch.attempt import Call
from app.dispatch.crew import Crew
from app.dispatch.lanes import Job, Lane, Threads
from app.dispatch.options import DispatchOptions
from app.dispatch.transaction import Transactions
from app.store.claims import Claim
from app.store.contents import Content
from app.store.ids import new_id
from app.store.session import DatabaseAddress
from tests.unit.dispatch.test_attempt import CONTENT


def calls(function: Callable[[Event], object], number: int = 1) -> list[Call]:
    callbacks = Callbacks()
    callbacks.on("*", name="it")(function)
    content: Content = CONTENT
    return [
        Call(next(iter(callbacks)), Claim(new_id(), 1, 1, 0, "it", 1, new_id(), None), content)
        for _ in range(number)
    ]


def jobs(function: Callable[[Event], object], number: int = 1) -> list[Job]:
    return [Job(call) for call in calls(function, number)]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def threads_called(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def no_thread(_: threading.Thread) -> None:
    message = "can't start new thread"
    raise RuntimeError(message)


def transactions() -> Transactions:
    return Transactions(DatabaseAddress("sqlite:///var/unused.db"), worker="w")


class TestThreads:
    def test_one_that_is_idle_is_used_again(self) -> None:
        ended: list[Job] = []
        threads = Threads(ended.append, name="reused")

        for _ in range(5):
            ended.clear()
            threads.submit(jobs(lambda _: None))
            until(lambda: ended and threads._idle == 1)

        assert 1 == threads_called("reused")

    def test_they_end_when_there_is_nothing_to_do(self) -> None:
        ended: list[Job] = []
        threads = Threads(ended.append, name="brief", idle=0.01)

        threads.submit(jobs(lambda _: None, 5))

        until(lambda: len(ended) == 5 and threads_called("brief") == 0)
        assert 0 == threads._idle

    def test_one_that_is_counted_upon_waits_for_its_job(self) -> None:
        """Between the promise of a job and the job a thread must not give up waiting."""
        ended: list[Job] = []
        threads = Threads(ended.append, name="promised", idle=0.01)
        threads.submit(jobs(lambda _: time.sleep(0.01)))
        until(lambda: ended)
        until(lambda: threads._reserve() or threads_called("promised") == 0)

        if threads_called("promised"):
            time.sleep(0.05)
            threads._queue.put(jobs(lambda _: None)[0])
            until(lambda: len(ended) == 2)

        until(lambda: threads_called("promised") == 0)

    def test_one_that_is_counted_upon_waits_once_more_for_its_job(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended: list[Job] = []
        threads = Threads(ended.append, name="counted")
        (promised,) = jobs(lambda _: None)
        waits: list[float] = []

        class Late:
            """A queue into which the promised job comes after the time for which one waits."""

            def get(self, *, timeout: float) -> Job:
                waits.append(timeout)
                if len(waits) == 1:
                    raise Empty
                return promised

        monkeypatch.setattr(threads, "_queue", Late())

        assert promised is threads._next()
        assert 2 == len(waits)

    def test_what_was_withdrawn_is_not_started(self) -> None:
        ended: list[Job] = []
        (withdrawn,) = jobs(lambda _: None)
        assert withdrawn.take()
        threads = Threads(ended.append, name="withdrawn")

        threads.submit([withdrawn])
        threads.submit(jobs(lambda _: None))

        until(lambda: len(ended) == 1)
        assert withdrawn not in ended

    def test_what_has_no_thread_never_runs_and_holds_up_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended: list[Job] = []
        threads = Threads(ended.append, name="refused")
        refused, accepted = jobs(lambda _: None, 2)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert [refused] == threads.submit([refused])

        assert [] == threads.submit([accepted])

        until(lambda: ended and threads._idle == 1)
        assert [accepted] == ended
        assert refused.take()


class TestLane:
    def test_that_is_retired_ends_with_its_last_call(self) -> None:
        ended: list[Job] = []
        started, released = threading.Event(), asyncio.Event()

        async def function(_: Event) -> None:
            started.set()
            await released.wait()

        lane = Lane(ended.append, transactions=transactions(), name="retired")
        lane.submit(jobs(function))
        until(started.is_set)

        lane.retire()
        until(lambda: lane._is_retired)
        seen = [lane.is_alive]

        lane.call(released.set)
        lane.join(30)
        seen.append(lane.is_alive)
        assert ([True, False], 1) == (seen, len(ended))

    def test_what_a_callback_leaves_behind_is_cancelled_at_the_end(self) -> None:
        ended: list[Job] = []
        ends: list[str] = []
        kept: list[asyncio.Task[None]] = []

        async def lingers() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ends.append("cancelled")

        async def function(_: Event) -> None:
            kept.append(asyncio.create_task(lingers()))
            await asyncio.sleep(0)

        lane = Lane(ended.append, transactions=transactions(), name="lane")
        lane.submit(jobs(function))
        until(lambda: ended)
        lane.retire()
        lane.join(30)

        assert ["cancelled"] == ends
        assert not lane.is_alive

    def test_an_exit_in_a_task_of_a_callback_does_not_end_it(self) -> None:
        ended: list[Job] = []
        kept: list[asyncio.Task[None]] = []

        async def exits() -> None:
            raise SystemExit

        async def function(_: Event) -> None:
            kept.append(asyncio.create_task(exits()))
            await asyncio.wait(kept)
            kept[0].exception()

        lane = Lane(ended.append, transactions=transactions(), name="lane")
        lane.submit(jobs(function))

        until(lambda: ended)
        assert lane.is_alive
        lane.retire()
        lane.join(30)

    def test_nobody_is_to_blame_for_an_idle_one(self) -> None:
        lane = Lane(lambda _: None, transactions=transactions(), name="lane")

        assert "?" == lane.culprit()
        lane.retire()
        lane.join(30)


class TestCrew:
    async def test_what_waits_for_a_place_can_be_taken_back(self) -> None:
        started, released = threading.Event(), threading.Event()
        ended: list[object] = []
        crew = Crew(
            asyncio.get_running_loop(),
            DispatchOptions(slots=1),
            transactions=transactions,
            on_end=ended.extend,
        )

        def function(_: Event) -> None:
            started.set()
            released.wait(30)

        crew.start(calls(function, 4))
        await asyncio.to_thread(started.wait, 30)
        back = crew.withdraw()
        released.set()
        await asyncio.to_thread(until, lambda: ended)

        assert 3 == len(back)
        assert [] == crew.held
        assert 1 == len(ended)
        crew.close(30)

    async def test_what_waits_for_too_long_for_a_place_is_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released = threading.Event()
        crew = Crew(
            asyncio.get_running_loop(),
            DispatchOptions(slots=2),
            transactions=transactions,
            on_end=lambda _: None,
        )
        crew.start(calls(lambda _: released.wait(30), 7))
        held = crew.held

        assert [] == crew.withdraw_ahead()
        monkeypatch.setattr("app.dispatch.crew.LONGEST_WAIT", 0.0)
        crew._pace.ahead = {"it": 4}
        assert held[6:] == crew.withdraw_ahead()
        crew._pace.ahead = {}
        assert held[2:6] == crew.withdraw_ahead()
        assert [] == crew.withdraw_ahead()

        assert held[:2] == crew.held
        released.set()
        await asyncio.to_thread(crew.close, 30)

    async def test_what_has_no_thread_is_given_back_and_is_a_problem(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ended: list[object] = []
        crew = Crew(
            asyncio.get_running_loop(),
            DispatchOptions(slots=1),
            transactions=transactions,
            on_end=ended.extend,
        )
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            crew.start(calls(lambda _: None, 2))

            assert [] != crew.problems()
            assert 1 == len(crew.held)
            assert 1 == len(crew.take_refused())
            assert [] == crew.take_refused()

        crew.watch()
        await asyncio.to_thread(until, lambda: ended)

        assert [] == crew.problems()
        assert [] == crew.held
        crew.close(30)

    async def test_what_never_began_is_not_stuck_when_it_is_written_off(self) -> None:
        started, released = threading.Event(), threading.Event()
        options = DispatchOptions(slots=1)
        crew = Crew(
            asyncio.get_running_loop(), options, transactions=transactions, on_end=lambda _: None
        )

        def function(_: Event) -> None:
            started.set()
            released.wait(30)

        crew.start(calls(function, 2))
        await asyncio.to_thread(started.wait, 30)
        crew.abandon(crew.held)

        assert ["it"] == crew.stuck
        released.set()
        await asyncio.to_thread(until, lambda: not crew.stuck)
        crew.close(30)
