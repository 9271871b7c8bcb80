"""A callback that keeps failing is left alone, by all processes together; nothing is lost."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import pytest
import structlog
from sqlalchemy import select

from app.callbacks import Breaker, Callbacks, Event, GiveUp, RetryLater
from app.dispatch.breaker import Tally
from app.dispatch.guard import PROBE_MARGIN, Guard
from app.dispatch.worker import Dispatcher
from app.store import breakers
from app.store.models import CallbackRow
from tests.integration.ledger import LEASE, Ledger, until
from tests.integration.test_dispatch import all_are, has_states

# Opens after three failures, for as long as the test lets it.
LONG = Breaker(calls=3, pause=timedelta(minutes=10), longest=timedelta(hours=1), probes=1)
SHORT = Breaker(calls=3, pause=timedelta(milliseconds=100), probes=1)
OFTEN = timedelta(milliseconds=20)


class Downstream:
    """What the callback calls: away until it is back."""

    def __init__(self) -> None:
        self.is_away = True
        self.calls = 0

    async def __call__(self, _: Event) -> None:
        self.calls += 1
        if self.is_away:
            raise ConnectionError("nobody answers")


def served(downstream: Any, breaker: Breaker | None, **options: Any) -> Callbacks:
    callbacks = Callbacks()
    callbacks.on("*", name="file", breaker=breaker, **{"backoff": 0.01, **options})(downstream)
    return callbacks


async def owe(ledger: Ledger, number: int) -> None:
    for each in range(number):
        await ledger.owe("file", envelope=f"env_{each}")


async def gate(ledger: Ledger) -> Any:
    async with ledger.transaction() as connection:
        query = select(CallbackRow.__table__).where(CallbackRow.name == "file")
        return (await connection.execute(query)).one_or_none()


async def is_open(ledger: Ledger) -> bool:
    row = await gate(ledger)
    return row is not None and row.open_until is not None


async def comes_to_rest(ledger: Ledger, dispatcher: Dispatcher) -> None:
    """Wait until nothing is called any more, and the database knows how all calls have ended."""
    engine = dispatcher._engine
    assert engine is not None
    exchange, exchanges = engine.guard._exchange, list[int]()

    async def counted(tallies: Any) -> Any:
        gates = await exchange(tallies)
        exchanges.append(len(tallies))
        return gates

    await until(lambda: not engine.guard.lets_through("file"))
    turns = engine._turns
    # What was claimed meanwhile is given back, or has failed.
    await until(lambda: engine._turns > turns)
    await until(lambda: nothing_runs(ledger))
    # How the last calls ended is told, too, and changes nothing any more.
    engine.guard._exchange = counted  # type: ignore[method-assign]
    await until(lambda: len(exchanges) >= 2)


async def end_pause(ledger: Ledger) -> None:
    await ledger.shift("callbacks", "open_until", timedelta(hours=-2))


class TestOpening:
    async def test_deliveries_gather_and_use_up_no_attempts(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with ledger.dispatching(served(downstream, LONG), guard_every=OFTEN) as dispatcher:
            await owe(ledger, 3)
            await until(lambda: is_open(ledger))
            await comes_to_rest(ledger, dispatcher)
            calls = downstream.calls
            before = {d.id for d in await ledger.deliveries()}
            await owe(ledger, 10)
            await asyncio.sleep(0.3)

        assert calls == downstream.calls
        fresh = [d for d in await ledger.deliveries() if d.id not in before]
        assert [("pending", 0)] * 10 == [(d.state, d.attempts) for d in fresh]

    async def test_is_said_once(self, ledger: Ledger) -> None:
        with (
            structlog.testing.capture_logs() as lines,
            ledger.dispatching(served(Downstream(), LONG), guard_every=OFTEN),
        ):
            await owe(ledger, 5)
            await until(lambda: is_open(ledger))
            await asyncio.sleep(0.1)

        opened = [line for line in lines if line["event"] == "breaker.opened"]
        assert ["file"] == [line["callback"] for line in opened]
        assert opened[0]["failed"] >= 3

    async def test_another_callback_goes_on(self, ledger: Ledger) -> None:
        callbacks, seen = served(Downstream(), LONG), list[str]()

        @callbacks.on("*", name="other")
        async def other(event: Event) -> None:
            seen.append(event.id)

        with ledger.dispatching(callbacks, guard_every=OFTEN):
            await owe(ledger, 3)
            await until(lambda: is_open(ledger))
            await ledger.owe("other", envelope="another")
            await until(lambda: seen)

    async def test_counts_what_all_processes_see(self, ledger: Ledger) -> None:
        """Each of them sees too little to judge by."""
        away = Downstream()
        callbacks = served(away, Breaker(calls=4, pause=timedelta(hours=1)), backoff=3600)

        with (
            ledger.dispatching(callbacks, worker="one", slots=1, guard_every=OFTEN),
            ledger.dispatching(callbacks, worker="two", slots=1, guard_every=OFTEN),
        ):
            await owe(ledger, 4)
            await until(lambda: is_open(ledger))

        assert 4 <= away.calls <= 8

    async def test_a_process_that_starts_finds_it_open(self, ledger: Ledger) -> None:
        with ledger.dispatching(served(Downstream(), LONG), guard_every=OFTEN):
            await owe(ledger, 3)
            await until(lambda: is_open(ledger))
        late = Downstream()

        with ledger.dispatching(served(late, LONG), guard_every=OFTEN):
            await owe(ledger, 3)
            await asyncio.sleep(0.3)

        assert 0 == late.calls

    async def test_an_author_who_asks_for_a_retry_opens_nothing(self, ledger: Ledger) -> None:
        calls: list[str] = []

        async def not_yet(event: Event) -> None:
            calls.append(event.id)
            raise RetryLater("not in the CRM yet", after=timedelta(0))

        with ledger.dispatching(served(not_yet, LONG, max_attempts=100), guard_every=OFTEN):
            await owe(ledger, 2)
            await until(lambda: len(calls) > 10)

            assert not await is_open(ledger)

    async def test_without_a_breaker_it_is_never_left_alone(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with ledger.dispatching(served(downstream, None), guard_every=OFTEN):
            await owe(ledger, 3)
            await until(lambda: downstream.calls > 5)

            assert not await is_open(ledger)


class TestRelease:
    """A new release has taken the breaker away."""

    async def test_without_it_what_it_held_back_is_delivered(self, ledger: Ledger) -> None:
        await half_open(ledger)
        await ledger.shift("callbacks", "open_until", timedelta(hours=1))
        await ledger.change("UPDATE callbacks SET probe_until = open_until, breaker = '{}'")
        await owe(ledger, 2)

        with ledger.dispatching(served(lambda _: None, None), guard_every=OFTEN):
            await until(lambda: all_are(ledger, "done"))

        row = await gate(ledger)
        assert (None, None, None) == (row.open_until, row.probe_until, row.breaker)

    async def test_wins_over_an_older_one_that_still_has_it(self, ledger: Ledger) -> None:
        with ledger.dispatching(served(lambda _: None, None), guard_every=OFTEN):
            await owe(ledger, 1)
            await until(lambda: all_are(ledger, "done"))
            await ledger.change("UPDATE callbacks SET open_until = last_seen_at")
            await owe(ledger, 1)
            await until(lambda: all_are(ledger, "done"))


class TestPause:
    async def test_gives_back_what_has_not_begun(self, ledger: Ledger) -> None:
        began, released = threading.Event(), threading.Event()

        async def block(_: Event) -> None:
            began.set()
            released.wait(30)

        await owe(ledger, 5)
        callbacks = served(block, None, timeout=60)
        with ledger.dispatching(callbacks, guard_every=OFTEN, block_limit=LEASE) as dispatcher:
            await until(lambda: dispatcher.counts().get("running") == 5 and began.is_set())
            await ledger.change("UPDATE callbacks SET paused_at = last_seen_at")
            await until(lambda: dispatcher.counts().get("running") == 1)
            await until(lambda: has_states(ledger, *["pending"] * 4, "running"))
            released.set()

        assert ["done", *["pending"] * 4] == sorted(await ledger.states())
        assert [0] * 4 == [d.attempts for d in await ledger.deliveries(state="pending")]


async def nothing_runs(ledger: Ledger) -> bool:
    return "running" not in await ledger.states()


class TestClosing:
    async def test_a_probe_that_succeeds_lets_everything_through(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with (
            structlog.testing.capture_logs() as lines,
            ledger.dispatching(served(downstream, LONG), guard_every=OFTEN),
        ):
            await owe(ledger, 6)
            await until(lambda: is_open(ledger))
            downstream.is_away = False
            await until(lambda: all_are_done_some_pauses_later(ledger))

        assert "breaker.closed" in [line["event"] for line in lines]

    async def test_a_probe_that_fails_costs_one_attempt(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with ledger.dispatching(served(downstream, LONG), guard_every=OFTEN) as dispatcher:
            await owe(ledger, 6)
            await until(lambda: is_open(ledger))
            await comes_to_rest(ledger, dispatcher)
            calls = downstream.calls
            await end_pause(ledger)
            await until(lambda: is_shut_again(ledger))

        assert calls + 1 == downstream.calls

    async def test_it_recovers_by_itself(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with ledger.dispatching(served(downstream, SHORT, max_attempts=1000), guard_every=OFTEN):
            await owe(ledger, 6)
            await until(lambda: has_tripped(ledger))
            downstream.is_away = False
            await until(lambda: all_are(ledger, "done"))

    async def test_with_nothing_to_probe_with_others_may_probe(self, ledger: Ledger) -> None:
        downstream = Downstream()

        with ledger.dispatching(served(downstream, LONG, max_attempts=1), guard_every=OFTEN):
            await owe(ledger, 3)
            await until(lambda: is_open(ledger))
            await until(lambda: is_free_to_probe(ledger))
            downstream.is_away = False
            delivery = await ledger.owe_one("file", envelope="new")
            await until(lambda: is_done(ledger, delivery))


async def all_are_done_some_pauses_later(ledger: Ledger) -> bool:
    # A call that was under way may fail after the pause, and make it longer.
    await end_pause(ledger)
    return await all_are(ledger, "done")


async def is_shut_again(ledger: Ledger) -> bool:
    row = await gate(ledger)
    return bool(row.breaker["trips"] == 2)


async def has_tripped(ledger: Ledger) -> bool:
    row = await gate(ledger)
    return row is not None and bool(row.breaker and row.breaker["trips"])


async def is_free_to_probe(ledger: Ledger) -> bool:
    await end_pause(ledger)
    row = await gate(ledger)
    return row.open_until is not None and row.probe_until is None


async def is_done(ledger: Ledger, delivery_id: Any) -> bool:
    return (await ledger.delivery(delivery_id)).state == "done"


class TestProbing:
    async def test_is_one_workers_right_at_a_time(self, ledger: Ledger) -> None:
        await ledger.register("file")
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")
        hold = timedelta(minutes=1)

        async with ledger.transaction() as connection:
            won = [await breakers.probe(connection, "file", hold=hold) for _ in range(3)]

        assert [True, False, False] == won

    async def test_passes_on_when_its_worker_is_lost(self, ledger: Ledger) -> None:
        await ledger.register("file")
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")
        async with ledger.transaction() as connection:
            assert await breakers.probe(connection, "file", hold=timedelta(minutes=1))

        await ledger.shift("callbacks", "probe_until", timedelta(minutes=-2))

        async with ledger.transaction() as connection:
            assert await breakers.probe(connection, "file", hold=timedelta(minutes=1))

    async def test_is_nobodys_right_while_it_is_open(self, ledger: Ledger) -> None:
        await ledger.register("file")
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")
        await ledger.shift("callbacks", "open_until", timedelta(minutes=1))

        async with ledger.transaction() as connection:
            assert not await breakers.probe(connection, "file", hold=timedelta(minutes=1))


async def half_open(ledger: Ledger) -> None:
    await ledger.register("file")
    await ledger.change("UPDATE callbacks SET open_until = last_seen_at")


async def is_nobodys(ledger: Ledger) -> bool:
    return (await gate(ledger)).probe_until is None


async def is_closed(ledger: Ledger) -> bool:
    return not await is_open(ledger)


async def give_up(_: Event) -> NoReturn:
    raise GiveUp("the customer is gone")


async def ask_for_later(_: Event) -> NoReturn:
    raise RetryLater("closed on Sundays", after=timedelta(hours=5))


async def skip(_: Event) -> None:
    return


class TestProbe:
    @pytest.mark.parametrize("function", [give_up, ask_for_later, skip])
    async def test_that_ends_by_the_authors_choice_has_not_failed(
        self, ledger: Ledger, function: Any
    ) -> None:
        wanted = {"where": lambda _: False} if function is skip else {}
        await half_open(ledger)
        await owe(ledger, 1)

        with ledger.dispatching(served(function, LONG, **wanted), guard_every=OFTEN):
            await until(lambda: is_closed(ledger))

    async def test_is_held_like_a_lease_however_long_it_takes(self, ledger: Ledger) -> None:
        # As long as a busy machine may take to renew it.
        lease = timedelta(seconds=3)
        await half_open(ledger)
        await owe(ledger, 1)

        async def has_moved_on() -> bool:
            return bool((await gate(ledger)).probe_until > first)

        callbacks = served(hang, LONG, timeout=3600)
        with ledger.dispatching(callbacks, guard_every=OFTEN, lease=lease, grace=0.1):
            await until(lambda: is_running(ledger))
            first = (await gate(ledger)).probe_until
            assert first < datetime.now(UTC) + lease + 2 * PROBE_MARGIN
            await until(has_moved_on)

    async def test_is_given_back_by_a_worker_that_stops(self, ledger: Ledger) -> None:
        await half_open(ledger)
        await owe(ledger, 1)

        with ledger.dispatching(served(hang, LONG), guard_every=OFTEN, grace=0.1):
            await until(lambda: is_running(ledger))
            assert not await is_nobodys(ledger)

        assert await is_nobodys(ledger)

    async def test_is_given_back_by_a_worker_that_lost_its_lease(self, ledger: Ledger) -> None:
        lease = timedelta(seconds=0.3)
        await half_open(ledger)
        await owe(ledger, 1)

        with ledger.dispatching(served(hang, LONG), guard_every=OFTEN, lease=lease):
            await until(lambda: is_running(ledger))
            await ledger.change("UPDATE deliveries SET token = token + 1, state = 'discarded'")
            await until(lambda: is_nobodys(ledger))

    async def test_is_given_back_after_a_claim_that_failed(self, ledger: Ledger) -> None:
        await half_open(ledger)
        await owe(ledger, 1)
        # Needed once there is something to probe with.
        await ledger.change("ALTER TABLE envelopes RENAME TO away")

        callbacks, lease = served(lambda _: None, LONG, timeout=3600), timedelta(seconds=1)
        with ledger.dispatching(callbacks, guard_every=OFTEN, lease=lease) as dispatcher:
            await until(lambda: any("claim" in each for each in dispatcher.problems()))
            await ledger.change("ALTER TABLE away RENAME TO envelopes")
            await until(lambda: all_are(ledger, "done"))

    async def test_passes_on_if_it_was_buried_uncalled(self, ledger: Ledger) -> None:
        await half_open(ledger)
        await owe(ledger, 1)
        await ledger.change("UPDATE deliveries SET attempts = 1")
        delivery = await ledger.owe_one("file", envelope="new")

        callbacks = served(lambda _: None, LONG, max_attempts=1, timeout=3600)
        with ledger.dispatching(callbacks, guard_every=OFTEN):
            await until(lambda: is_done(ledger, delivery))


async def hang(_: Event) -> None:
    await asyncio.sleep(3600)


async def is_running(ledger: Ledger) -> bool:
    return "running" in await ledger.states()


class TestCounting:
    async def test_what_could_not_be_told_is_told_later(self, ledger: Ledger) -> None:
        await ledger.register("file")
        is_broken = True

        def begin(**_: Any) -> Any:
            if is_broken:
                raise ConnectionResetError
            return ledger.transaction()

        guard = Guard(served(Downstream(), LONG), begin, every=OFTEN, lease=LEASE, on_shut=ignore)
        guard._count("file", Tally(failed=3))
        with pytest.raises(ConnectionResetError):
            await guard.step()
        is_broken = False
        await guard.step()

        assert await is_open(ledger)

    async def test_of_failures_while_it_is_open_changes_nothing(self, ledger: Ledger) -> None:
        await ledger.register("file")
        guard = Guard(
            served(Downstream(), LONG), begin_of(ledger), every=OFTEN, lease=LEASE, on_shut=ignore
        )
        guard._count("file", Tally(failed=3))
        await guard.step()
        before = await gate(ledger)

        guard._count("file", Tally(failed=1))
        await guard.step()

        assert before == await gate(ledger)
        assert not guard.lets_through("file")

    async def test_a_count_that_cannot_be_read_begins_anew(self, ledger: Ledger) -> None:
        await ledger.register("file")
        await ledger.change("""UPDATE callbacks SET breaker = '{"since": 1}'""")

        guard = Guard(
            served(Downstream(), LONG), begin_of(ledger), every=OFTEN, lease=LEASE, on_shut=ignore
        )
        guard._count("file", Tally(failed=1))
        await guard.step()

        assert 1 == (await gate(ledger)).breaker["failed"]


def begin_of(ledger: Ledger) -> Any:
    def begin(**_: Any) -> Any:
        return ledger.transaction()

    return begin


async def ignore(_: set[str]) -> None:
    return
