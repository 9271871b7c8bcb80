"""With a long history behind it, no statement of dispatch walks over what is finished.

The plan of the claim is looked at beside its other tests.
"""

from collections.abc import AsyncIterator

import pytest

from app.store import claims, contents, deliveries, feed, followers, leases, terms, verdicts
from tests.integration.ledger import Ledger

FINISHED = """
INSERT INTO deliveries
    (id, event_id, callback, account, envelope_id, sequence, state, created_at)
SELECT gen_random_uuid(), gen_random_uuid(), 'file', 'default', 'env_' || n / 5, n % 5, 'done',
    now()
FROM generate_series(1, 50000) AS n
"""
EVENTS = """
INSERT INTO events (id, account, envelope_id, sequence, received_at, effect)
SELECT event_id, account, envelope_id, sequence, created_at, 'applied' FROM deliveries
"""
BODIES = "INSERT INTO bodies (event_id, body) SELECT id, '{}' FROM events"
HAPPENED = """
INSERT INTO events (id, account, envelope_id, sequence, received_at, effect)
SELECT gen_random_uuid(), 'default', 'env_' || n / 5, n % 5, now(), 'applied'
FROM generate_series(1, 10000) AS n
"""
# Half of what happened has its place; the other half waits.
FEED = """
WITH taken AS (DELETE FROM changes WHERE id % 2 = 0 RETURNING *)
INSERT INTO feed (position, kind, event_id, account, envelope_id, at)
SELECT row_number() OVER (ORDER BY id), kind, event_id, account, envelope_id, at FROM taken
"""
ENVELOPES = """
INSERT INTO envelopes (account, id, tenant, version, sequence, first_seen_at, updated_at)
SELECT DISTINCT account, envelope_id, 'acme', 1, 1, now(), now() FROM events
"""
TERMS = """
INSERT INTO terms (term, account, envelope_id)
SELECT id || n, account, id FROM envelopes CROSS JOIN generate_series(1, 10) AS n
"""

ROOM = "'{file}', '{64}', '{t}'"
ONE = "'{018f0000-0000-7000-8000-000000000000}'"
VERDICT_TYPES = (
    "uuid[], int8[], int4[], text[], text[], interval[], text[], text[], timestamptz[], "
    "timestamptz[], text"
)
VERDICT = (
    f"{ONE}, '{{1}}', '{{1}}', '{{done}}', '{{done}}', '{{NULL}}', '{{NULL}}', '{{NULL}}', "
    "'{now}', '{now}', 'w'"
)
# What the statement is, what its parameters are, and with which values it is planned.
STATEMENTS = {
    "postpone": (
        claims._POSTPONE_POSTGRESQL,
        "text[], int4[], bool[], interval, interval, interval",
        f"{ROOM}, '5 s', '30 s', '15 min'",
    ),
    "load": (contents._LOAD_POSTGRESQL, "uuid[]", ONE),
    "settle": (verdicts._SETTLE_POSTGRESQL, VERDICT_TYPES, VERDICT),
    "wake": (deliveries._WAKE_POSTGRESQL, "uuid[]", ONE),
    "renew": (claims._RENEW_POSTGRESQL, "uuid[], int8[], interval", f"{ONE}, '{{1}}', '30 s'"),
}

_SCANNED = "'env_1', '', '', 'env_2'"
FEED_STATEMENTS = {
    "read": (feed._READ_POSTGRESQL, "int8, int8", "7, 100"),
    "read_filtered": (
        feed._FILTERED_POSTGRESQL,
        "int8, int8, text[], text, text[], int8",
        "7, 1007, '{default}', 'acme', '{envelope.*}', 100",
    ),
    "head": (feed._HEAD, "", ""),
    "lag": (feed._LAG_POSTGRESQL, "int8, timestamptz", "7, 'now'"),
    "pending": (feed._PENDING, "", ""),
    "find": (
        terms._FIND_POSTGRESQL,
        "text, text, text, text, text[], text, int8",
        f"{_SCANNED}, '{{default}}', 'acme', 50",
    ),
    "last": (terms._LAST_POSTGRESQL, "text, text, text, text", _SCANNED),
    "behind": (followers._BEHIND_POSTGRESQL, "text[]", "'{terms}'"),
    "take": (followers._TAKE_POSTGRESQL, "text", "'terms'"),
    "hold": (leases._LOCK_POSTGRESQL, "text, text, interval", "'feed', 'a', '2 s'"),
}
# These bring what one batch of theirs is into an order, in memory.
SORTING_STATEMENTS = {
    "place": (feed._PLACE_POSTGRESQL, "int8, int8, int8", "7, 1000, 25000"),
    "learn": (terms._LEARN_POSTGRESQL, "text[], text[]", "'{default}', '{env_1}'"),
}


@pytest.fixture(name="ledger")
async def _ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    await ledger.register("file")
    for statement in (FINISHED, EVENTS, BODIES, "ANALYZE"):
        await ledger.change(statement)
    yield ledger
    await ledger.database.close()


class TestPlans:
    async def test_no_statement_reads_a_table_from_end_to_end(self, ledger: Ledger) -> None:
        for name, (statement, types, values) in STATEMENTS.items():
            plan = await plan_of(ledger, statement, types, values)

            for table in ("deliveries", "events", "bodies", "envelopes", "attempts"):
                assert f"Seq Scan on {table}" not in plan, f"{name}:\n{plan}"


class TestPlansOfTheFeed:
    @pytest.fixture(name="fed")
    async def _fed(self, postgres_url: str) -> AsyncIterator[Ledger]:
        ledger = Ledger(postgres_url)
        for statement in (HAPPENED, FEED, ENVELOPES, TERMS, "ANALYZE"):
            await ledger.change(statement)
        yield ledger
        await ledger.database.close()

    async def test_read_by_an_index_in_its_order(self, fed: Ledger) -> None:
        for name, (statement, types, values) in (FEED_STATEMENTS | SORTING_STATEMENTS).items():
            plan = await plan_of(fed, statement, types, values)

            assert "Seq Scan" not in plan, f"{name}:\n{plan}"
            assert name in SORTING_STATEMENTS or "Sort" not in plan, f"{name}:\n{plan}"

    async def test_begin_where_they_are_told_to(self, fed: Ledger) -> None:
        for name, condition in (
            ("read", '("position" > $1)'),
            ("read_filtered", '(("position" > $1) AND ("position" <= $2))'),
            ("find", "((ROW(term, account, envelope_id) > ROW($1, $2, $3)) AND (term < $4))"),
            ("place", "(id >= $1)"),
        ):
            plan = await plan_of(fed, *(FEED_STATEMENTS | SORTING_STATEMENTS)[name])

            assert f"Index Cond: {condition}" in plan, f"{name}:\n{plan}"


async def plan_of(ledger: Ledger, statement: str, types: str, values: str) -> str:
    async with ledger.transaction() as connection:
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        given, taken = (f"({types})", f"({values})") if types else ("", "")
        await connection.exec_driver_sql(f"PREPARE planned {given} AS {statement}")
        explained = await connection.exec_driver_sql(f"EXPLAIN EXECUTE planned {taken}")
        plan = "\n".join(explained.scalars())
        await connection.exec_driver_sql("DEALLOCATE planned")
    return plan
