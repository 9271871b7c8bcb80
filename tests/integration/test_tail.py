"""The feed's end, read once for all who wait for it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from app.store.feed import Place
from app.upkeep import tail as tails
from app.upkeep.sequencer import Sequencer
from app.upkeep.tail import START, Tail, place_of
from tests.integration.ledger import Ledger
from tests.replicas import eventually


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    yield ledger
    await ledger.database.close()


@pytest.fixture(name="tail")
async def _tail(ledger: Ledger) -> AsyncIterator[Tail]:
    """A tail that has found out where the feed ends."""
    tail = Tail(ledger.database)
    following = asyncio.create_task(tail.run())
    await tail.more(0, until=soon(0.1))
    yield tail
    following.cancel()


def soon(seconds: float = 20) -> float:
    return asyncio.get_running_loop().time() + seconds


async def happen(ledger: Ledger, *envelopes: str) -> None:
    """Record events, and give them their places."""
    for envelope in envelopes:
        await ledger.record(envelope=envelope)
    await Sequencer(ledger.database, holder="a").step()


async def restore(ledger: Ledger) -> None:
    """Make the feed what it is behind an old backup: given again, at another time."""
    await ledger.change("DELETE FROM feed")


class TestKept:
    async def test_items_are_found_behind_a_place(self, ledger: Ledger, tail: Tail) -> None:
        waiting = asyncio.create_task(tail.more(2, until=soon()))
        await happen(ledger, "env_1", "env_2", "env_3")
        assert await waiting

        kept = tail.behind(START)

        assert kept is not None
        assert ["env_1", "env_2", "env_3"] == [item.envelope_id for item in kept]
        assert kept[1:] == tail.behind(place_of(kept[0]))
        assert [] == tail.behind(place_of(kept[2]))

    async def test_places_of_another_feed_are_not_known(self, ledger: Ledger, tail: Tail) -> None:
        waiting = asyncio.create_task(tail.more(0, until=soon()))
        await happen(ledger, "env_1")
        assert await waiting
        [item] = tail.behind(START) or []

        later = item.at + timedelta(microseconds=1)

        assert tail.behind(Place(1, later)) is None
        assert tail.behind(Place(2, item.at)) is None

    async def test_only_the_newest_items_are(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "KEPT", 2)
        monkeypatch.setattr(tails, "SLACK", 1)
        waiting = asyncio.create_task(tail.more(6, until=soon()))
        await happen(ledger, *(f"env_{number}" for number in range(7)))
        assert await waiting

        assert (5, 7) == (tail.first, tail.end)
        assert tail.behind(START) is None
        assert tail.after(4) is None
        assert ["env_5", "env_6"] == [item.envelope_id for item in tail.after(5) or []]

    async def test_what_was_missed_while_nobody_waited_is_read_later(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        await happen(ledger, "env_1", "env_2")

        assert await tail.more(1, until=soon())

        assert ["env_1", "env_2"] == [item.envelope_id for item in tail.behind(START) or []]

    async def test_what_is_too_much_to_be_read_is_left_out(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "AT_ONCE", 2)
        await happen(ledger, "env_1", "env_2", "env_3")

        assert await tail.more(0, until=soon())

        assert (3, 3) == (tail.first, tail.end)

    async def test_more_than_is_read_at_once_is_read_in_turns(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "AT_ONCE", 2)
        waiting = asyncio.create_task(tail.more(6, until=soon()))
        await happen(ledger, *(f"env_{number}" for number in range(7)))

        assert await waiting


class TestWaiting:
    async def test_ends_when_the_feed_turns_out_to_be_another_one(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        waiting = asyncio.create_task(tail.more(1, until=soon()))
        await happen(ledger, "env_1", "env_2")
        assert await waiting
        old = tail.behind(START) or []
        waiting = asyncio.create_task(tail.more(2, until=soon()))
        about = asyncio.create_task(tail.about("env_9", 2, until=soon()))

        await restore(ledger)

        assert await waiting
        assert await about
        await happen(ledger, "env_3", "env_4", "env_5")
        assert await tail.more(2, until=soon())
        assert tail.behind(place_of(old[1])) is None

    async def test_goes_on_behind_an_outage(
        self, ledger: Ledger, tail: Tail, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tails, "PAUSE", timedelta(milliseconds=10))
        await happen(ledger, "env_1")
        waiting = asyncio.create_task(tail.more(1, until=soon()))
        await ledger.change("ALTER TABLE feed RENAME TO hidden")
        await asyncio.sleep(0.2)
        await ledger.change("ALTER TABLE hidden RENAME TO feed")

        await happen(ledger, "env_2")

        assert await waiting

    async def test_about_an_envelope_sees_what_came_before(
        self, ledger: Ledger, tail: Tail
    ) -> None:
        waiting = asyncio.create_task(tail.more(1, until=soon()))
        await happen(ledger, "env_1", "env_2")
        assert await waiting

        assert await tail.about("env_2", 1, until=soon())
        assert await tail.about("env_2", -1, until=soon())
        assert not await tail.about("env_1", 1, until=soon(0.05))

    async def test_ends_with_the_process(self, ledger: Ledger) -> None:
        tail = Tail(ledger.database)
        waits = [
            tail.more(0, until=soon()),
            tail.pause(until=soon()),
            tail.about("e", 0, until=soon()),
        ]
        waiting = [asyncio.create_task(each) for each in waits]
        await eventually(lambda: tail._waiters == 3)

        tail.close()

        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert await tail.about("env_1", 0, until=soon())
        await tail.pause(until=soon())

    async def test_pauses_for_its_time(self, ledger: Ledger, tail: Tail) -> None:
        end = soon(0.2)
        pausing = asyncio.create_task(tail.pause(until=end))

        await happen(ledger, "env_1")
        await pausing

        assert asyncio.get_running_loop().time() >= end
