"""Whatever is asked of envelopes goes along an index: no table is read through, nothing sorted."""

import re
import sqlite3
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from app.store import expectations, list_statements, lookups, searches
from tests.integration.ledger import Ledger
from tests.postgres import create_database, drop_database, replace_database

ENVELOPES = """
INSERT INTO envelopes (account, id, tenant, status, external_id, client_reference_id, is_test,
    version, sequence, first_seen_at, updated_at)
SELECT CASE WHEN n % 10 = 0 THEN 'beta' ELSE 'default' END, 'env_' || n, 'org_' || n % 50,
    (ARRAY['draft', 'pending', 'expired', 'voided', 'declined', 'signed', NULL])[n % 7 + 1],
    'ext_' || n % 1000, 'ref_' || n % 1000, n % 20 = 0, 1, 1, now(), now() + n * interval '1 s'
FROM generate_series(1, 20000) AS n
"""
KEYS = """
INSERT INTO keys (fingerprint, label, account, first_seen_at)
VALUES ('one', 'one', 'default', now()), ('two', 'two', 'beta', now())
"""
EXPECTATIONS = """
INSERT INTO expectations (account, envelope_id, consumer, created_at, due_at)
SELECT 'default', 'new_' || n, 'office', now(), CASE WHEN n % 10 = 0 THEN now() END
FROM generate_series(1, 5000) AS n
"""
PAGE_TYPES = (
    "timestamptz, text, text, timestamptz, text, text, text, text, text, text, bool, text[], int8"
)
PAGE_VALUES = (
    "now(), 'default', 'env_1', now(), 'default', 'env_2', 'ext_1', 'ref_1', 'org_1', 'signed', "
    "true, '{default}', 50"
)
BOUND = (
    "timestamptz, text, text, timestamptz, text, text",
    "now(), 'default', 'env_1', now(), 'default', 'env_2'",
)
# Along which index each list goes.
INDEXES = {name: f"envelopes_{name}_idx" for name in list_statements.INDEXED}
INDEXES["no_status"] = INDEXES["status"]

UNWANTED = re.compile(r"Seq Scan|Sort|Hash|Materialize")


@pytest.fixture(name="ledger", scope="module")
async def _ledger(server: str, postgres_template: str) -> AsyncIterator[Ledger]:
    name = f"receiver_{uuid.uuid4().hex}"
    create_database(server, name, template=postgres_template)
    ledger = Ledger(replace_database(server, name))
    for statement in (ENVELOPES, KEYS, EXPECTATIONS, "ANALYZE"):
        await ledger.change(statement)
    yield ledger
    await ledger.database.close()
    drop_database(server, name)


async def plan_of(
    ledger: Ledger, statement: str, types: str, values: str, *, setting: str | None = None
) -> str:
    async with ledger.transaction() as connection:
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        if setting is not None:
            await connection.exec_driver_sql(setting)
        await connection.exec_driver_sql(f"PREPARE planned ({types}) AS {statement}")
        explained = await connection.exec_driver_sql(f"EXPLAIN EXECUTE planned ({values})")
        plan = "\n".join(explained.scalars())
        await connection.exec_driver_sql("DEALLOCATE planned")
    return plan


WAYS = [way for way in list_statements.PAGES if way[2]]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[0]}-{'on' if way[1] else 'back'}")
class TestLists:
    async def test_go_along_the_index_of_their_filter(
        self, ledger: Ledger, way: list_statements.Way
    ) -> None:
        plan = await plan_of(
            ledger,
            list_statements.PAGES[way],
            PAGE_TYPES,
            PAGE_VALUES,
            setting=list_statements.IN_ORDER,
        )

        assert not UNWANTED.search(plan), plan
        assert INDEXES[way[0]] in plan, plan

    async def test_look_for_their_end_in_the_index_alone(
        self, ledger: Ledger, way: list_statements.Way
    ) -> None:
        types, values = BOUND
        if list_statements.INDEXED[way[0]].value is not None:
            types, values = f"{types}, text", f"{values}, 'x'"

        plan = await plan_of(
            ledger, list_statements.BOUNDS[way], types, values, setting=list_statements.IN_ORDER
        )

        assert not UNWANTED.search(plan), plan
        assert re.search(f"Index (Only )?Scan (Backward )?using {INDEXES[way[0]]}", plan), plan


class TestLookups:
    @pytest.mark.parametrize("statements", [lookups._FIND_SHOWN, lookups._FIND_PROGRESS])
    async def test_have_the_account_and_the_id(
        self, ledger: Ledger, statements: lookups.Statements
    ) -> None:
        every = await plan_of(ledger, statements[True, True], "text, text", "'env_1', NULL")
        some = await plan_of(
            ledger, statements[True, False], "text, text, text[]", "'env_1', NULL, '{default}'"
        )

        for plan in (every, some):
            assert not re.search("Seq Scan on envelopes|Sort|Hash", plan), plan
            assert re.search(r"Index Cond: \(\(account = ANY .* AND \(id = ", plan), plan

    async def test_of_what_was_found_have_both_too(self, ledger: Ledger) -> None:
        plan = await plan_of(
            ledger, searches._OF_POSTGRESQL, "text[], text[]", "'{default}', '{env_1}'"
        )

        assert not UNWANTED.search(plan), plan
        assert "Index Cond: ((account = named.account) AND (id = named.id))" in plan


class TestExpectations:
    async def test_that_are_overdue_are_found_by_their_time(self, ledger: Ledger) -> None:
        taken = await plan_of(ledger, expectations._OVERDUE_POSTGRESQL, "int8", "100")
        wanted = await plan_of(ledger, f"{expectations._IS_ANY_POSTGRESQL} OFFSET $1", "int8", "0")

        for plan in (taken, wanted):
            assert not UNWANTED.search(plan), plan
            assert "expectations_due_idx" in plan, plan


class TestOnSqlite:
    @pytest.mark.parametrize("statements", [list_statements.PAGES, list_statements.BOUNDS])
    def test_lists_go_along_the_same_indexes(
        self, sqlite_template: Path, statements: Mapping[list_statements.Way, str]
    ) -> None:
        with closing(sqlite3.connect(sqlite_template)) as connection:
            for way, statement in statements.items():
                if way[2]:
                    continue
                marks = {int(number) for number in re.findall(r"\?(\d+)", statement)}
                explained = connection.execute(
                    f"EXPLAIN QUERY PLAN {statement}", ["x"] * max(marks)
                )
                plan = "\n".join(row[3] for row in explained)

                assert re.match(rf"SEARCH e USING (COVERING )?INDEX {INDEXES[way[0]]}", plan), plan
                assert "TEMP B-TREE" not in plan, plan
