"""The change feed: one order for everybody, given after the commit."""

import asyncio
from contextlib import suppress
from datetime import timedelta

from app.store import feed
from app.upkeep.sequencer import Sequencer
from app.upkeep.tail import START, Tail
from tests.integration.ledger import Ledger


class TestPlaces:
    async def test_events_get_places_without_gaps_in_the_order_of_their_envelope(
        self, ledger: Ledger
    ) -> None:
        first = await ledger.record(sequence=1)
        second = await ledger.record(sequence=2)

        await Sequencer(ledger.database, holder="a").step()

        async with ledger.reading() as connection:
            items = await feed.read(connection, 0, limit=10)
            end = await feed.head(connection)
        assert [(1, first), (2, second)] == [(i.position, i.event_id) for i in items]
        assert end == feed.Place(2, items[-1].at)

    async def test_what_one_process_holds_another_leaves_to_it(self, ledger: Ledger) -> None:
        holder = Sequencer(ledger.database, holder="a")
        other = Sequencer(ledger.database, holder="b")
        await ledger.record()
        await holder.step()
        await ledger.record(envelope="env_2")

        await other.step()

        async with ledger.reading() as connection:
            assert await feed.pending_since(connection) is not None
        await holder.stop()
        await asyncio.sleep(0.01)
        assert await other.step() == timedelta(milliseconds=50)
        async with ledger.reading() as connection:
            assert await feed.pending_since(connection) is None


class Everything:
    """What somebody wants who wants all of it."""

    def takes(self, _: feed.Item) -> bool:
        return True


class TestTail:
    async def test_a_waiter_is_woken_by_what_it_waits_for(self, ledger: Ledger) -> None:
        tail = Tail(ledger.database)
        following = asyncio.create_task(tail.run())
        until = asyncio.get_running_loop().time() + 20
        sequencer = Sequencer(ledger.database, holder="a")
        await ledger.record(envelope="env_0")
        await sequencer.step()
        # The first wait finds out where the feed ends.
        assert await tail.about("env_1", tail.end, until=until)

        waiting = asyncio.create_task(tail.about("env_1", tail.end, until=until))
        others = asyncio.create_task(tail.more(tail._last, Everything(), until=until))
        event = await ledger.record(envelope="env_1")
        await sequencer.step()

        assert await waiting
        assert 1 == (await others).position
        assert [event] == [item.event_id for item in tail.after(1) or []]
        assert tail.after(0) is None
        await end(following)

    async def test_who_waits_in_vain_is_told_when_the_time_is_over(self, ledger: Ledger) -> None:
        tail = Tail(ledger.database)
        following = asyncio.create_task(tail.run())
        now = asyncio.get_running_loop().time()

        assert START == await tail.more(START, Everything(), until=now + 0.1)

        tail.close()
        assert START == await tail.more(START, Everything(), until=now + 60)
        await end(following)


async def end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
