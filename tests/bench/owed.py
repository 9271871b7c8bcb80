"""Fills the service's tables with what is owed and what was done long ago, as SQL can."""

import asyncpg

from tests.bench.load import Maker

# Each envelope has had so many events, and they came in turns, as those of many do.
PER_ENVELOPE = 4
# Signs everything.
PARTY = "charles.babbage@engine.example"

_PARTIES = """[
    {"email": "ada.lovelace@example.com", "name": "Ada Lovelace", "role": "Client",
     "order": 1, "status": "signed"},
    {"email": "charles.babbage@engine.example", "name": "Charles Babbage", "role": "Provider",
     "order": 2, "status": "signed"}
]"""
_METADATA = """{
    "external_id": "crm-1", "department": "onboarding", "region": "eu-central", "is_test": false
}"""
_SUBSCRIBE = """
INSERT INTO callbacks (name, patterns, options, first_seen_at, last_seen_at, swept_at)
VALUES ($1, '["*"]', '{}', now(), now(), now()) ON CONFLICT DO NOTHING
"""

# What everything else is made of. Rows of one era are older than those of the next.
_TABLE = "CREATE TEMP TABLE rows (id uuid, envelope_id text, sequence int, at timestamptz)"
_ROWS = """
INSERT INTO rows
SELECT ($2::text || lpad(to_hex(n), 8, '0'))::uuid, 'env-' || $2 || n % ($1::int4 / $3::int4),
    n / ($1 / $3) + 1, now() - interval '1 hour' + n * interval '1 microsecond'
FROM generate_series(0, $1 - 1) AS n
"""
_ENVELOPES = """
INSERT INTO envelopes (account, id, status, signed_count, total, parties, metadata, version,
    sequence, first_seen_at, updated_at)
SELECT 'default', envelope_id, 'signed', 2, 2, $2::jsonb, $3::jsonb, sequence, sequence, at, at
FROM rows WHERE sequence = $1
"""
_EVENTS = """
INSERT INTO events (id, account, envelope_id, type, atlas_event_id, occurred_at, received_at,
    sequence, effect, status, version)
SELECT id, 'default', envelope_id, 'envelope.signed', 'evt_' || id, at, at,
    sequence, 'applied', 'signed', sequence
FROM rows
"""
_BODIES = "INSERT INTO bodies (event_id, body) SELECT id, $1 FROM rows"
_OWED = """
INSERT INTO deliveries (id, event_id, callback, account, envelope_id, sequence, due_at, created_at)
SELECT id, id, $1, 'default', envelope_id, sequence, at, now() FROM rows
"""
_DONE = """
INSERT INTO deliveries (id, event_id, callback, account, envelope_id, sequence, created_at,
    state, attempts, token, worker, settled_at)
SELECT id, id, $1, 'default', envelope_id, sequence, at, 'done', 1, 1, 'bench:1', at FROM rows
"""
_ATTEMPTS = """
INSERT INTO attempts (delivery_id, token, number, worker, started_at, finished_at, verdict)
SELECT id, 1, 1, 'bench:1', at, at, 'done' FROM rows
"""
_OLD, _NEW = (f"0190000{era}-0000-7000-8000-0000" for era in (0, 1))


async def subscribe(url: str, *callbacks: str) -> None:
    """Let callbacks want everything, before any process has loaded them."""
    connection = await _connect(url)
    try:
        for callback in callbacks:
            await connection.execute(_SUBSCRIBE, callback)
    finally:
        await connection.close()


async def fill(url: str, *, callback: str, owed: int, finished: int = 0) -> None:
    """Owe events to a callback, beside others that it has had; their bytes are pruned."""
    connection = await _connect(url)
    try:
        await connection.execute(_TABLE)
        if finished:
            await _record(connection, finished, _OLD)
            await connection.execute(_DONE, callback)
            await connection.execute(_ATTEMPTS)
        if owed:
            await _record(connection, owed, _NEW)
            await connection.execute(_BODIES, Maker("0" * 16).body())
            await connection.execute(_OWED, callback)
        await connection.execute("DROP TABLE rows")
        # What autovacuum has done on any database that has been in use for a while.
        await connection.execute("VACUUM (ANALYZE)")
    finally:
        await connection.close()


async def _record(connection: asyncpg.Connection, count: int, era: str) -> None:
    await connection.execute("TRUNCATE rows")
    await connection.execute(_ROWS, count, era, PER_ENVELOPE)
    await connection.execute("ANALYZE rows")
    await connection.execute(_ENVELOPES, PER_ENVELOPE, _PARTIES, _METADATA)
    await connection.execute(_EVENTS)


async def _connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url, server_settings={"search_path": "atlas_receiver"})
