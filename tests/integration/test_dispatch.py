"""What a dispatcher promises: every delivery is tried until it is settled, whatever happens."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NoReturn

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.dispatch import worker
from app.dispatch.engine import Engine
from app.dispatch.options import DispatchOptions
from app.dispatch.worker import Dispatcher
from app.store import deliveries
from app.store.ids import new_id
from app.store.session import DatabaseAddress
from tests.integration.ledger import QUICK, Ledger, until
from tests.postgres import Postgres

ROOT = Path(__file__).resolve().parents[2]
SECOND = timedelta(seconds=1)
SOON = timedelta(milliseconds=100)


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    return Callbacks()


@contextmanager
def working(ledger: Ledger, journal: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dispatch_worker.py` in a process of its own."""
    script = [sys.executable, "-m", "tests.integration.dispatch_worker"]
    command = [*script, ledger.address.url, str(journal), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


async def all_are(ledger: Ledger, state: str) -> bool:
    return {state} == set(await ledger.states())


class TestDelivery:
    async def test_an_event_reaches_every_callback_that_asked(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[tuple[str, str]] = []

        @callbacks.on("envelope.signed")
        async def by_coroutine(event: Event) -> None:
            seen.append((event.callback, threading.current_thread().name))

        @callbacks.on("envelope.*")
        def by_function(event: Event) -> None:
            seen.append((event.callback, threading.current_thread().name))

        await ledger.owe("by_coroutine", "by_function")
        with ledger.dispatching(callbacks) as dispatcher:
            await until(lambda: all_are(ledger, "done"))
            assert [] == dispatcher.problems()

        assert [("by_coroutine", "callbacks"), ("by_function", "callback")] == sorted(seen)
        assert ["done", "done"] == await ledger.verdicts()

    async def test_the_event_is_what_its_author_needs(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)
        await ledger.envelope(status="signed", tenant="acct_7", fields_status="ready")
        body = b'{"n": 1, "sign_url": "https://sign.example/?token=abc"}'
        delivery_id = await ledger.owe_one("keep", body=body, sequence=3)

        with ledger.dispatching(callbacks):
            await until(lambda: seen)

        (event,) = seen
        assert str(delivery_id) == event.delivery_id
        assert ("envelope.signed", "env_1", 3) == (event.type, event.envelope_id, event.sequence)
        assert ("default", "acct_7", "signed") == (event.account, event.tenant, event.status)
        assert event.data["n"] == 1
        assert "abc" not in str(event.data)
        assert event.envelope is not None
        assert "ready" == event.envelope.fields_status
        assert (1, False, False) == (event.attempt, event.is_late, event.is_replay)
        assert SECOND < event.deadline - datetime.now(UTC) < 31 * SECOND

    async def test_one_that_was_just_committed_is_delivered_at_the_wake(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)

        with ledger.dispatching(callbacks, poll=timedelta(hours=1)) as dispatcher:
            await until(lambda: is_registered(ledger, "keep"))
            await asyncio.sleep(0.2)
            await ledger.owe_one("keep")
            dispatcher.wake()
            await until(lambda: seen)

    async def test_a_wake_at_any_time_does_no_harm(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(print)
        dispatcher = Dispatcher(ledger.address, tuple(callbacks), worker="w")

        dispatcher.wake()
        dispatcher.stop(SECOND)
        with ledger.dispatching(callbacks) as started:
            started.wake()
        started.wake()
        assert [] == started.problems()

    async def test_nothing_but_the_failed_one_is_tried_again(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        calls: Counter[str] = Counter()

        @callbacks.on("*")
        async def first(event: Event) -> None:
            calls[event.callback] += 1

        @callbacks.on("*", backoff=SOON)
        async def failing(event: Event) -> None:
            calls[event.callback] += 1
            if event.attempt == 1:
                message = "no"
                raise ValueError(message)

        callbacks.on("*", name="third")(first)
        await ledger.owe("first", "failing", "third")
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert {"first": 1, "failing": 2, "third": 1} == calls

    async def test_a_callback_without_interest_is_not_called(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[str | None] = []

        @callbacks.on("*", where=lambda event: event.data["n"] > 1)
        async def choosy(event: Event) -> None:
            seen.append(event.envelope_id)

        @callbacks.on("*", where=lambda event: event.data["n"] > 1)
        def choosy_function(event: Event) -> None:
            seen.append(event.envelope_id)

        for n in (1, 2):
            body = b'{"n": %d}' % n
            await ledger.owe("choosy", "choosy_function", envelope=f"env_{n}", body=body)
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert ["env_2", "env_2"] == seen
        assert ["done", "done", "skipped", "skipped"] == sorted(await ledger.verdicts())

    async def test_no_more_calls_at_once_than_the_callback_allows(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        at_once = [0]
        most = [0]

        @callbacks.on("*", concurrency=2)
        async def narrow(_: Event) -> None:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            await asyncio.sleep(0.02)
            at_once[0] -= 1

        for number in range(12):
            await ledger.owe_one("narrow", envelope=f"env_{number}")
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert 2 == most[0]

    async def test_no_more_calls_at_once_than_there_are_slots(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        lock, are_three = threading.Lock(), threading.Event()
        at_once = [0]
        most = [0]

        @callbacks.on("*")
        def slow(_: Event) -> None:
            with lock:
                at_once[0] += 1
                most[0] = max(most[0], at_once[0])
                if at_once[0] == 3:
                    are_three.set()
            are_three.wait(20)
            time.sleep(0.02)
            with lock:
                at_once[0] -= 1

        for number in range(20):
            await ledger.owe_one("slow", envelope=f"env_{number}")
        with ledger.dispatching(callbacks, slots=3):
            await until(lambda: all_are(ledger, "done"))

        assert 3 == most[0]

    async def test_a_backlog_of_slow_calls_does_not_hold_up_other_callbacks(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()
        callbacks.on("*", name="slow", timeout=3600)(lambda _: released.wait())
        seen: list[Event] = []
        callbacks.on("*", name="quick")(seen.append)
        for number in range(30):
            await ledger.owe_one("slow", envelope=f"env_{number}")

        with ledger.dispatching(callbacks, slots=8) as dispatcher:
            await until(lambda: dispatcher.counts().get("running", 0) >= 6)
            await ledger.owe_one("quick")
            await until(lambda: seen)
            released.set()

    async def test_events_of_one_envelope_arrive_in_order(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[int | None] = []

        @callbacks.on("*", backoff=SOON)
        async def ordered(event: Event) -> None:
            await asyncio.sleep(0.001)
            if event.sequence == 2 and event.attempt == 1:
                message = "not yet"
                raise ValueError(message)
            seen.append(event.sequence)

        for sequence in (3, 1, 4, 2, 5):
            await ledger.owe_one("ordered", sequence=sequence)
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert [1, 2, 3, 4, 5] == seen

    async def test_those_that_are_held_back_hold_up_nobody(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """More of them than one claim looks at, due before the one that may run."""
        called: list[int | None] = []
        await ledger.register("file")
        await ledger.owe_one("file", envelope="env_0", sequence=1)
        await ledger.claim("file")
        held = [(new_id(), "file", "default", "env_0", n) for n in range(2, 3002)]
        async with ledger.transaction() as connection:
            await deliveries.enqueue(connection, held)
        await ledger.owe_one("file", envelope="env_1", sequence=99)

        @callbacks.on("*", name="file")
        async def file(event: Event) -> None:
            called.append(event.sequence)

        with ledger.dispatching(callbacks, slots=4):
            await until(lambda: called)

        assert [99] == called

    async def test_one_that_was_overtaken_says_that_it_is_late(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[tuple[int | None, bool]] = []

        @callbacks.on("*", backoff=SOON)
        async def patient(event: Event) -> None:
            if event.sequence == 1 and len(seen) == 0:
                message = "not yet"
                raise ValueError(message)
            seen.append((event.sequence, event.is_late))

        await ledger.owe_one("patient", sequence=1)
        await ledger.owe_one("patient", sequence=2)
        with ledger.dispatching(callbacks, order_max_wait=SECOND):
            # One that was looked at while the earlier one was at work is put off for half a minute.
            await until(lambda: all_are(ledger, "done"), limit=100)

        assert [(2, False), (1, True)] == seen


class TestFailure:
    @pytest.mark.parametrize(
        "raised",
        [
            ValueError("no"),
            SystemExit(3),
            KeyboardInterrupt(),
            asyncio.CancelledError(),
            GeneratorExit(),
            RecursionError(),
            TimeoutError(),
            BaseExceptionGroup("both", [SystemExit(1)]),
            StopAsyncIteration(),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_whatever_is_raised_fails_the_attempt_and_nothing_else(
        self, sqlite_url: str, callbacks: Callbacks, raised: BaseException
    ) -> None:
        ledger = Ledger(sqlite_url)

        @callbacks.on("*", max_attempts=1)
        async def by_coroutine(_: Event) -> NoReturn:
            raise raised

        @callbacks.on("*", max_attempts=1)
        def by_function(_: Event) -> NoReturn:
            raise raised

        seen: list[Event] = []
        callbacks.on("*", name="healthy")(seen.append)
        await ledger.owe("by_coroutine", "by_function")
        with ledger.dispatching(callbacks) as dispatcher:
            await until(lambda: all_are(ledger, "dead"))
            await ledger.owe_one("healthy", envelope="env_2")
            await until(lambda: seen)
            assert [] == dispatcher.problems()

        errors = [row.last_error for row in await ledger.deliveries(state="dead")]
        assert all(error and error.startswith(type(raised).__name__) for error in errors)
        await ledger.database.close()

    async def test_a_callback_that_gives_up_is_not_tried_again(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        @callbacks.on("*")
        async def hopeless(_: Event) -> NoReturn:
            raise GiveUp("the customer is gone")

        delivery_id = await ledger.owe_one("hopeless")
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        row = await ledger.delivery(delivery_id)
        assert (1, None) == (row.attempts, row.due_at)
        assert row.last_error == "GiveUp: the customer is gone"
        assert row.fingerprint is not None

    async def test_a_callback_may_name_its_next_time(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        @callbacks.on("*")
        def later(_: Event) -> NoReturn:
            raise RetryLater("closed on Sundays", after=timedelta(hours=5))

        delivery_id = await ledger.owe_one("later")
        with ledger.dispatching(callbacks):
            await until(lambda: has_verdicts(ledger, "failed"))

        row = await ledger.delivery(delivery_id)
        assert row.due_at is not None
        assert abs(row.due_at - datetime.now(UTC) - timedelta(hours=5)) < 60 * SECOND

    async def test_attempts_run_out(self, ledger: Ledger, callbacks: Callbacks) -> None:
        @callbacks.on("*", max_attempts=3, backoff=timedelta(milliseconds=1))
        async def failing(_: Event) -> NoReturn:
            raise ValueError

        await ledger.owe_one("failing")
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert ["failed", "failed", "dead"] == await ledger.verdicts()

    @pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000])
    async def test_a_body_that_cannot_be_decoded_backs_off_and_dies(
        self, ledger: Ledger, callbacks: Callbacks, body: bytes
    ) -> None:
        seen: list[object] = []
        hour = timedelta(hours=1)
        callbacks.on("*", name="keep", max_attempts=2, backoff=hour)(
            lambda event: seen.append(event.data)
        )
        delivery_id = await ledger.owe_one("keep", body=body)

        with ledger.dispatching(callbacks):
            await until(lambda: has_verdicts(ledger, "failed"))
            waiting = await ledger.delivery(delivery_id)
            await ledger.make_due()
            await until(lambda: all_are(ledger, "dead"))

        row = await ledger.delivery(delivery_id)
        assert waiting.due_at is not None
        assert waiting.due_at - datetime.now(UTC) > SECOND
        assert row.last_error is not None
        assert "can no longer be decoded" in row.last_error
        assert [] == seen

    async def test_so_does_one_whose_event_is_gone(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep", max_attempts=1)(print)
        delivery_id = await ledger.owe_one("keep", event=new_id())

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert "not in the database" in str((await ledger.delivery(delivery_id)).last_error)

    async def test_a_body_that_was_pruned_is_no_failure(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)
        await ledger.owe_one("keep", body=None)

        with ledger.dispatching(callbacks):
            await until(lambda: seen)

        assert seen[0].data is None

    async def test_attempts_lost_with_their_workers_run_out_as_well(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """A callback that kills its process must not do so for ever."""
        seen: list[Event] = []
        callbacks.on("*", name="killer", max_attempts=2)(seen.append)
        await ledger.owe_one("killer")
        await ledger.change(
            "UPDATE deliveries SET state = 'running', attempts = 2, token = 2, worker = 'w'"
        )

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert [] == seen
        assert ["lost", "dead"] == await ledger.verdicts()

    async def test_one_whose_attempts_a_release_no_longer_allows_says_so(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="file", max_attempts=2)(print)
        delivery_id = await ledger.owe_one("file")
        await ledger.change("UPDATE deliveries SET attempts = 5, spent = 2, token = 5")

        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        words = "its attempts are used up: the callback now allows 2, 3 were counted"
        assert words == (await ledger.delivery(delivery_id)).last_error

    async def test_a_verdict_that_the_database_refuses_does_not_hold_up_the_others(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        ledger = postgres_ledger

        @callbacks.on("*", max_attempts=1)
        async def failing(event: Event) -> None:
            if event.envelope_id != "env_0":
                raise ValueError(event.envelope_id)

        for number in range(4):
            await ledger.owe_one("failing", envelope=f"env_{number}")
        await ledger.change(
            "ALTER TABLE deliveries ADD CONSTRAINT picky CHECK (last_error NOT LIKE '%env_1 %')"
        )
        await ledger.change(
            "ALTER TABLE deliveries ADD CONSTRAINT stubborn "
            "CHECK (state <> 'dead' OR envelope_id <> 'env_2')"
        )
        with ledger.dispatching(callbacks, lease=3600 * SECOND):
            await until(lambda: has_states(ledger, "dead", "dead", "done", "running"))

        errors = {d.envelope_id: d.last_error for d in await ledger.deliveries()}
        assert "the verdict could not be written as it was" == errors["env_1"]
        assert str(errors["env_3"]).startswith("ValueError: env_3 (test_dispatch.py:")
        assert errors["env_2"] is None


class TestStuckCalls:
    """A thread cannot be killed: a call that does not end is written off, and replaced."""

    async def test_a_coroutine_that_takes_too_long_is_cancelled(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        ends: list[str] = []

        @callbacks.on("*", timeout=SOON, max_attempts=1)
        async def slow(_: Event) -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ends.append("cancelled")

        delivery_id = await ledger.owe_one("slow")
        with ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "dead"))

        assert ["cancelled"] == ends
        assert "timeout of 0.1 s" in str((await ledger.delivery(delivery_id)).last_error)

    async def test_a_function_that_never_returns_is_replaced(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()
        callbacks.on("*", name="stuck", timeout=SOON, max_attempts=1)(lambda _: released.wait())
        for number in range(3):
            await ledger.owe_one("stuck", envelope=f"env_{number}")

        with ledger.dispatching(callbacks, slots=1, stuck_cap=3) as dispatcher:
            await until(lambda: all_are(ledger, "dead"))
            assert 3 == dispatcher.counts()["stuck"]
            assert [] == dispatcher.problems()
            released.set()
            await until(lambda: dispatcher.counts()["stuck"] == 0)

    async def test_too_many_of_them_are_a_problem_until_they_end(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()
        calls: list[Event] = []

        @callbacks.on("*", timeout=SOON, max_attempts=1)
        def stuck(event: Event) -> None:
            calls.append(event)
            released.wait()

        for number in range(4):
            await ledger.owe_one("stuck", envelope=f"env_{number}")

        with ledger.dispatching(callbacks, slots=2, stuck_cap=1) as dispatcher:
            await until(lambda: dispatcher.counts().get("stuck") == 3)
            (problem,) = dispatcher.problems()
            pending = (await ledger.states()).count("pending")
            released.set()
            await until(lambda: len(calls) == 4)
            await until(lambda: dispatcher.problems() == [])

        # The last one is done, unless the machine has made even that one late.
        assert ["dead"] * 3 == sorted(await ledger.states())[:3]
        assert "3 calls of callbacks do not end (stuck)" in problem
        assert 1 == pending

    async def test_a_coroutine_that_swallows_its_cancellation_is_written_off(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = asyncio.Event()
        seen: list[Event] = []

        @callbacks.on("*", timeout=SOON, max_attempts=1)
        async def stubborn(_: Event) -> None:
            while not released.is_set():
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

        @callbacks.on("envelope.voided")
        async def healthy(event: Event) -> None:
            seen.append(event)

        delivery_id = await ledger.owe_one("stubborn")
        with ledger.dispatching(callbacks, cancel_grace=SOON) as dispatcher:
            await until(lambda: all_are(ledger, "dead"))
            assert 1 == dispatcher.counts()["stuck"]
            await ledger.owe_one("healthy", event_type="envelope.voided")
            await until(lambda: seen)
            released.set()
            await until(lambda: dispatcher.counts()["stuck"] == 0)

        assert "nor when it was cancelled" in str((await ledger.delivery(delivery_id)).last_error)

    async def test_a_coroutine_that_blocks_the_event_loop_holds_up_nobody_for_long(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()
        seen: list[Event] = []

        @callbacks.on("envelope.voided", timeout=SECOND, max_attempts=1)
        async def blocking(_: Event) -> None:
            released.wait()

        @callbacks.on("envelope.signed")
        async def healthy(event: Event) -> None:
            seen.append(event)

        blocked = await ledger.owe_one("blocking", event_type="envelope.voided")
        with ledger.dispatching(callbacks, block_limit=SOON, cancel_grace=SOON) as dispatcher:
            await until(lambda: dispatcher.counts().get("running") == 1)
            await ledger.owe_one("healthy")
            await until(lambda: seen)
            await until(lambda: has_verdicts(ledger, "done", "dead"))
            assert [] == dispatcher.problems()
            released.set()
            await until(lambda: dispatcher.counts()["stuck"] == 0)

        error = (await ledger.delivery(blocked)).last_error
        assert "the event loop was blocked by blocking" in str(error)

    async def test_when_too_many_loops_are_blocked_others_get_the_work(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()

        @callbacks.on("*", timeout=60)
        async def blocking(_: Event) -> None:
            released.wait()

        for number in range(4):
            await ledger.owe_one("blocking", envelope=f"env_{number}")
        # A loop that is only slow, on a busy machine, must not be taken for one that is blocked.
        with ledger.dispatching(callbacks, block_limit=2 * SECOND, stuck_cap=1) as dispatcher:
            await until(dispatcher.problems)
            (problem,) = dispatcher.problems()
            await until(lambda: has_states(ledger, "pending", "pending", "running", "running"))
            released.set()
            await until(lambda: all_are(ledger, "done"))
            await until(lambda: dispatcher.problems() == [])

        assert "2 event loops of callbacks are blocked" in problem

    async def test_an_honest_call_longer_than_its_lease_is_not_run_twice(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        calls: list[int] = []

        @callbacks.on("*")
        async def long(event: Event) -> None:
            calls.append(event.attempt)
            await asyncio.sleep(5)

        await ledger.owe_one("long")
        # As long as a busy machine may take to renew it.
        with ledger.dispatching(callbacks, lease=3 * SECOND), ledger.dispatching(callbacks):
            await until(lambda: all_are(ledger, "done"))

        assert [1] == calls

    async def test_a_call_whose_lease_was_lost_is_cancelled(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """Somebody else has it by now; two at once would be worse than one cut off."""
        ends: list[str] = []

        @callbacks.on("*")
        async def long(_: Event) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        await ledger.owe_one("long")
        with ledger.dispatching(callbacks, lease=0.3 * SECOND):
            await until(lambda: all_are(ledger, "running"))
            await ledger.change("UPDATE deliveries SET token = token + 1, state = 'discarded'")
            await until(lambda: ends)

        assert ["discarded"] == await ledger.states()


class TestStop:
    async def test_calls_under_way_may_end(self, ledger: Ledger, callbacks: Callbacks) -> None:
        started = threading.Event()

        @callbacks.on("*")
        async def brief(_: Event) -> None:
            started.set()
            await asyncio.sleep(0.3)

        await ledger.owe_one("brief")
        with ledger.dispatching(callbacks):
            await until(started.is_set)

        assert ["done"] == await ledger.states()

    @pytest.mark.parametrize("is_async", [True, False], ids=["coroutine", "function"])
    async def test_one_cut_off_by_a_deploy_has_not_used_up_an_attempt(
        self,
        ledger: Ledger,
        callbacks: Callbacks,
        monkeypatch: pytest.MonkeyPatch,
        *,
        is_async: bool,
    ) -> None:
        # What a busy machine takes to write it down is not the matter here.
        monkeypatch.setattr("app.dispatch.engine.LAST_WORDS", 20 * SECOND)
        monkeypatch.setattr(worker, "PATIENCE", 30 * SECOND)
        released = threading.Event()
        started = threading.Event()

        async def coroutine(_: Event) -> None:
            started.set()
            await asyncio.sleep(60)

        def function(_: Event) -> None:
            started.set()
            released.wait(60)

        callbacks.on("*", name="long")(coroutine if is_async else function)
        delivery_id = await ledger.owe_one("long")
        with ledger.dispatching(callbacks, grace=0.2):
            await until(started.is_set)
        released.set()

        row = await ledger.delivery(delivery_id)
        assert ("pending", 0) == (row.state, row.attempts)
        assert row.due_at is not None
        assert row.due_at <= datetime.now(UTC) + SECOND
        assert [] == await ledger.attempts()

    async def test_what_was_claimed_and_has_not_begun_is_given_back_at_once(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        began, released = threading.Event(), threading.Event()

        @callbacks.on("*", timeout=60)
        async def blocking(_: Event) -> None:
            began.set()
            released.wait(20)

        for number in range(5):
            await ledger.owe_one("blocking", envelope=f"env_{number}")
        with ledger.dispatching(callbacks, block_limit=60 * SECOND) as dispatcher:
            await until(lambda: dispatcher.counts().get("running") == 5 and began.is_set())
            stopping = asyncio.create_task(asyncio.to_thread(dispatcher.stop, 20 * SECOND))
            await until(lambda: has_states(ledger, *["pending"] * 4, "running"))
            released.set()
            await stopping

        assert ["done", *["pending"] * 4] == sorted(await ledger.states())

    async def test_it_ends_in_time_without_a_database(self, callbacks: Callbacks) -> None:
        callbacks.on("*", name="keep")(print)
        nowhere = DatabaseAddress("postgresql://nobody@127.0.0.1:9/nothing")
        dispatcher = Dispatcher(
            nowhere, tuple(callbacks), options=DispatchOptions(**QUICK), worker="w"
        )
        dispatcher.start()
        await until(dispatcher.problems)

        began = time.monotonic()
        await asyncio.to_thread(dispatcher.stop, SECOND)

        assert time.monotonic() - began < 10
        assert not dispatcher._thread.is_alive()

    async def test_what_cannot_be_given_back_is_tried_until_the_time_is_over(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        ledger, started = postgres_ledger, threading.Event()

        @callbacks.on("*")
        async def long(_: Event) -> None:
            started.set()
            await asyncio.sleep(60)

        await ledger.owe_one("long")
        with ledger.dispatching(callbacks, grace=0.1):
            await until(started.is_set)
            await ledger.change(
                "ALTER TABLE deliveries ADD CONSTRAINT picky CHECK (state = 'running')"
            )

        assert ["running"] == await ledger.states()

    async def test_what_was_just_claimed_is_given_back(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """A claim may be on its way when the end begins."""
        ledger = postgres_ledger
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)
        await ledger.register("keep")
        delivery_id = await ledger.owe_one("keep")
        await ledger.change(
            "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END'"
        )
        await ledger.change(
            "CREATE TRIGGER dawdle BEFORE UPDATE ON deliveries FOR EACH ROW "
            "WHEN (NEW.state = 'running') EXECUTE FUNCTION dawdle()"
        )
        holder = await asyncpg.connect(ledger.address.url)
        await holder.execute("SELECT pg_advisory_lock(7)")
        with ledger.dispatching(callbacks) as dispatcher:
            await until(lambda: is_at_work(ledger))
            stopping = asyncio.create_task(asyncio.to_thread(dispatcher.stop, 20 * SECOND))
            await until(lambda: dispatcher._engine and dispatcher._engine._is_stopping.is_set())
            await holder.close()
            await stopping

        row = await ledger.delivery(delivery_id)
        assert ("pending", 0) == (row.state, row.attempts)
        assert [] == seen

    async def test_what_is_claimed_when_the_end_has_begun_is_given_back(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(print)
        await ledger.register("keep")
        delivery_id = await ledger.owe_one("keep")
        engine = Engine(ledger.database, tuple(callbacks), options=DispatchOptions(), worker="w")
        engine.stop()

        assert not await engine._claim()

        row = await ledger.delivery(delivery_id)
        assert ("pending", 0) == (row.state, row.attempts)
        assert (1, []) == (engine.totals["released"], engine.crew.held)
        engine.crew.close(1)

    async def test_one_that_is_stopped_before_it_has_begun_ends(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        may_begin, factory = threading.Event(), worker._loop_factory

        def late() -> Callable[[], asyncio.AbstractEventLoop]:
            may_begin.wait(30)
            return factory()

        monkeypatch.setattr(worker, "_loop_factory", late)
        callbacks.on("*", name="keep")(print)
        dispatcher = Dispatcher(ledger.address, tuple(callbacks), worker="w")

        dispatcher.start()
        stopping = asyncio.create_task(asyncio.to_thread(dispatcher.stop, 20 * SECOND))
        await until(lambda: dispatcher._is_stopping)
        may_begin.set()
        await stopping

        assert not dispatcher._thread.is_alive()
        assert "it has ended" == dispatcher._death

    async def test_a_dispatcher_that_has_died_says_so(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(print)
        with ledger.dispatching(callbacks) as dispatcher:
            await until(dispatcher.counts)
            assert dispatcher._loop is not None
            dispatcher._loop.call_soon_threadsafe(dispatcher._loop.stop)
            await until(lambda: "the dispatch loop is not running" in str(dispatcher.problems()))

    async def test_one_whose_loop_does_not_turn_says_so(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(print)
        released = threading.Event()
        with ledger.dispatching(callbacks, silence_limit=SOON) as dispatcher:
            await until(dispatcher.counts)
            assert dispatcher._loop is not None
            dispatcher._loop.call_soon_threadsafe(released.wait, 30)
            await until(lambda: "has not turned for" in str(dispatcher.problems()))
            released.set()
            await until(lambda: dispatcher.problems() == [])

    async def test_it_needs_no_faster_loop_than_the_standard_one(
        self, ledger: Ledger, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "uvloop", None)
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)
        await ledger.owe_one("keep")

        with ledger.dispatching(callbacks):
            await until(lambda: seen)


class TestRegistration:
    async def test_what_nobody_serves_is_parked_and_comes_back(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="kept")(lambda _: None)
        renamed = Callbacks()
        seen: list[Event] = []
        renamed.on("*", name="renamed")(seen.append)
        await ledger.register("renamed")
        delivery_id = await ledger.owe_one("renamed")
        with ledger.dispatching(callbacks, park_after=SECOND):
            await until(lambda: is_parked(ledger, delivery_id))
            await ledger.owe_one("kept", envelope="env_2")

        with ledger.dispatching(renamed):
            await until(lambda: seen)

        assert str(delivery_id) == seen[0].delivery_id

    async def test_what_another_process_parked_meanwhile_comes_back_as_well(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[Event] = []
        callbacks.on("*", name="keep")(seen.append)
        with ledger.dispatching(callbacks):
            await until(lambda: is_registered(ledger, "keep"))
            await ledger.owe_one("keep")
            await until(lambda: seen)
            await ledger.change("UPDATE deliveries SET state = 'parked', due_at = NULL")
            await until(lambda: len(seen) == 2)

    async def test_events_that_intake_did_not_know_to_owe_are_found(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        seen: list[str] = []

        @callbacks.on("envelope.*")
        async def keep(event: Event) -> None:
            seen.append(event.id)

        with ledger.dispatching(callbacks), ledger.dispatching(callbacks):
            await until(lambda: is_registered(ledger, "keep"))
            event = await ledger.record()
            await until(lambda: seen)
            await until(lambda: all_are(ledger, "done"))

        assert [str(event)] == seen

    async def test_a_database_that_was_restored_from_before_knows_them_again(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(lambda _: None)
        with ledger.dispatching(callbacks):
            await until(lambda: is_registered(ledger, "keep"))
            await ledger.change("DELETE FROM callbacks")
            await until(lambda: is_registered(ledger, "keep"))


class TestTroubledDatabase:
    async def test_work_goes_on_by_itself_after_an_absence(self, callbacks: Callbacks) -> None:
        from app.store.migrations import migrate

        seen: list[str | None] = []

        @callbacks.on("*")
        async def keep(event: Event) -> None:
            seen.append(event.envelope_id)

        with Postgres() as postgres:
            url = postgres.create_database("receiver")
            await migrate(url)
            ledger = Ledger(url)
            await ledger.owe_one("keep", envelope="env_1")
            postgres.stop()
            with ledger.dispatching(callbacks) as dispatcher:
                await until(
                    lambda: any("register" in p or "tidy" in p for p in dispatcher.problems())
                )
                postgres.start()
                await until(lambda: seen == ["env_1"])
                await until(lambda: dispatcher.problems() == [])
                postgres.kill()
                await until(lambda: dispatcher.problems() != [])
                postgres.start()
                await ledger.database.close()
                ledger = Ledger(url)
                await ledger.owe_one("keep", envelope="env_2")
                await until(lambda: seen == ["env_1", "env_2"])
                await until(lambda: all_are(ledger, "done"))
                await until(lambda: dispatcher.problems() == [])
            await ledger.database.close()

    async def test_a_verdict_waits_for_the_database(self, callbacks: Callbacks) -> None:
        from app.store.migrations import migrate

        started, released = threading.Event(), threading.Event()
        calls: list[int] = []

        @callbacks.on("*", timeout=60)
        def keep(event: Event) -> None:
            calls.append(event.attempt)
            started.set()
            released.wait(60)

        with Postgres() as postgres:
            url = postgres.create_database("receiver")
            await migrate(url)
            ledger = Ledger(url)
            await ledger.owe_one("keep")
            with ledger.dispatching(callbacks) as dispatcher:
                await until(started.is_set)
                await ledger.database.close()
                postgres.stop()
                released.set()
                await until(lambda: any("settle" in p for p in dispatcher.problems()))
                postgres.start()
                await until(lambda: all_are(ledger, "done"))
            await ledger.database.close()

        assert [1] == calls

    async def test_what_cannot_be_read_is_given_back_and_not_counted(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """A claim is committed by itself; then reading what was claimed fails."""
        callbacks.on("*", name="keep")(lambda _: None)
        delivery_id = await ledger.owe_one("keep")
        await ledger.change("ALTER TABLE envelopes RENAME TO away")

        with ledger.dispatching(callbacks, lease=3600 * SECOND) as dispatcher:
            await until(lambda: any("claim" in each for each in dispatcher.problems()))
            await ledger.change("ALTER TABLE away RENAME TO envelopes")
            await until(lambda: all_are(ledger, "done"))

        assert 1 == (await ledger.delivery(delivery_id)).attempts
        assert ["done"] == await ledger.verdicts()

    async def test_a_renewal_that_failed_is_tried_again_without_a_wait(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """With two waits of a third of the lease, the second try would be the last."""
        released = threading.Event()
        callbacks.on("*", name="keep")(lambda _: released.wait(60))
        await ledger.register("keep")
        await ledger.owe_one("keep")
        options = DispatchOptions(lease=3600 * SECOND)
        engine = Engine(ledger.database, tuple(callbacks), options=options, worker="w")
        await engine._claim()

        await ledger.change("ALTER TABLE deliveries RENAME TO away")
        with pytest.raises(DBAPIError, match="deliveries"):
            await asyncio.wait_for(engine._renew_step(), 20)

        released.set()
        await until(lambda: not engine.crew.held)
        engine.crew.close(1)


class TestPace:
    async def test_what_was_claimed_ahead_of_calls_that_became_slow_is_for_others(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        released = threading.Event()

        @callbacks.on("*", timeout=3600)
        def file(event: Event) -> None:
            if event.sequence == 2:
                released.wait(60)

        await ledger.register("file")
        await owe_many(ledger, 100, sequence=1)
        await owe_many(ledger, 50, sequence=2)
        ended, left = ["done"] * 100, ["pending"] * 48
        with ledger.dispatching(callbacks, slots=2):
            await until(lambda: has_states(ledger, *ended, "running", "running", *left))
            released.set()


async def owe_many(ledger: Ledger, number: int, *, sequence: int) -> None:
    """Owe the same event of many envelopes, due at one moment."""
    envelopes = [f"env_{sequence}_{n}" for n in range(number)]
    owed = [
        (await ledger.record(envelope=each, sequence=sequence), "file", "default", each, sequence)
        for each in envelopes
    ]
    async with ledger.transaction() as connection:
        await deliveries.enqueue(connection, owed)


class TestManyWorkers:
    async def test_eight_workers_run_thousands_of_deliveries_once_each(
        self, postgres_ledger: Ledger, tmp_path: Path
    ) -> None:
        ledger, journal = postgres_ledger, tmp_path / "journal"
        ready = journal.with_name("journal.ready")
        await ledger.register("file")

        with (
            working(ledger, journal, "--dispatchers=4") as first,
            working(ledger, journal, "--dispatchers=4") as second,
        ):
            # One that is still starting would take no part, and not know how to end.
            await until(lambda: len(lines(ready)) == 2)
            await many(ledger, 4_000)
            await until(lambda: len(lines(journal)) >= 4_000, limit=80)
            await until(lambda: all_are(ledger, "done"), limit=80)
            for process in (first, second):
                process.send_signal(signal.SIGTERM)
            assert [0, 0] == [process.wait(20) for process in (first, second)]

        calls = Counter(lines(journal))
        assert 4_000 == len(calls)
        assert {1} == set(calls.values())
        assert 4_000 == len(await ledger.attempts())

    async def test_what_a_killed_worker_had_is_run_again_when_its_lease_ends(
        self, ledger: Ledger, tmp_path: Path
    ) -> None:
        journal = tmp_path / "journal"
        delivery_id = await ledger.owe_one("file")
        with working(ledger, journal, "--lease=2", "--hang") as victim:
            await until(lambda: lines(journal))
            victim.kill()
            killed = time.monotonic()

        with working(ledger, journal):
            await until(lambda: all_are(ledger, "done"))

        assert time.monotonic() - killed < 2 * (2 + 10)
        assert [f"{delivery_id} 1", f"{delivery_id} 2"] == lines(journal)
        assert ["lost", "done"] == await ledger.verdicts()

    async def test_a_deploy_gives_back_what_a_process_had(
        self, ledger: Ledger, tmp_path: Path
    ) -> None:
        journal = tmp_path / "journal"
        delivery_id = await ledger.owe_one("file")
        with working(ledger, journal, "--hang") as old:
            await until(lambda: lines(journal))
            old.send_signal(signal.SIGTERM)
            assert 0 == old.wait(20)

        with working(ledger, journal):
            await until(lambda: all_are(ledger, "done"))

        assert [f"{delivery_id} 1"] * 2 == lines(journal)
        assert ["done"] == await ledger.verdicts()


async def many(ledger: Ledger, number: int) -> None:
    """Owe many events of as many envelopes."""
    await ledger.change(
        "INSERT INTO events "
        "(id, account, envelope_id, type, received_at, sequence, effect) "
        "SELECT gen_random_uuid(), 'default', 'env_' || n, 'envelope.signed', now(), 1, 'applied' "
        "FROM generate_series(1, :number) n",
        number=number,
    )
    await ledger.change(
        "INSERT INTO deliveries "
        "(id, event_id, callback, account, envelope_id, sequence, due_at, created_at) "
        "SELECT gen_random_uuid(), id, 'file', account, envelope_id, 1, now(), now() FROM events"
    )


async def has_verdicts(ledger: Ledger, *verdicts: str) -> bool:
    return sorted(verdicts) == sorted(await ledger.verdicts())


async def has_states(ledger: Ledger, *states: str) -> bool:
    return sorted(states) == sorted(await ledger.states())


async def is_registered(ledger: Ledger, name: str) -> bool:
    from app.store import callbacks

    async with ledger.transaction() as connection:
        return name in {each.name for each in await callbacks.read(connection)}


async def is_at_work(ledger: Ledger) -> bool:
    """True while a claim is under way in the server."""
    question = (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND wait_event = 'advisory' "
        "AND datname = current_database()"
    )
    async with ledger.transaction() as connection:
        return bool((await connection.exec_driver_sql(question)).scalar_one())


async def is_parked(ledger: Ledger, delivery_id: object) -> bool:
    return any(d.id == delivery_id for d in await ledger.deliveries(state="parked"))


class TestPressure:
    async def test_webhooks_go_first_but_not_for_ever(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        callbacks.on("*", name="keep")(lambda _: None)
        asked: list[bool] = []

        def is_pressed() -> bool:
            asked.append(True)
            return True

        await ledger.owe("keep")
        with ledger.dispatching(callbacks, is_pressed=is_pressed):
            await until(lambda: all_are(ledger, "done"))

        assert len(asked) > 10
