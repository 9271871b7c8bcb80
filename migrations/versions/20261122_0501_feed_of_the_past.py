"""Note the events that were recorded before there was a feed.

Locks: none that writers wait for.
Deploy: before the release. Replicas of the release before go on.

Revision: 20261122_0501, after 20261122_0500.
"""

from alembic import op

revision = "20261122_0501"
down_revision = "20261122_0500"
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

# By the time of receipt; of one envelope none before one that has a smaller sequence. Their ids
# lie below zero, before those that the trigger has given since.
PAST = """
INSERT INTO changes (id, kind, event_id, account, envelope_id, at)
SELECT row_number() OVER (ORDER BY place, sequence) - count(*) OVER (),
    'event', id, account, envelope_id, {now}
FROM (
    SELECT id, account, envelope_id, sequence, CASE WHEN sequence IS NULL THEN {id} ELSE
        max({id}) OVER (PARTITION BY account, envelope_id, sequence IS NULL ORDER BY sequence)
        END AS place
    FROM events
) AS past
WHERE NOT EXISTS (SELECT 1 FROM changes noted WHERE noted.event_id = past.id)
  AND NOT EXISTS (SELECT 1 FROM feed placed WHERE placed.event_id = past.id)
"""


def upgrade() -> None:
    """Note what the trigger has not seen."""
    if op.get_bind().dialect.name == "sqlite":
        past = PAST.format(now="strftime('%Y-%m-%d %H:%M:%f000', 'now')", id="id")
    else:
        past = PAST.format(now="statement_timestamp()", id="id::text")
    op.execute(past)


def downgrade() -> None:
    """Leave what was noted: the table goes with the revision before."""
