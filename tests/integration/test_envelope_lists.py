"""Lists of envelopes: every row that fits once, in one order, however they are cut into pages."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from app.store import envelope_lists, list_statements, lookups, searches, terms
from app.store.envelope_lists import Filters, Page
from app.store.models import EnvelopeRow, KeyRow
from app.store.sight import Sight, resolve
from tests.integration.ledger import Ledger

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
EVERYTHING = Sight(None)


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    await add_accounts(ledger, "default", "beta")
    yield ledger
    await ledger.database.close()


async def add_accounts(ledger: Ledger, *accounts: str) -> None:
    rows = [
        {"fingerprint": name, "label": name, "account": name, "first_seen_at": NOON}
        for name in accounts
    ]
    async with ledger.transaction() as connection:
        await connection.execute(insert(KeyRow), rows)


async def add(ledger: Ledger, *rows: dict[str, Any]) -> None:
    """Add envelopes; each changed a second after the one before."""
    written = [
        {
            "account": "default",
            "id": f"env_{number}",
            "version": 1,
            "sequence": 1,
            "first_seen_at": NOON,
            "updated_at": NOON + timedelta(seconds=number),
            **row,
        }
        for number, row in enumerate(rows)
    ]
    async with ledger.transaction() as connection:
        for row in written:
            await connection.execute(insert(EnvelopeRow).values(**row))


async def page(
    ledger: Ledger,
    sight: Sight = EVERYTHING,
    *,
    limit: int = 100,
    after: Any = None,
    **filters: Any,
) -> Page:
    async with ledger.reading() as connection:
        return await envelope_lists.page(
            connection, sight, Filters(**filters), after=after, limit=limit
        )


async def ids(
    ledger: Ledger, sight: Sight = EVERYTHING, *, limit: int = 100, **filters: Any
) -> list[str]:
    """Read a list to its end."""
    found: list[str] = []
    after = None
    while True:
        part = await page(ledger, sight, limit=limit, after=after, **filters)
        assert len(part.rows) <= limit
        found += [row.id for row in part.rows]
        if part.next is None:
            return found
        after = part.next


class TestOrder:
    async def test_is_the_latest_change_first(self, ledger: Ledger) -> None:
        await add(ledger, {}, {}, {})

        assert ["env_2", "env_1", "env_0"] == await ids(ledger)

    async def test_goes_forward_from_a_time(self, ledger: Ledger) -> None:
        await add(ledger, {}, {}, {}, {})

        assert ["env_2", "env_3"] == await ids(ledger, updated_after=NOON + timedelta(seconds=1))

    @pytest.mark.parametrize(
        "moment, number",
        [
            (datetime.min.replace(tzinfo=UTC), 2),
            (datetime.max.replace(tzinfo=UTC), 0),
            (NOON - timedelta(microseconds=1), 2),
        ],
    )
    async def test_goes_forward_from_any_time(
        self, ledger: Ledger, moment: datetime, number: int
    ) -> None:
        await add(ledger, {}, {})

        assert number == len(await ids(ledger, updated_after=moment))

    @pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
    @pytest.mark.parametrize("forward", [{}, {"updated_after": NOON - timedelta(1)}])
    async def test_is_the_same_in_pages_of_any_size(
        self, ledger: Ledger, limit: int, forward: dict[str, Any]
    ) -> None:
        """Several envelopes may have changed in the same instant, and have the same id."""
        same = {"updated_at": NOON}
        await add(ledger, same, same, {"account": "beta", "id": "env_0", **same}, {}, {})

        whole = await ids(ledger, **forward)
        parts = await ids(ledger, limit=limit, **forward)

        assert 5 == len(whole)
        assert whole == parts

    async def test_ends_with_the_last_page(self, ledger: Ledger) -> None:
        await add(ledger, {}, {})

        assert (await page(ledger, limit=2)).next is None
        assert (await page(ledger, limit=1)).next is not None

    async def test_of_one_that_changes_brings_it_to_the_front(self, ledger: Ledger) -> None:
        await add(ledger, {}, {}, {})
        first = await page(ledger, limit=1)
        await ledger.change(
            "UPDATE envelopes SET updated_at = :at WHERE id = 'env_0'",
            at=NOON + timedelta(days=1)
            if ledger.database.is_postgresql
            else "2026-07-02 12:00:00.000000",
        )

        rest = await page(ledger, after=first.next)

        assert ["env_1"] == [row.id for row in rest.rows]
        assert "env_0" == (await ids(ledger))[0]


class TestFilters:
    async def test_take_what_fits(self, ledger: Ledger) -> None:
        await add(
            ledger,
            {"status": "signed", "external_id": "a", "tenant": "org_1", "is_test": True},
            {"status": "pending", "external_id": "a", "client_reference_id": "r"},
            {"status": None, "is_test": False},
            {"status": "signed", "tenant": "org_1"},
        )

        assert ["env_3", "env_0"] == await ids(ledger, status="signed")
        assert ["env_2"] == await ids(ledger, status="none")
        assert ["env_1", "env_0"] == await ids(ledger, external_id="a")
        assert ["env_1"] == await ids(ledger, client_reference_id="r")
        assert ["env_3", "env_0"] == await ids(ledger, tenant="org_1")
        assert ["env_0"] == await ids(ledger, is_test=True)
        assert ["env_3", "env_2", "env_1"] == await ids(ledger, is_test=False)
        assert [] == await ids(ledger, status="voided")

    async def test_are_taken_together(self, ledger: Ledger) -> None:
        await add(
            ledger,
            {"status": "signed", "external_id": "a"},
            {"status": "pending", "external_id": "a", "is_test": True},
            {"status": "signed", "external_id": "b", "is_test": True},
            {"status": "signed", "external_id": "a", "is_test": True, "tenant": "org_1"},
        )

        assert ["env_3"] == await ids(ledger, status="signed", external_id="a", is_test=True)
        assert ["env_3", "env_2"] == await ids(ledger, status="signed", is_test=True)
        assert ["env_0"] == await ids(ledger, status="signed", external_id="a", is_test=False)
        assert ["env_3"] == await ids(ledger, tenant="org_1", status="signed")

    async def test_of_a_text_that_is_a_pattern_elsewhere_take_it_as_it_is(
        self, ledger: Ledger
    ) -> None:
        for number, text in enumerate(["%", "_", "a'b", "🖋", "\U0010ffff", "x" * 255]):
            await add(ledger, {"id": f"env_{number}", "external_id": text})
            assert [f"env_{number}"] == await ids(ledger, external_id=text)


class TestSight:
    @pytest.fixture(name="ledger")
    async def _ledger(self, database_url: str) -> AsyncIterator[Ledger]:
        ledger = Ledger(database_url)
        await add_accounts(ledger, "default", "beta")
        await add(ledger, {"tenant": "org_1"}, {"account": "beta", "tenant": "org_1"}, {})
        yield ledger
        await ledger.database.close()

    @pytest.mark.parametrize(
        "sight, seen",
        [
            (Sight(None), ["env_2", "env_1", "env_0"]),
            (Sight(("default",)), ["env_2", "env_0"]),
            (Sight(("beta", "default")), ["env_2", "env_1", "env_0"]),
            (Sight(("nobody",)), []),
            (Sight(()), []),
            (Sight(None, "org_1"), ["env_1", "env_0"]),
            (Sight(("beta",), "org_1"), ["env_1"]),
            (Sight(("beta",), "org_2"), []),
        ],
    )
    async def test_leaves_out_what_belongs_to_others(
        self, ledger: Ledger, sight: Sight, seen: list[str]
    ) -> None:
        assert seen == await ids(ledger, sight)
        assert seen == await ids(ledger, sight, limit=1)

    async def test_of_a_tenant_is_not_widened_by_a_filter(self, ledger: Ledger) -> None:
        assert [] == await ids(ledger, Sight(None, "org_2"), tenant="org_1")
        assert ["env_1", "env_0"] == await ids(ledger, Sight(None, "org_1"), tenant="org_1")

    async def test_finds_one_by_its_id(self, ledger: Ledger) -> None:
        async with ledger.reading() as connection:
            every = await lookups.find(connection, EVERYTHING, "env_1")
            theirs = await lookups.find_progress(connection, Sight(("beta",)), "env_1")
            others = await lookups.find(connection, Sight(("default",)), "env_1")
            tenants = await lookups.find(connection, Sight(None, "org_1"), "env_1")
            strangers = await lookups.find_progress(connection, Sight(None, "org_2"), "env_1")

        assert ["beta"] == [row.account for row in every] == [row.account for row in theirs]
        assert ["beta"] == [row.account for row in tenants]
        assert [] == others == strangers

    async def test_outlives_the_keys_of_an_account(self, ledger: Ledger) -> None:
        """A key that is taken out of the settings stays known, and so do its envelopes."""
        async with ledger.reading() as connection:
            sight = await resolve(connection, None, "beta")
            (row,) = await lookups.find(connection, sight, "env_1")

        assert ("beta", "env_1") == (row.account, row.id)


LATER = """
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 2000)
INSERT INTO envelopes (account, id, status, version, sequence, first_seen_at, updated_at)
SELECT 'default', 'later_' || n, 'pending', 1, 1, {time}, {time} FROM numbers
"""


@pytest.fixture(name="many")
async def _many(database_url: str) -> AsyncIterator[Ledger]:
    """One envelope of another kind behind as many as a page may look at."""
    assert 2000 == list_statements.SCANNED
    ledger = Ledger(database_url)
    moment = "'2026-07-02 12:00:00.000000'"
    if ledger.database.is_postgresql:
        moment += "::timestamptz"
    await ledger.change(LATER.format(time=moment))
    await add(ledger, {"status": "signed", "is_test": True}, {"account": "beta"})
    yield ledger
    await ledger.database.close()


class TestLongWays:
    async def test_are_gone_in_bounded_steps(self, many: Ledger) -> None:
        """A page that found nothing has looked far enough, and says where the next begins."""
        first = await page(many, Sight(("beta",)))
        assert first.next is not None
        second = await page(many, Sight(("beta",)), after=first.next)

        assert [] == first.rows
        assert ["env_1"] == [row.id for row in second.rows]
        assert second.next is None

    async def test_are_not_gone_along_a_better_index(self, many: Ledger) -> None:
        found = await page(many, status="signed", is_test=True)

        assert (["env_0"], None) == ([row.id for row in found.rows], found.next)

    async def test_need_no_steps_if_everything_fits(self, many: Ledger) -> None:
        first = await page(many, status="pending", limit=100)
        assert first.next is not None

        assert 100 == len(first.rows)
        assert list_statements.SCANNED == len(await ids(many, status="pending", limit=1000))

    async def test_forward_end_at_the_end(self, many: Ledger) -> None:
        found = await ids(many, Sight(("beta",)), updated_after=NOON - timedelta(days=1))

        assert ["env_1"] == found


class TestSearch:
    @pytest.fixture(name="ledger")
    async def _ledger(self, database_url: str) -> AsyncIterator[Ledger]:
        ledger = Ledger(database_url)
        ada, bob = {"email": "ada@example.com"}, {"email": "Bob@example.com"}
        await add(
            ledger,
            {"id": "ada-1", "parties": [ada, bob], "status": "signed", "is_test": True},
            {"id": "two", "external_id": "ADA-2", "parties": [bob], "tenant": "org_1"},
            {"id": "three", "account": "beta", "client_reference_id": "ada-3"},
        )
        async with ledger.transaction() as connection:
            await terms.learn(
                connection, [("default", "ada-1"), ("default", "two"), ("beta", "three")]
            )
        yield ledger
        await ledger.database.close()

    async def search(
        self, ledger: Ledger, q: str, sight: Sight = EVERYTHING, *, limit: int = 100, **filters: Any
    ) -> list[str]:
        found: list[str] = []
        after = None
        async with ledger.reading() as connection:
            while True:
                hits = await searches.search(
                    connection, sight, Filters(**filters), q, after=after, limit=limit
                )
                found += [row.id for row in hits.rows]
                if hits.next is None:
                    return found
                after = hits.next

    async def test_finds_by_what_ids_and_addresses_begin_with(self, ledger: Ledger) -> None:
        assert ["ada-1", "two", "three"] == await self.search(ledger, "Ada-")
        assert ["ada-1"] == await self.search(ledger, "ada@example.com")
        assert ["ada-1", "two"] == await self.search(ledger, "BOB@")
        assert [] == await self.search(ledger, "example.com")

    async def test_gives_one_that_is_found_twice_once_a_page(self, ledger: Ledger) -> None:
        assert ["ada-1", "two", "three"] == await self.search(ledger, "ada")
        assert {"ada-1", "two", "three"} == set(await self.search(ledger, "ada", limit=1))

    async def test_takes_filters_and_sight(self, ledger: Ledger) -> None:
        after = NOON + timedelta(seconds=1)
        assert ["ada-1"] == await self.search(ledger, "ada", status="signed")
        assert ["two", "three"] == await self.search(ledger, "ada", status="none")
        assert ["ada-1"] == await self.search(ledger, "ada", is_test=True)
        assert ["two", "three"] == await self.search(ledger, "ada", is_test=False)
        assert ["two"] == await self.search(ledger, "ada", tenant="org_1")
        assert ["three"] == await self.search(ledger, "ada", updated_after=after)
        assert ["three"] == await self.search(ledger, "ada", Sight(("beta",)))

    async def test_leaves_out_what_is_not_there_any_more(self, ledger: Ledger) -> None:
        await ledger.change("DELETE FROM envelopes WHERE id = 'two'")

        assert ["ada-1", "three"] == await self.search(ledger, "ada")

    @pytest.mark.parametrize("q", ["%", "_", "a%", "'", "🖋", "\U0010ffff", "x" * 255, "\\"])
    async def test_takes_every_character_as_it_is(self, ledger: Ledger, q: str) -> None:
        assert [] == await self.search(ledger, q)
