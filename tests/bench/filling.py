"""Fills a database with many envelopes and their history, as fast as SQL can.

Every value follows from a number, so that whoever asks knows what is there. Indexes are taken
away while rows are written and built again afterwards, which is several times as fast.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from tests.bench.owed import PARTY, subscribe

SCHEMA = "atlas_receiver"
# Two processors, and the server uses one for each connection.
CONNECTIONS = 2
CHUNK = 100_000
# However long the history is, so many deliveries are dead, and as many are owed.
SET_ASIDE = 200
CAUSES = 20
BODIES = 1_000
TENANTS = 100
DAY = 86_400
SPAN = 30 * DAY * 1_000_000
# What the database takes on the disk, in bytes, measured once; and its log beside it.
PER_ENVELOPE, PER_EVENT, LOG = 2_200, 1_300, 3 * 2**30

Tell = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Filling:
    """How much there is. Events come in turns: the first of each envelope, the second, …"""

    envelopes: int
    events: int
    # The time of the first event, in microseconds.
    began: int = 1_767_225_600_000_000

    @property
    def per_envelope(self) -> int:
        return self.events // self.envelopes

    @property
    def step(self) -> int:
        """The microseconds from one event to the next."""
        return SPAN // self.events

    @property
    def rows(self) -> dict[str, int]:
        """Tell how many numbers each table is filled from."""
        numbers = {"envelopes": self.envelopes, "terms": self.envelopes}
        return {job.table: numbers.get(job.table, self.events) for job in JOBS}

    @property
    def bytes(self) -> int:
        """What it takes on the disk, roughly."""
        return self.envelopes * PER_ENVELOPE + self.events * PER_EVENT

    def event(self, number: int) -> UUID:
        """Give the id of an event; it sorts by time, as those of the service do."""
        moment = (self.began + number * self.step) // 1_000
        return UUID(f"{moment:012x}70008{number:015x}")

    def updated_at(self, number: int) -> datetime:
        """Give the time of the last event of an envelope."""
        last = number + (self.per_envelope - 1) * self.envelopes
        return datetime.fromtimestamp((self.began + last * self.step) / 1e6, UTC)


def envelope(number: int) -> str:
    """Give the id of an envelope; it looks like any other, and comes in no order."""
    return str(UUID(hashlib.md5(f"envelope {number}".encode()).hexdigest()))  # noqa: S324


def pending(count: int) -> list[str]:
    """Give the ids of some envelopes that are pending."""
    return [envelope(10 * n + 6) for n in range(count)]


# One row, so that every statement below can name what it needs.
_SCALE = """
CREATE TABLE public.scale AS SELECT $1::int8 AS envelopes, $2::int8 AS events,
    $3::int8 AS began, $4::int8 AS step, $2::int8 / $1::int8 AS per_envelope,
    $2::int8 / $5::int8 AS apart
"""
_FUNCTIONS = """
CREATE FUNCTION public.envelope(n int8) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT md5('envelope ' || n)::uuid::text $$;
CREATE FUNCTION public.moment(micros int8) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS
    $$ SELECT to_timestamp(micros / 1e6) $$;
CREATE FUNCTION public.number(micros int8, kind text, m int8) RETURNS uuid LANGUAGE sql IMMUTABLE AS
    $$ SELECT (lpad(to_hex(micros / 1000), 12, '0') || '7000' || kind
        || lpad(to_hex(m), 15, '0'))::uuid $$;
CREATE FUNCTION public.status(n int8) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT CASE WHEN n % 100 = 9 THEN 'declined' WHEN n % 10 = 9 THEN 'voided'
        WHEN n % 10 > 5 THEN 'pending' ELSE 'signed' END $$;
CREATE FUNCTION public.kind(n int8, sequence int8, last int8) RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT 'envelope.' || CASE
        WHEN sequence = last THEN replace(public.status(n), 'pending', 'in_progress')
        WHEN sequence = 1 THEN 'created' WHEN sequence = 2 THEN 'sent' ELSE 'viewed' END $$;
"""
_NUMBERS = "FROM generate_series($1::int8, $2::int8 - 1) AS m, public.scale AS s"
# Of each event its number, its envelope's, its place in it, its time and its type.
_EVENTS = """FROM (
    SELECT m, n, sequence, micros, public.envelope(n) AS envelope_id,
        public.moment(micros) AS at, public.number(micros, '8', m) AS id,
        public.number(micros, '9', m) AS delivery_id,
        public.kind(n, sequence, per_envelope) AS type, public.status(n) AS status,
        CASE WHEN m % apart = 0 THEN 'dead' WHEN m % apart = 1 THEN 'pending' ELSE 'done' END
            AS state, m / apart AS which
    FROM (
        SELECT m, m % s.envelopes AS n, m / s.envelopes + 1 AS sequence,
            s.began + m * s.step AS micros, s.per_envelope, s.apart
        FROM generate_series($1::int8, $2::int8 - 1) AS m, public.scale AS s
    ) AS numbers
) AS e"""


@dataclass(frozen=True, slots=True)
class Job:
    """One table, and how the rows for some numbers are written."""

    table: str
    statement: str


JOBS = (
    Job(
        "identities",
        f"""
INSERT INTO identities (account, key, event_id)
SELECT 'default', key, id {_EVENTS} CROSS JOIN LATERAL unnest(ARRAY[
    'id:evt_' || md5(m::text),
    CASE WHEN type IN ('envelope.viewed', 'envelope.in_progress')
        THEN 'body:1:' || md5(m::text) || md5(id::text)
        ELSE 'once:' || envelope_id || ':' || type END
]) AS key
""",  # of constant parts
    ),
    Job(
        "deliveries",
        f"""
INSERT INTO deliveries (id, event_id, callback, account, envelope_id, sequence, created_at,
    state, due_at, attempts, token, worker, settled_at, last_error, fingerprint)
SELECT delivery_id, id, 'bench', 'default', envelope_id, sequence, at, state,
    CASE state WHEN 'pending' THEN timestamptz '2100-01-01' END, 1, 1, 'bench:1',
    CASE state WHEN 'pending' THEN NULL ELSE at END,
    CASE state WHEN 'dead' THEN 'TimeoutError: nobody answered' END,
    CASE state WHEN 'dead' THEN 'cause-' || which % {CAUSES} END
{_EVENTS}
""",  # of constant parts
    ),
    Job(
        "events",
        f"""
INSERT INTO events (id, account, envelope_id, type, atlas_event_id, occurred_at, received_at,
    sequence, effect, status, version, core_status, key_label)
SELECT id, 'default', envelope_id, type, 'evt_' || md5(m::text), at, at,
    sequence, 'applied', status, sequence, status, 'bench'
{_EVENTS}
""",  # of constant parts
    ),
    Job(
        "attempts",
        f"""
INSERT INTO attempts (delivery_id, token, number, worker, started_at, finished_at, verdict, error)
SELECT delivery_id, 1, 1, 'bench:1', at, at, CASE state WHEN 'done' THEN 'done' ELSE 'failed' END,
    CASE state WHEN 'done' THEN NULL ELSE 'TimeoutError: nobody answered' END
{_EVENTS}
""",  # of constant parts
    ),
    Job(
        "feed",
        f"""
INSERT INTO feed (position, kind, event_id, account, envelope_id, at)
SELECT m + 1, 'event', id, 'default', envelope_id, at {_EVENTS}
""",  # of constant parts
    ),
    Job(
        "terms",
        f"""
INSERT INTO terms (term, account, envelope_id)
SELECT term, 'default', public.envelope(m) {_NUMBERS} CROSS JOIN LATERAL unnest(ARRAY[
    public.envelope(m), 'crm-' || m, 'ref-' || m / 10,
    'ada.' || m || '@example.com', '{PARTY}'
]) AS term
""",  # of constant parts
    ),
    Job(
        "envelopes",
        f"""
INSERT INTO envelopes (account, id, tenant, status, created_at, sent_at, viewed_at, parties,
    signed_count, total, next_signer_email, metadata, external_id, client_reference_id, is_test,
    fields_status, marks, version, sequence, first_seen_at, updated_at)
SELECT 'default', public.envelope(m), 'tenant-' || m % {TENANTS}, status, first, first, first,
    jsonb_build_array(
        jsonb_build_object('email', 'ada.' || m || '@example.com', 'name', 'Ada Lovelace',
            'role', 'Client', 'order', 1, 'status', 'signed'),
        jsonb_build_object('email', '{PARTY}', 'name', 'Charles Babbage',
            'role', 'Provider', 'order', 2,
            'status', CASE status WHEN 'signed' THEN 'signed' ELSE 'waiting' END)),
    CASE status WHEN 'signed' THEN 2 ELSE 1 END, 2, CASE status WHEN 'pending' THEN '{PARTY}' END,
    jsonb_build_object('external_id', 'crm-' || m, 'department', 'onboarding',
        'region', 'eu-central', 'is_test', m % 50 = 0),
    'crm-' || m, 'ref-' || m / 10, m % 50 = 0, 'ready', '{{}}', per_envelope, per_envelope,
    first, last
FROM (
    SELECT m, s.per_envelope, public.status(m) AS status,
        public.moment(s.began + m * s.step) AS first,
        public.moment(s.began + (m + (s.per_envelope - 1) * s.envelopes) * s.step) AS last
    {_NUMBERS}
) AS e
""",  # noqa: S608  # of constant parts
    ),
)
_BODIES = f"""
INSERT INTO bodies (event_id, body)
SELECT id, convert_to(json_build_object('event', type, 'event_id', 'evt_' || md5(m::text),
    'envelope_id', envelope_id, 'status', status)::text, 'UTF8') {_EVENTS}
"""  # of constant parts
# Who follows the feed has seen all of it; the names are theirs (app/upkeep).
FOLLOWERS = ("drift", "terms")
_FOLLOWERS = """
INSERT INTO followers (name, position) SELECT name, $2 FROM unnest($1::text[]) AS name
ON CONFLICT (name) DO UPDATE SET position = excluded.position
"""
# The accounts that there are, are those of the keys.
_KEY = """
INSERT INTO keys (fingerprint, label, account, first_seen_at)
VALUES ('bench', 'bench', 'default', now()) ON CONFLICT DO NOTHING
"""
BEHIND = "SELECT name FROM followers WHERE position = 0 AND EXISTS (SELECT 1 FROM feed)"

_CONSTRAINTS = """
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = $1::regclass AND contype IN ('p', 'u') ORDER BY contype, conname
"""
_INDEXES = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
WHERE indrelid = $1::regclass AND NOT EXISTS (
    SELECT 1 FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u')
) ORDER BY 1
"""


async def fill(url: str, filling: Filling, tell: Tell) -> None:
    """Fill a database that is migrated and empty; `tell` hears of each table how many rows."""
    await subscribe(url, "bench")
    connection = await _connect(url)
    try:
        # The feed is filled here, too: nothing is to be noted for it.
        await connection.execute("ALTER TABLE events DISABLE TRIGGER USER")
        await connection.execute(_FUNCTIONS)
        await connection.execute(_KEY)
        await connection.execute(
            _SCALE, filling.envelopes, filling.events, filling.began, filling.step, SET_ASIDE
        )
        await _fill_tables(url, filling, tell)
        await connection.execute(_BODIES, max(0, filling.events - BODIES), filling.events)
        await connection.execute(_FOLLOWERS, FOLLOWERS, filling.events)
        await connection.execute("ALTER TABLE events ENABLE TRIGGER USER")
        await connection.execute("ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


async def _fill_tables(url: str, filling: Filling, tell: Tell) -> None:
    waiting = list(reversed(JOBS))

    async def work() -> None:
        connection = await _connect(url)
        try:
            while waiting:
                await _fill_table(connection, waiting.pop(), filling, tell)
        finally:
            await connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(work())


async def _fill_table(
    connection: asyncpg.Connection, job: Job, filling: Filling, tell: Tell
) -> None:
    removals, additions = await _access_paths(connection, job.table)
    for statement in removals:
        await connection.execute(statement)
    for first, last in chunks(filling.rows[job.table]):
        await connection.execute(job.statement, first, last)
        tell(job.table, last - first)
    for statement in additions:
        await connection.execute(statement)
    # What autovacuum has done on any database that has been in use for a while.
    await connection.execute(f"VACUUM (ANALYZE) {job.table}")


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Cut the numbers up to `count` into pieces, so that progress shows."""
    for first in range(0, count, CHUNK):
        yield first, min(count, first + CHUNK)


async def _access_paths(
    connection: asyncpg.Connection, table: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Give what takes the indexes of a table away, and what makes them again."""
    constraints = await connection.fetch(_CONSTRAINTS, table)
    indexes = await connection.fetch(_INDEXES, table)
    removals = [f"ALTER TABLE {table} DROP CONSTRAINT {name}" for name, _ in constraints]
    additions = [f"ALTER TABLE {table} ADD CONSTRAINT {name} {what}" for name, what in constraints]
    return (
        [*removals, *(f"DROP INDEX {name}" for name, _ in indexes)],
        [*additions, *(definition for _, definition in indexes)],
    )


async def _connect(url: str) -> asyncpg.Connection:
    settings = {
        "search_path": SCHEMA,
        "maintenance_work_mem": "512MB",
        "max_parallel_maintenance_workers": "0",
        "synchronous_commit": "off",
        "jit": "off",
    }
    return await asyncpg.connect(url, server_settings=settings)
