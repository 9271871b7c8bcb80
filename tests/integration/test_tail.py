"""The feed's end, read once for all who wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from app.store.feed import Item, Place
from app.upkeep import tail as tails
from app.upkeep.sequencer import Sequencer
from app.upkeep.tail import START, Tail, place_of
from tests.integration.ledger import Ledger
from tests.replicas import eventually


class Everything:
    """What somebody wants who wants all of it."""

    def takes(self, _: Item) -> bool:
        return True


class Only:
    """What somebody wants who wants one account's; counts what it looked at."""

    def __init__(self, account: str) -> None:
        self._account = account
        self.looked_at = 0

    def takes(self, item: Item) -> bool:
        self.looked_at += 1
        return item.account == self._account


ALL = Everything()


@pytest.fixture(name="tail")
async def _tail(ledger: Ledger) -> AsyncIterator[Tail]:
    """A tail that has found out where the feed ends, and does not look any more."""
    tail = Tail(ledger.database)
    following = asyncio.create_task(tail.run())
    async with come_to(tail, 0):
        pass
    await eventually(lambda: not tail._is_fresh)
    yield tail
    following.cancel()


def soon(seconds: float = 20) -> float:
    return asyncio.get_running_loop().time() + seconds


async def happen(ledger: Ledger, *envelopes: str) -> None:
    """Record events, and give them their places."""
    for envelope in envelopes:
        await ledger.record(envelope=envelope)
    await Sequencer(ledger.database, holder="a").step()


@asynccontextmanager
async def come_to(tail: Tail, position: int) -> AsyncIterator[None]:
    """Wait until the tail has come so far; somebody waits on, so that it goes on looking."""
    waiting = asyncio.create_task(wait_on(tail))
    await eventually(lambda: tail.end >= position and tail._is_fresh)
    yield
    waiting.cancel()


async def wait_on(tail: Tail) -> None:
    while not tail.is_closed:
        await tail.about("nobody", tail.end, until=soon())


async def restore(ledger: Ledger) -> None:
    """Make the feed what it is behind an old backup: given again, at another time."""
    await ledger.change("DELETE FROM feed")


class TestKept:
    async def test_items_are_found_behind_a_place(self, ledger: Ledger, tail: Tail) -> None:
        await happen(ledger, "env_1", "env_2", "env_3")
        async with come_to(tail, 3):
            kept = tail.behind(START)

            assert kept is not None
            assert ["env_1", "env_2", "env_3"] == [item.envelope_id for item in kept]
            assert kept[1:] == tail.behind(place_of(kept[0]))
            assert [] == tail.behind(place_of(kept[2]))

    async def test_places_of_another_feed_are_not_known(self, ledger: Ledger, tail: Tail) -> None:
        await happen(ledger, "env_1")
        async with come_to(tail, 1):
            [item] = tail.behind(START) or []

            later = item.at + timedelta(microseconds=1)

            assert tail.behind(Place(1, later)) is None
            assert tail.behind(Place(2, item.at)) is None

    async def test_only_the_newest_items_are(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "KEPT", 2)
        monkeypatch.setattr(tails, "SLACK", 1)
        await happen(ledger, *(f"env_{number}" for number in range(7)))
        async with come_to(tail, 7):
            assert (5, 7) == (tail.first, tail.end)
            assert tail.behind(START) is None
            assert tail.after(4) is None
            assert ["env_5", "env_6"] == [item.envelope_id for item in tail.after(5) or []]

    async def test_what_was_missed_while_nobody_waited_is_read_later(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1", "env_2")

        assert START == await tail.more(START, ALL, until=soon())

        async with come_to(tail, 2):
            assert ["env_1", "env_2"] == [item.envelope_id for item in tail.behind(START) or []]

    async def test_nothing_is_believed_once_nobody_has_looked_for_a_while(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1", "env_2")
        async with come_to(tail, 2):
            [first, second] = tail.behind(START) or []
        await eventually(lambda: not tail._is_fresh)

        await ledger.change("DELETE FROM feed WHERE position > 1")

        assert tail.behind(place_of(first)) is None
        waiting = asyncio.create_task(tail.more(place_of(first), ALL, until=soon()))
        await happen(ledger, "env_3")
        assert place_of(first) == await waiting
        async with come_to(tail, 2):
            assert ["env_3"] != [item.envelope_id for item in tail.behind(place_of(second)) or []]
            assert tail.behind(place_of(second)) is None

    async def test_what_is_too_much_to_be_read_is_left_out(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "AT_ONCE", 2)
        await happen(ledger, "env_1", "env_2", "env_3")

        assert START == await tail.more(START, ALL, until=soon())

        assert (3, 3) == (tail.first, tail.end)

    async def test_more_than_is_read_at_once_is_read_in_turns(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "AT_ONCE", 2)
        async with come_to(tail, 0):
            await happen(ledger, *(f"env_{number}" for number in range(7)))

            await eventually(lambda: tail.end == 7)


class TestWaiting:
    async def test_ends_with_what_is_wanted_and_goes_past_the_rest(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        wanted = Only("beta")
        async with come_to(tail, 0):
            waits = [asyncio.create_task(tail.more(START, wanted, until=soon())) for _ in range(50)]
            await asyncio.sleep(0)
            await happen(ledger, "env_1", "env_2")
            await eventually(lambda: tail.end == 2)
            assert not any(wait.done() for wait in waits)

            await ledger.record(envelope="env_3", account="beta")
            await happen(ledger, "env_4")

            places = await asyncio.gather(*waits)
            items = tail.behind(START) or []
        assert {place_of(items[1])} == set(places)
        # All those who want the same look together, once for each account of a batch.
        assert wanted.looked_at <= 4

    async def test_for_nothing_ends_where_it_was_looked_for(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        async with come_to(tail, 0):
            early = asyncio.create_task(tail.more(START, Only("beta"), until=soon(6)))
            await asyncio.sleep(0)
            await happen(ledger, "env_1", "env_2")
            await eventually(lambda: tail.end == 2)

            place = await early

            assert [] == tail.behind(place)
        assert not tail._rounds

    async def test_of_some_goes_on_when_others_leave(self, ledger: Ledger, tail: Tail) -> None:
        wanted = Only("default")
        async with come_to(tail, 0):
            waits = [asyncio.create_task(tail.more(START, wanted, until=soon())) for _ in range(2)]
            await eventually(lambda: [r.waiters for r in tail._rounds.values()] == [2])
            waits[0].cancel()
            await eventually(waits[0].done)

            await happen(ledger, "env_1")

            assert START == await waits[1]
            await eventually(lambda: not tail._rounds)

    async def test_does_not_begin_where_there_is_something(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1")
        async with come_to(tail, 1):
            assert START == await tail.more(START, ALL, until=soon())

    async def test_ends_when_the_feed_turns_out_to_be_another_one(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1", "env_2")
        async with come_to(tail, 2):
            old = place_of((tail.behind(START) or [])[1])
            waiting = asyncio.create_task(tail.more(old, Only("beta"), until=soon()))
            about = asyncio.create_task(tail.about("env_9", 2, until=soon()))
            await asyncio.sleep(0)

            await restore(ledger)

            assert old == await waiting
            assert await about
            await happen(ledger, "env_3", "env_4", "env_5")
            await eventually(lambda: tail.end == 3)
            assert old == await tail.more(old, ALL, until=soon())
            assert tail.behind(old) is None

    async def test_goes_on_behind_an_outage(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "PAUSE", timedelta(milliseconds=10))
        await happen(ledger, "env_1")
        async with come_to(tail, 1):
            end = place_of((tail.behind(START) or [])[0])
            waiting = asyncio.create_task(tail.more(end, ALL, until=soon()))
            await ledger.change("ALTER TABLE feed RENAME TO hidden")
            await asyncio.sleep(0.2)
            await ledger.change("ALTER TABLE hidden RENAME TO feed")

            await happen(ledger, "env_2")

            assert end == await waiting

    async def test_about_an_envelope_sees_what_came_before(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1", "env_2")
        async with come_to(tail, 2):
            assert await tail.about("env_2", 1, until=soon())
            assert await tail.about("env_2", -1, until=soon())
            assert not await tail.about("env_1", 1, until=soon(0.05))

    async def test_ends_with_the_process(self, ledger: Ledger) -> None:
        tail = Tail(ledger.database)
        following = asyncio.create_task(tail.run())
        async with come_to(tail, 0):
            waiting = [
                asyncio.create_task(tail.about("env_1", 0, until=soon())),
                asyncio.create_task(tail.more(START, ALL, until=soon())),
                asyncio.create_task(tail.more(Place(9, START.at), ALL, until=soon())),
                asyncio.create_task(tail.pause(until=soon())),
            ]
            await eventually(lambda: tail._waiters == 4 and bool(tail._rounds))

        tail.close()

        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert await tail.about("env_1", 0, until=soon())
        assert START == await tail.more(START, ALL, until=soon())
        await tail.pause(until=soon())
        following.cancel()

    async def test_pauses_for_its_time(self, ledger: Ledger, tail: Tail) -> None:
        end = soon(0.2)
        pausing = asyncio.create_task(tail.pause(until=end))

        await happen(ledger, "env_1")
        await pausing

        assert asyncio.get_running_loop().time() >= end
