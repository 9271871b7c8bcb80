"""What stands in the feed, and what of it somebody is given who asks for some of it."""

import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from app.store import feed
from app.store.feed import Item, Kind, Page
from app.store.ids import new_id
from app.store.migrations import downgrade, migrate
from app.store.sight import Sight
from app.upkeep.sequencer import Sequencer
from tests.integration.ledger import Ledger

ALL = Sight(None)


async def place(ledger: Ledger) -> None:
    sequencer = Sequencer(ledger.database, holder="a")
    sequencer.wake()
    await sequencer.step()


async def read(ledger: Ledger, after: int = 0) -> list[Item]:
    await place(ledger)
    async with ledger.reading() as connection:
        return await feed.read(connection, after, limit=100)


async def ask(
    ledger: Ledger,
    *types: str,
    after: int = 0,
    sight: Sight = ALL,
    limit: int = 100,
    scan: int = 1000,
) -> Page:
    async with ledger.reading() as connection:
        return await feed.read_filtered(
            connection, after, sight=sight, types=types, limit=limit, scan=scan
        )


async def positions(ledger: Ledger, *types: str, **options: Any) -> tuple[list[int], int]:
    page = await ask(ledger, *types, **options)
    return [item.position for item in page.items], page.last


async def note(ledger: Ledger, kind: Kind, envelope: str = "env_1") -> None:
    async with ledger.transaction() as connection:
        await feed.note(connection, kind, account="default", envelope_id=envelope)


class TestItems:
    async def test_carry_what_is_known_of_their_event(self, ledger: Ledger) -> None:
        event = await ledger.record("envelope.signed", sequence=3)

        [item] = await read(ledger)

        assert ("event", "default", "env_1", event) == (
            item.kind,
            item.account,
            item.envelope_id,
            item.event_id,
        )
        assert ("envelope.signed", 3, "applied", "signed") == (
            item.type,
            item.sequence,
            item.effect,
            item.status,
        )

    async def test_that_are_no_event_have_a_type_of_their_own(self, ledger: Ledger) -> None:
        for kind in (Kind.CORRECTION, Kind.ERASURE, Kind.ARCHIVE):
            await note(ledger, kind)

        items = await read(ledger)

        assert [
            ("correction", "receiver.corrected"),
            ("erasure", "receiver.erased"),
            ("archive", "receiver.archived"),
        ] == [(item.kind, item.type) for item in items]
        assert {None} == {item.event_id for item in items} | {item.effect for item in items}

    async def test_in_quarantine_have_no_type(self, ledger: Ledger) -> None:
        await ledger.record(None, envelope=None, sequence=None, effect="quarantined")

        [item] = await read(ledger)

        assert (None, None, "quarantined") == (item.type, item.envelope_id, item.effect)

    async def test_of_what_was_rolled_back_do_not_exist_and_leave_no_gap(
        self, ledger: Ledger
    ) -> None:
        await ledger.record(sequence=1)
        with suppress(ZeroDivisionError):
            async with ledger.transaction() as connection:
                await feed.note(connection, Kind.ARCHIVE, account="default", envelope_id="x")
                raise ZeroDivisionError
        async with ledger.transaction() as connection:
            await connection.exec_driver_sql("SAVEPOINT here")
            await feed.note(connection, Kind.ARCHIVE, account="default", envelope_id="x")
            await connection.exec_driver_sql("ROLLBACK TO SAVEPOINT here")
        await ledger.record(sequence=2)

        assert [(1, 1), (2, 2)] == [(i.position, i.sequence) for i in await read(ledger)]

    async def test_of_events_that_another_release_inserts_are_there(self, ledger: Ledger) -> None:
        insert = text(
            "INSERT INTO events (id, account, envelope_id, type, sequence, received_at, effect) "
            "VALUES (:id, 'default', 'env_1', 'envelope.sent', 1, :at, 'applied')"
        )
        event = uuid.uuid4()
        is_postgresql = ledger.database.is_postgresql
        async with ledger.transaction() as connection:
            await connection.execute(
                insert,
                {
                    "id": event if is_postgresql else event.hex,
                    "at": _time(is_postgresql=is_postgresql),
                },
            )

        assert [event] == [item.event_id for item in await read(ledger)]

    async def test_go_on_where_they_were_when_nothing_waits_any_more(self, ledger: Ledger) -> None:
        await ledger.record(sequence=1)
        assert [1] == [item.position for item in await read(ledger)]
        await ledger.change("DELETE FROM changes")

        await ledger.record(sequence=2)

        assert [(2, 2)] == [(i.position, i.sequence) for i in await read(ledger, after=1)]

    async def test_are_found_by_their_number(self, ledger: Ledger) -> None:
        async with ledger.reading() as connection:
            assert await feed.head(connection) is None
        await ledger.record()
        [item] = await read(ledger)

        async with ledger.reading() as connection:
            assert feed.Place(1, item.at) == await feed.place_at(connection, 1)
            assert await feed.place_at(connection, 2) is None


def _time(*, is_postgresql: bool) -> Any:
    return datetime.now(UTC) if is_postgresql else "2026-11-22 01:00:00.000000"


class TestFilters:
    @pytest.fixture(name="ledger")
    async def _filled(self, ledger: Ledger) -> Ledger:
        await ledger.envelope("env_1", tenant="acme")
        await ledger.envelope("env_2")
        await ledger.record("envelope.sent", envelope="env_1", sequence=1)
        await ledger.record("envelope.signed", envelope="env_2", sequence=1)
        await ledger.record("document.ready", envelope="env_1", sequence=2)
        await ledger.record(None, envelope=None, sequence=None, effect="quarantined")
        await note(ledger, Kind.ARCHIVE, "env_2")
        await ledger.record("envelope.signed", envelope="env_3", account="other")
        await place(ledger)
        return ledger

    async def test_none_lets_everything_through(self, ledger: Ledger) -> None:
        assert ([1, 2, 3, 4, 5, 6], 6) == await positions(ledger)
        assert ([1, 2, 3, 4, 5, 6], 6) == await positions(ledger, "*")

    @pytest.mark.parametrize(
        "types, found",
        [
            (("envelope.signed",), [2, 6]),
            (("envelope.*",), [1, 2, 6]),
            (("document.ready", "receiver.archived"), [3, 5]),
            (("receiver.*",), [5]),
            (("envelope",), []),
            (("envelope.%", "envelope_*", "*.signed", "."), []),
        ],
    )
    async def test_by_type(self, ledger: Ledger, types: tuple[str, ...], found: list[int]) -> None:
        assert (found, 6) == await positions(ledger, *types)

    async def test_by_account(self, ledger: Ledger) -> None:
        assert ([6], 6) == await positions(ledger, sight=Sight(("other", "third")))
        assert ([], 6) == await positions(ledger, sight=Sight(()))

    async def test_by_tenant(self, ledger: Ledger) -> None:
        assert ([1, 3], 6) == await positions(ledger, sight=Sight(None, "acme"))
        assert ([], 6) == await positions(ledger, sight=Sight(("other",), "acme"))

    async def test_an_empty_page_advances(self, ledger: Ledger) -> None:
        assert ([], 2) == await positions(ledger, "document.ready", scan=2)
        assert ([3], 4) == await positions(ledger, "document.ready", scan=2, after=2)
        assert ([], 6) == await positions(ledger, "document.ready", scan=2, after=4)
        assert ([], 6) == await positions(ledger, "document.ready", scan=2, after=6)

    async def test_a_full_page_ends_with_its_last_item(self, ledger: Ledger) -> None:
        assert ([1, 2], 2) == await positions(ledger, "envelope.*", limit=2)
        assert ([6], 6) == await positions(ledger, "envelope.*", limit=2, after=2)

    async def test_beyond_the_end_there_is_nothing(self, ledger: Ledger) -> None:
        assert ([], 2**62) == await positions(ledger, after=2**62)


class TestPast:
    """Events of before there was a feed, which a migration notes."""

    @pytest.fixture(name="old")
    async def _old(self, ledger: Ledger) -> Ledger:
        await downgrade(ledger.address.url, revision="20261122_0100")
        return ledger

    async def test_is_noted_in_the_order_of_each_envelope_and_once(self, old: Ledger) -> None:
        late, early = new_id(), new_id()
        # The ids say one thing and the sequences another, as those of slow requests do.
        await old.record(sequence=1, event_id=max(late, early))
        await old.record(sequence=2, event_id=min(late, early))
        await old.record(envelope="env_2", sequence=1)
        await old.record(None, envelope=None, sequence=None, effect="quarantined")

        await migrate(old.address.url)
        await old.record(sequence=3)

        items = await read(old)
        assert 5 == len({item.event_id for item in items}) == len(items)
        assert [1, 2, 3] == [item.sequence for item in items if item.envelope_id == "env_1"]

    async def test_that_was_placed_before_a_way_back_is_not_placed_again(
        self, ledger: Ledger
    ) -> None:
        await ledger.record(sequence=1)
        assert 1 == len(await read(ledger))
        await downgrade(ledger.address.url, revision="20261122_0100")
        await ledger.record(sequence=2)

        await migrate(ledger.address.url)

        assert [1, 2] == [item.sequence for item in await read(ledger)]

    async def test_stands_before_what_comes_while_it_is_noted(self, old: Ledger) -> None:
        await old.record(sequence=1)
        await migrate(old.address.url, revision="20261122_0500")
        await old.record(sequence=2)

        await migrate(old.address.url)

        assert [1, 2] == [item.sequence for item in await read(old)]
