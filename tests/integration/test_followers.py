"""Work that follows the feed beside the path, and the first of it: what envelopes are found by."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.store import followers, terms
from app.store.feed import Item
from app.store.session import Connection
from app.store.sight import Sight
from app.store.terms import Found, Term, successor
from app.upkeep import following as module
from app.upkeep.following import Following
from app.upkeep.sequencer import Sequencer
from app.upkeep.terms import Terms
from tests.integration.ledger import Ledger, until
from tests.said import said

ALL = Sight(None)


class Counter:
    """A follower that writes down what it was given, here and in the database."""

    def __init__(self, name: str = "counter", *, fails: int = 0) -> None:
        self.name = name
        self.fails = fails
        self.given: list[int] = []
        self.sizes: list[int] = []

    async def follow(self, connection: Connection, items: Sequence[Item]) -> None:
        self.sizes.append(len(items))
        await connection.exec_driver_sql("UPDATE leases SET token = token + 1 WHERE name = 'feed'")
        if self.fails:
            self.fails -= 1
            raise ValueError("not now")
        self.given += [item.position for item in items]


async def place(ledger: Ledger, count: int) -> None:
    for number in range(count):
        await ledger.record(envelope=f"env_{number}")
    await Sequencer(ledger.database, holder="a").step()


async def position(ledger: Ledger, name: str = "counter") -> int | None:
    async with ledger.transaction() as connection:
        return await followers.take(connection, name)


class TestFollowing:
    async def test_gives_each_item_once_and_in_order(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "AT_ONCE", 3)
        counter, other = Counter(), Counter("other")
        following = Following(ledger.database, followers=[counter, other])
        await place(ledger, 7)

        assert [True, True, True, False] == [await following.step() for _ in range(4)]

        assert list(range(1, 8)) == counter.given == other.given
        assert [3, 3, 1] == counter.sizes
        assert 7 == await position(ledger)

    async def test_goes_on_in_another_process_where_it_was(self, ledger: Ledger) -> None:
        await place(ledger, 2)
        await Following(ledger.database, followers=[Counter()]).step()
        await place(ledger, 1)
        counter = Counter()

        await Following(ledger.database, followers=[counter]).step()

        assert [3] == counter.given

    async def test_runs_by_itself(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "TICK", module.LULL)
        counter = Counter()
        following = Following(ledger.database, followers=[counter])
        task = asyncio.create_task(following.run())
        await place(ledger, 2)

        await until(lambda: counter.given == [1, 2])

        following.close()
        await task

    async def test_leaves_one_to_the_process_that_has_it(self, postgres_url: str) -> None:
        ledger, counter = Ledger(postgres_url), Counter()
        following = Following(ledger.database, followers=[counter])
        await place(ledger, 1)
        async with ledger.transaction() as connection:
            await followers.add(connection, ["counter"])
        async with ledger.transaction() as connection:
            assert 0 == await followers.take(connection, "counter")

            assert not await following.step()

        assert [] == counter.given
        assert await following.step()
        await ledger.database.close()

    async def test_gives_nothing_that_another_was_given_since_the_look(
        self, ledger: Ledger
    ) -> None:
        following, counter = Following(ledger.database, followers=[]), Counter()
        await place(ledger, 1)
        async with ledger.transaction() as connection:
            await followers.add(connection, ["counter"])
            await followers.move(connection, "counter", 1)

        assert not await following._give(counter, 10)

        assert [] == counter.given

    async def test_of_one_that_fails_stops_no_other(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAUSE", module.LULL)
        bad, good = Counter("bad", fails=2), Counter("good")
        following = Following(ledger.database, followers=[bad, good])
        await place(ledger, 2)
        with capture_logs() as lines:
            await following.step()
            assert ([], [1, 2]) == (bad.given, good.given)
            assert 0 == await position(ledger, "bad")

            await until(lambda: _advance(following, bad, [1, 2]))

        assert ["follower.delayed", "follower.resumed"] == said(lines, "follower")
        assert 3 == len(bad.sizes)

    async def test_gives_fewer_items_to_one_that_fails(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAUSE", module.LULL)
        monkeypatch.setattr(module, "AT_ONCE", 4)
        bad = Counter(fails=4)
        following = Following(ledger.database, followers=[bad])
        await place(ledger, 4)

        await until(lambda: _advance(following, bad, [1, 2, 3, 4]))

        assert [4, 2, 1, 1, 1] == bad.sizes[:5]

    async def test_survives_a_database_that_is_away(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAUSE", module.LULL)
        counter = Counter()
        following = Following(ledger.database, followers=[counter])
        await place(ledger, 1)
        await ledger.change("ALTER TABLE followers RENAME TO gone")
        with capture_logs() as lines:
            assert not await following.step()
            await ledger.change("ALTER TABLE gone RENAME TO followers")

            await until(lambda: _advance(following, counter, [1]))

        assert ["follower.delayed", "follower.resumed"] == said(lines, "follower")

    async def test_waits_for_a_lull_but_not_for_ever(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PATIENCE", module.LULL * 4)
        asked: list[bool] = []

        def is_pressed() -> bool:
            asked.append(True)
            return True

        counter = Counter()
        following = Following(ledger.database, followers=[counter], is_pressed=is_pressed)
        await place(ledger, 1)

        await following.step()

        assert len(asked) > 1
        assert [1] == counter.given


async def _advance(following: Following, counter: Counter, given: list[int]) -> bool:
    await following.step()
    return counter.given == given


async def learn(ledger: Ledger, *envelopes: str) -> None:
    for envelope in envelopes:
        await ledger.record(envelope=envelope)
    # One that is about no envelope has nothing to say.
    await ledger.record(None, envelope=None, sequence=None, effect="quarantined")
    sequencer = Sequencer(ledger.database, holder="a")
    sequencer.wake()
    await sequencer.step()
    assert await Following(ledger.database, followers=[Terms()]).step()


async def find(
    ledger: Ledger, q: str, *, sight: Sight = ALL, after: Term | None = None, limit: int = 100
) -> Found:
    async with ledger.reading() as connection:
        return await terms.find(connection, sight, q, after=after, limit=limit)


async def found(ledger: Ledger, q: str, **options: Any) -> list[str]:
    return [term.envelope_id for term in (await find(ledger, q, **options)).terms]


class TestTerms:
    async def test_an_envelope_is_found_by_its_ids_and_addresses(self, ledger: Ledger) -> None:
        await ledger.envelope(
            "ENV_1",
            external_id="Order-7",
            client_reference_id="r" * 300,
            next_signer_email="bob@example.com",
            parties=[{"email": "Ada@Example.com"}, {"name": "x", "email": None}],
        )
        await learn(ledger, "ENV_1")

        for q in ("env_1", "ORDER", "ada@", "Ada@Example.com", "bob", "r" * 300, "r" * 255):
            assert ["ENV_1"] == await found(ledger, q), q
        for q in ("nv_1", "ada@example.comx", "x", "\U0010ffff"):
            assert [] == await found(ledger, q), q

    async def test_what_was_learned_is_learned_once_and_added_to(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1", external_id="old")
        await learn(ledger, "env_1")
        await ledger.change("UPDATE envelopes SET external_id = 'new', parties = NULL")

        await learn(ledger, "env_1")

        assert ["env_1", "env_1"] == await found(ledger, "old") + await found(ledger, "new")

    async def test_nothing_leads_to_an_erased_envelope(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1", external_id="a")
        await ledger.envelope("env_2", external_id="b")
        await learn(ledger, "env_1", "env_2")
        await ledger.change("UPDATE envelopes SET erased_at = updated_at WHERE id = 'env_1'")

        await learn(ledger, "env_1", "env_2")

        assert ["env_2", "env_2"] == await found(ledger, "")

    async def test_are_forgotten_by_envelope(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1", external_id="a")
        await learn(ledger, "env_1")
        async with ledger.transaction() as connection:
            assert 0 == await terms.forget(connection, "other", "env_1")
            assert 2 == await terms.forget(connection, "default", "env_1")

        assert [] == await found(ledger, "")


class TestFinding:
    @pytest.fixture(name="ledger")
    async def _filled(self, ledger: Ledger) -> Ledger:
        insert = "INSERT INTO terms (term, account, envelope_id) VALUES (:term, :account, :id)"
        for number in range(6):
            account = "acme" if number % 2 else "default"
            await ledger.change(insert, term=f"a{number}", account=account, id=f"env_{number}")
        await ledger.change(insert, term="a_", account="default", id="env_6")
        await ledger.change(insert, term="a\U0010ffff", account="default", id="env_7")
        await ledger.change(insert, term="b", account="default", id="env_8")
        await ledger.envelope("env_0", tenant="t")
        return ledger

    async def test_is_in_the_order_of_the_bytes(self, ledger: Ledger) -> None:
        expected = [f"env_{number}" for number in range(8)]
        assert expected == await found(ledger, "a")
        assert ["env_7"] == await found(ledger, "a\U0010ffff")
        assert ["env_6"] == await found(ledger, "A_")

    async def test_goes_on_behind_a_page(self, ledger: Ledger) -> None:
        seen, after = [], None
        while True:
            page = await find(ledger, "a", after=after, limit=3)
            seen += [term.envelope_id for term in page.terms]
            after = page.next
            if after is None:
                break

        assert [f"env_{number}" for number in range(8)] == seen

    async def test_begins_at_the_text_whatever_the_place(self, ledger: Ledger) -> None:
        assert ["env_8"] == await found(ledger, "b", after=Term("a3", "x", "y"))

    async def test_stays_within_what_may_be_seen(self, ledger: Ledger) -> None:
        assert ["env_1", "env_3", "env_5"] == await found(ledger, "a", sight=Sight(("acme",)))
        assert ["env_0"] == await found(ledger, "a", sight=Sight(None, "t"))
        assert [] == await found(ledger, "a", sight=Sight(("acme",), "t"))
        assert [] == await found(ledger, "a", sight=Sight(()))

    async def test_looks_at_a_bounded_number_and_says_where_to_go_on(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("_FIND_POSTGRESQL", "_FIND_SQLITE", "_LAST_POSTGRESQL", "_LAST_SQLITE"):
            statement = getattr(terms, name).replace("LIMIT 1000", "LIMIT 2")
            monkeypatch.setattr(terms, name, statement.replace("OFFSET 999", "OFFSET 1"))

        page = await find(ledger, "a", sight=Sight(None, "none"))

        assert Found([], Term("a1", "acme", "env_1")) == page


class TestSuccessor:
    @pytest.mark.parametrize(
        "text, following",
        [
            ("a", "b"),
            ("az", "a{"),
            ("a\U0010ffff\U0010ffff", "b"),
            ("\ud7ff", "\ue000"),
            ("\uffff", "\U00010000"),
        ],
    )
    def test_is_the_first_text_behind_all_that_begin_so(self, text: str, following: str) -> None:
        assert following == successor(text)

    @pytest.mark.parametrize("text", ["", "\U0010ffff"])
    def test_lies_behind_everything_if_there_is_none(self, text: str) -> None:
        assert successor(text) > "\U0010ffff" * 255
