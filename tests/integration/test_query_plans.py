"""With a long history behind it, no statement of dispatch walks over what is finished.

The plan of the claim is looked at beside its other tests.
"""

from collections.abc import AsyncIterator

import pytest

from app.store import claims, contents, deliveries, verdicts
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


async def plan_of(ledger: Ledger, statement: str, types: str, values: str) -> str:
    async with ledger.transaction() as connection:
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.exec_driver_sql(f"PREPARE planned ({types}) AS {statement}")
        explained = await connection.exec_driver_sql(f"EXPLAIN EXECUTE planned ({values})")
        plan = "\n".join(explained.scalars())
        await connection.exec_driver_sql("DEALLOCATE planned")
    return plan
