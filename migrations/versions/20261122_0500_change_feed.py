"""Note every new event for the change feed, and add what follows it and what lists need.

Locks: `events`, for the moment that a trigger takes; the tables are new.
Deploy: before the release. Replicas of the release before go on; the trigger notes their
events, too.

Revision: 20261122_0500, after 20261122_0100.
"""

import sqlalchemy as sa
from alembic import op

revision = "20261122_0500"
down_revision = "20261122_0100"
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

# SQLite keeps instants as text that sorts by time.
TIME = sa.DateTime(timezone=True).with_variant(sa.String(), "sqlite")
OWED = sa.text("due_at IS NOT NULL")

# Once for each statement: a batch of events costs one insert.
POSTGRESQL_FUNCTION = """
CREATE FUNCTION "{schema}".note_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO "{schema}".changes (kind, event_id, account, envelope_id, at)
    SELECT 'event', id, account, envelope_id, statement_timestamp() FROM added;
    RETURN NULL;
END $$
"""
POSTGRESQL_TRIGGER = """
CREATE TRIGGER events_noted AFTER INSERT ON events
REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION note_events()
"""
SQLITE_TRIGGER = """
CREATE TRIGGER events_noted AFTER INSERT ON events BEGIN
    INSERT INTO changes (kind, event_id, account, envelope_id, at)
    VALUES ('event', NEW.id, NEW.account, NEW.envelope_id,
        strftime('%Y-%m-%d %H:%M:%f000', 'now'));
END
"""


def upgrade() -> None:
    """Create the tables, and then the trigger that fills the first of them."""
    create_feed()
    create_lists()
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        op.execute(SQLITE_TRIGGER)
    else:
        schema = connection.execute(sa.text("SELECT current_schema()")).scalar_one()
        op.execute(POSTGRESQL_FUNCTION.format(schema=schema))
        op.execute(POSTGRESQL_TRIGGER)


def create_feed() -> None:
    """What has no place in the feed yet, and who follows it."""
    op.create_table(
        "changes",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Uuid()),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text()),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="changes_pkey"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "followers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="followers_pkey"),
    )


def create_lists() -> None:
    """What envelopes are found by, what is expected, what was counted and learned."""
    op.create_table(
        "terms",
        sa.Column(
            "term",
            sa.Text().with_variant(sa.Text(collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("term", "account", "envelope_id", name="terms_pkey"),
    )
    op.create_index("terms_account_envelope_id_idx", "terms", ["account", "envelope_id"])
    op.create_table(
        "expectations",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("due_at", TIME),
        sa.Column("silent_at", TIME),
        sa.PrimaryKeyConstraint("account", "envelope_id", name="expectations_pkey"),
    )
    op.create_index(
        "expectations_due_idx",
        "expectations",
        ["due_at"],
        postgresql_where=OWED,
        sqlite_where=OWED,
    )
    op.create_table(
        "shapes",
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("type", "kind", "path", name="shapes_pkey"),
    )
    op.create_table(
        "tallies",
        sa.Column("at", TIME, nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("at", "account", "name", "label", name="tallies_pkey"),
    )


def downgrade() -> None:
    """Take away what `upgrade` added; the feed keeps the places that it gave."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER events_noted")
    else:
        op.execute("DROP TRIGGER events_noted ON events")
        op.execute("DROP FUNCTION note_events()")
    for table in ("tallies", "shapes", "expectations", "terms", "followers", "changes"):
        op.drop_table(table)
