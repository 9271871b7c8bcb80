"""Lists of deliveries: by the index that holds the fewest, for those who see only a part."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from app.dispatch import control, failures
from app.dispatch.control import Page
from app.errors import NotFound
from app.store import deliveries, history
from app.store import failures as rows
from app.store.callbacks import Subscription
from app.store.callbacks import register as register_all
from app.store.deliveries import EVERYTHING, Wanted
from app.store.failures import Cause
from app.store.sight import Sight
from tests.integration.ledger import Ledger
from tests.integration.test_query_plans import plan_of

ACTOR = "ada"
MINE, THEIRS = Sight(("default",)), Sight(("beta",))
TENANT = Sight(None, "org_1")

FINISHED = """
INSERT INTO deliveries
    (id, event_id, callback, account, envelope_id, sequence, state, due_at, created_at)
SELECT gen_random_uuid(), gen_random_uuid(), 'file', 'default', 'env_' || n / 5, n % 5,
    CASE n % 100 WHEN 0 THEN 'dead' WHEN 1 THEN 'pending' WHEN 2 THEN 'discarded' ELSE 'done' END,
    CASE WHEN n % 100 = 1 THEN now() END, now()
FROM generate_series(1, 20000) AS n
"""
EVENTS = """
INSERT INTO events (id, account, envelope_id, type, sequence, received_at, effect)
SELECT event_id, account, envelope_id, 'envelope.signed', sequence, created_at, 'applied'
FROM deliveries
"""
INDEXES = {
    None: "deliveries_pkey",
    "done": "deliveries_pkey",
    "pending": "deliveries_owed_idx",
    "running": "deliveries_owed_idx",
    "dead": "deliveries_set_aside_idx",
    "parked": "deliveries_set_aside_idx",
    "discarded": "deliveries_set_aside_idx",
}
LAST = "'ffffffff-ffff-ffff-ffff-ffffffffffff'"


@pytest.fixture(name="ledger")
async def _ledger(ledger: Ledger) -> Ledger:
    await ledger.register("file")
    return ledger


@pytest.fixture(name="history_of_years")
async def _history_of_years(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    for statement in (FINISHED, EVENTS, "ANALYZE"):
        await ledger.change(statement)
    yield ledger
    await ledger.database.close()


async def in_state(ledger: Ledger, state: str, **about: Any) -> str:
    delivery_id = await ledger.owe_one(**about)
    due_at = "due_at" if state in {"pending", "running"} else "NULL"
    table = rows._deliveries
    values = {"state": state, "settled_at": datetime.now(UTC), "fingerprint": "f1"}
    if due_at == "NULL":
        values["due_at"] = None
    async with ledger.transaction() as connection:
        await connection.execute(table.update().where(table.c.id == delivery_id).values(**values))
    return str(delivery_id)


async def one_look(ledger: Ledger, **wanted: Any) -> Page:
    return await control.list_deliveries(ledger.database, **{"looks": 1, **wanted})


class TestPages:
    @pytest.mark.parametrize("state", control.STATES)
    async def test_of_one_state_hold_nothing_else(self, ledger: Ledger, state: str) -> None:
        made = {
            each: await in_state(ledger, each, envelope=f"env_{each}") for each in control.STATES
        }

        page = await one_look(ledger, state=state)

        assert [made[state]] == [str(item.id) for item in page.items]
        assert page.next_cursor is None

    async def test_of_an_envelope_hold_those_of_all_its_events(self, ledger: Ledger) -> None:
        owed = [await in_state(ledger, "done", sequence=number) for number in (1, 2)]
        await in_state(ledger, "done", envelope="env_2")
        beta = await in_state(ledger, "done", account="beta")

        page = await one_look(ledger, envelope_id="env_1")

        assert [beta, *owed[::-1]] == [str(item.id) for item in page.items]

    async def test_of_one_callback_are_found_behind_many_of_another(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A look is at a bounded number: so a page may be empty, and lead to the next."""
        monkeypatch.setattr(control, "LOOKED_AT", 2)
        await ledger.register("mail")
        wanted = await ledger.owe_one("mail", envelope="env_0")
        for number in range(5):
            await ledger.owe_one(envelope=f"env_{number + 1}")

        pages = [await one_look(ledger, callback="mail")]
        while (cursor := pages[-1].next_cursor) is not None:
            pages.append(await one_look(ledger, callback="mail", cursor=cursor))
        at_once = await control.list_deliveries(ledger.database, callback="mail")

        assert [0, 0, 1, 0] == [len(page.items) for page in pages]
        assert ([wanted], None) == ([item.id for item in at_once.items], at_once.next_cursor)

    async def test_that_are_full_go_on_behind_what_they_show(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        for number in range(3):
            await ledger.owe("file", "mail", envelope=f"env_{number}")

        first = await one_look(ledger, callback="mail", limit=2)
        rest = await one_look(ledger, callback="mail", limit=2, cursor=first.next_cursor)

        assert [2, 1] == [len(first.items), len(rest.items)]
        assert rest.next_cursor is None


class TestSight:
    async def test_hides_the_deliveries_of_other_accounts(self, ledger: Ledger) -> None:
        mine = await in_state(ledger, "dead")
        theirs = await in_state(ledger, "dead", account="beta")

        for sight, seen in ((MINE, [mine]), (THEIRS, [theirs]), (EVERYTHING, [theirs, mine])):
            for wanted in ({}, {"state": "dead"}, {"envelope_id": "env_1"}, {"callback": "file"}):
                page = await one_look(ledger, sight=sight, **wanted)
                assert seen == [str(item.id) for item in page.items], (sight, wanted)

    async def test_of_a_tenant_is_through_its_envelopes(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1", tenant="org_1")
        await ledger.envelope("env_2", tenant="org_2")
        seen = await in_state(ledger, "dead", envelope="env_1")
        hidden = await in_state(ledger, "dead", envelope="env_2")
        await in_state(ledger, "dead", envelope=None)

        page = await one_look(ledger, sight=TENANT)
        found = await control.find(ledger.database, seen, sight=TENANT)

        assert [seen] == [str(item.id) for item in page.items]
        assert seen == str(found.delivery.id)
        with pytest.raises(NotFound, match="there is no delivery"):
            await control.find(ledger.database, hidden, sight=TENANT)

    async def test_limits_what_can_be_done(self, ledger: Ledger) -> None:
        delivery_id = await in_state(ledger, "dead")

        with pytest.raises(NotFound, match="there is no delivery"):
            await control.retry(ledger.database, delivery_id, actor=ACTOR, sight=THEIRS)
        with pytest.raises(NotFound, match="there is no delivery"):
            await control.discard(
                ledger.database, delivery_id, reason="a test", actor=ACTOR, sight=THEIRS
            )

        assert (["dead"], []) == (await ledger.states(), await ledger.audit())

    async def test_limits_what_is_counted(self, ledger: Ledger) -> None:
        for account in ("default", "default", "beta"):
            await in_state(ledger, "dead", account=account)

        [mine] = await control.list_callbacks(ledger.database, sight=MINE)
        [everything] = await control.list_callbacks(ledger.database)
        [group] = await failures.list_groups(ledger.database, sight=MINE)
        nobodys = await failures.list_groups(ledger.database, sight=Sight(()))

        assert ({"dead": 2}, {"dead": 3}) == (mine.counts, everything.counts)
        assert (2, []) == (group.count, nobodys)

    async def test_hides_the_callbacks_of_other_accounts(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await register_all(connection, [Subscription("beta.only", ("*",), "beta")])

        named = [
            [each.registered.subscription.name for each in found]
            for sight in (MINE, THEIRS)
            for found in [await control.list_callbacks(ledger.database, sight=sight)]
        ]

        assert [["file"], ["beta.only", "file"]] == named

    async def test_limits_what_a_discard_of_a_cause_gives_up(self, ledger: Ledger) -> None:
        mine = await in_state(ledger, "dead")
        await in_state(ledger, "dead", account="beta")

        count = await failures.discard_group(
            ledger.database, Cause("f1", sight=MINE), reason="a test", actor=ACTOR
        )

        given_up = {str(row.id) for row in await ledger.deliveries(state="discarded")}
        assert (1, {mine}) == (count, given_up)
        [act] = await ledger.audit()
        assert (["default"], None, 1) == (
            act.details["accounts"],
            act.details["tenant"],
            act.details["count"],
        )
        with pytest.raises(NotFound, match="no dead letters of fingerprint 'f1'"):
            await failures.discard_group(
                ledger.database, Cause("f1", sight=MINE), reason="a test", actor=ACTOR
            )

    async def test_limits_what_a_retry_of_a_cause_makes_due(self, ledger: Ledger) -> None:
        mine = await in_state(ledger, "dead")
        await in_state(ledger, "dead", account="beta")

        steps = failures.retry_group(
            ledger.database, Cause("f1", sight=MINE), actor=ACTOR, rate=10_000.0
        )
        async for step in steps:
            if step.waiting:
                break
        await steps.aclose()

        assert {mine} == {str(row.id) for row in await ledger.deliveries(state="pending")}
        assert 1 == len(await ledger.deliveries(state="dead"))


class TestPlans:
    """In one test for each database: a long history takes a while to make."""

    async def test_of_a_list_go_along_one_index_and_never_sort(
        self, history_of_years: Ledger
    ) -> None:
        for state, index in INDEXES.items():
            said = "NULL" if state is None else f"'{state}'"
            values = f"{LAST}, 50, {said}, 'file', '{{default}}', NULL, NULL"

            plan = await planned(history_of_years, Wanted(state), values)

            assert f"using {index} on deliveries" in plan, plan
            assert "Seq Scan" not in plan, plan
            assert "Sort" not in plan, plan
        await self.check_those_of_one_envelope(history_of_years)

    async def check_those_of_one_envelope(self, ledger: Ledger) -> None:
        """What belongs to one envelope begins with its events."""
        values = f"{LAST}, 50, NULL, NULL, NULL, NULL, 'env_7'"
        listed = await planned(ledger, Wanted(envelope_id="env_7"), values)
        values = "'default', 'env_7', '00000000-0000-0000-0000-000000000000', 100"
        told = await plan_of(ledger, history.SAY_POSTGRESQL, "text, text, uuid, int8", values)

        assert "deliveries_event_id_callback_generation_key on deliveries d" in listed, listed
        assert "events_pkey on events e" in told, told
        for plan in (listed, told):
            assert "events_envelope_idx on events" in plan, plan
            assert "Seq Scan" not in plan, plan

    async def test_on_sqlite_go_along_the_same_index(self, sqlite_url: str) -> None:
        ledger = Ledger(sqlite_url)
        for state, name in INDEXES.items():
            index = name.replace("deliveries_pkey", "sqlite_autoindex_deliveries_1")
            statement = deliveries.scanning(Wanted(state), is_postgresql=False)
            parameters = ("f" * 32, 50, state, None, None, None)

            async with ledger.reading() as connection:
                found = await connection.exec_driver_sql(
                    f"EXPLAIN QUERY PLAN {statement}", parameters
                )
                plan = "\n".join(row[-1] for row in found)

            assert f"INDEX {index}" in plan, plan
            assert "TEMP B-TREE" not in plan, plan
        await ledger.database.close()


async def planned(ledger: Ledger, wanted: Wanted, values: str) -> str:
    statement = deliveries.scanning(wanted, is_postgresql=True)
    types = "uuid, int8, text, text, text[], text, text"
    return await plan_of(ledger, statement, types, values)
