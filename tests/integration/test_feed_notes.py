"""What an event that is applied again means for those who read the feed."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest

from app.store import feed
from app.upkeep.sequencer import Sequencer
from tests.factories import make_body
from tests.integration.test_reproject import again, quarantine, rewrite
from tests.replicas import Replica, replica

Said = tuple[str, str | None, str | None, UUID | None]


@pytest.fixture(name="receiver")
async def _receiver(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url, interested=lambda _type, _account: ()) as receiver:
        yield receiver


class Reader:
    """Says what is new in the feed since it was asked last."""

    def __init__(self, receiver: Replica) -> None:
        self._database = receiver.database
        self._position = 0

    async def news(self) -> list[Said]:
        sequencer = Sequencer(self._database, holder="a")
        sequencer.wake()
        await sequencer.step()
        limit = timedelta(seconds=10)
        async with self._database.begin(limit=limit, is_reading=True) as connection:
            items = await feed.read(connection, self._position, limit=100)
        self._position += len(items)
        return [(item.kind, item.type, item.envelope_id, item.event_id) for item in items]


class TestNotes:
    async def test_tell_of_an_event_that_left_quarantine(self, receiver: Replica) -> None:
        reader = Reader(receiver)
        id_ = await quarantine(receiver, make_body(envelope_id="env_1", event_id="e1"))
        assert [("event", None, None, id_)] == [
            said for said in await reader.news() if said[3] == id_
        ]

        await again(receiver, id_)

        assert [("correction", "receiver.corrected", "env_1", id_)] == await reader.news()

    async def test_tell_of_one_about_no_envelope(self, receiver: Replica) -> None:
        reader = Reader(receiver)
        id_ = await quarantine(receiver, b'{"event": "survey.answered", "event_id": "e1"}')
        await reader.news()

        await again(receiver, id_)

        assert [("correction", "receiver.corrected", None, id_)] == await reader.news()

    async def test_tell_of_what_an_envelope_has_got_by_it(self, receiver: Replica) -> None:
        reader = Reader(receiver)
        receipt = await receiver.record(make_body(envelope_id="env_1", metadata="lost"))
        await rewrite(receiver, receipt.event_id, make_body(envelope_id="env_1"))
        await reader.news()

        await again(receiver, receipt.event_id)

        assert [("correction", "receiver.corrected", "env_1", receipt.event_id)] == (
            await reader.news()
        )

    async def test_say_nothing_if_nothing_has_changed(self, receiver: Replica) -> None:
        reader = Reader(receiver)
        receipt = await receiver.record(make_body(envelope_id="env_1"))
        await reader.news()

        await again(receiver, receipt.event_id)

        assert [] == await reader.news()

    async def test_say_nothing_of_what_an_own_event_says(self, receiver: Replica) -> None:
        reader = Reader(receiver)
        await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        body = make_body(envelope_id="env_1", event_id="e1", event="envelope.declined")
        conflict = await receiver.record(body)
        await reader.news()

        await again(receiver, conflict.event_id, is_accepted=True)

        assert ["receiver.accepted"] == [said[1] for said in await reader.news()]

    async def test_tell_of_another_envelope_that_is_doubted_no_more(
        self, receiver: Replica
    ) -> None:
        reader = Reader(receiver)
        await receiver.record(make_body(envelope_id="env_1", event_id="e1"))
        conflict = await receiver.record(make_body(envelope_id="env_2", event_id="e1"))
        await reader.news()

        await again(receiver, conflict.event_id, is_accepted=True)

        said = await reader.news()
        assert ("correction", "receiver.corrected", "env_1", None) in said
        assert [("receiver.accepted", "env_2")] == [s[1:3] for s in said if s[0] == "event"]
