"""Create every table of the service.

Locks: none that anybody waits for; the tables are new.
Deploy: before the release.

Revision: 20261121_2200, the first.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261121_2200"
down_revision = None
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

# SQLite keeps instants as text that sorts by time.
TIME = sa.DateTime(timezone=True).with_variant(sa.String(), "sqlite")
DOCUMENT = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
OWED = sa.text("due_at IS NOT NULL")


def upgrade() -> None:
    """Create the tables in the order in which a webhook meets them."""
    create_identities()
    create_events()
    create_envelopes()
    create_deliveries()
    create_callbacks()
    create_upkeep()


def create_identities() -> None:
    """Keys of the sender, and the identities that events claim."""
    op.create_table(
        "keys",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("last_match_at", TIME),
        sa.PrimaryKeyConstraint("fingerprint", name="keys_pkey"),
    )
    op.create_table(
        "identities",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("account", "key", name="identities_pkey"),
    )


def create_events() -> None:
    """Events, and their bytes apart, so that the bytes can be pruned."""
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text()),
        sa.Column("type", sa.Text()),
        sa.Column("atlas_event_id", sa.Text()),
        sa.Column("occurred_at", TIME),
        sa.Column("received_at", TIME, nullable=False),
        sa.Column("sequence", sa.BigInteger()),
        sa.Column("effect", sa.Text(), nullable=False),
        sa.Column("status", sa.Text()),
        sa.Column("version", sa.BigInteger()),
        sa.Column("core_status", sa.Text()),
        sa.Column("core_reason", sa.Text()),
        sa.Column("content", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("degraded", DOCUMENT),
        sa.Column("original_id", sa.Uuid()),
        sa.Column("copies", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_copy_at", TIME),
        sa.Column("key_label", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="events_pkey"),
    )
    op.create_index("events_envelope_idx", "events", ["account", "envelope_id", "sequence"])
    op.create_table(
        "bodies",
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="bodies_pkey"),
    )


def create_envelopes() -> None:
    """The row that other services ask for."""
    op.create_table(
        "envelopes",
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text()),
        sa.Column("status", sa.Text()),
        sa.Column("status_word", sa.Text()),
        sa.Column("disputed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", TIME),
        sa.Column("sent_at", TIME),
        sa.Column("viewed_at", TIME),
        sa.Column("signed_at", TIME),
        sa.Column("declined_at", TIME),
        sa.Column("voided_at", TIME),
        sa.Column("expired_at", TIME),
        sa.Column("extracted_at", TIME),
        sa.Column("parties", DOCUMENT),
        sa.Column("signed_count", sa.Integer()),
        sa.Column("total", sa.Integer()),
        sa.Column("next_signer_email", sa.Text()),
        sa.Column("metadata", DOCUMENT),
        sa.Column("external_id", sa.Text()),
        sa.Column("client_reference_id", sa.Text()),
        sa.Column("is_test", sa.Boolean()),
        sa.Column("send_error", sa.Text()),
        sa.Column("detection_error", sa.Text()),
        sa.Column("fields_status", sa.Text()),
        sa.Column("fields_version", sa.Integer()),
        sa.Column("extraction", DOCUMENT),
        sa.Column("decline_reason", sa.Text()),
        sa.Column("void_reason", sa.Text()),
        sa.Column("marks", DOCUMENT, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("erased_at", TIME),
        sa.PrimaryKeyConstraint("account", "id", name="envelopes_pkey"),
    )
    op.create_index("envelopes_updated_at_idx", "envelopes", ["updated_at", "account", "id"])
    for column in ("external_id", "client_reference_id"):
        present = sa.text(f"{column} IS NOT NULL")
        op.create_index(
            f"envelopes_{column}_idx",
            "envelopes",
            [column],
            postgresql_where=present,
            sqlite_where=present,
        )


def create_deliveries() -> None:
    """What is owed to whom, and every try."""
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("callback", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text()),
        sa.Column("sequence", sa.BigInteger()),
        sa.Column("state", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("due_at", TIME),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("spent", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("token", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("last_error", sa.Text()),
        sa.Column("fingerprint", sa.Text()),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("settled_at", TIME),
        sa.PrimaryKeyConstraint("id", name="deliveries_pkey"),
        sa.UniqueConstraint(
            "event_id", "callback", "generation", name="deliveries_event_id_callback_generation_key"
        ),
    )
    op.create_index(
        "deliveries_due_idx",
        "deliveries",
        ["callback", "due_at"],
        postgresql_where=OWED,
        sqlite_where=OWED,
    )
    op.create_index(
        "deliveries_order_idx",
        "deliveries",
        ["callback", "account", "envelope_id", "sequence"],
        postgresql_where=OWED,
        sqlite_where=OWED,
    )
    unsettled = sa.text("state IN ('dead', 'parked')")
    op.create_index(
        "deliveries_unsettled_idx",
        "deliveries",
        ["state", "callback"],
        postgresql_where=unsettled,
        sqlite_where=unsettled,
    )
    op.create_table(
        "attempts",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME, nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("delivery_id", "token", name="attempts_pkey"),
    )


def create_callbacks() -> None:
    """Who is owed an event."""
    op.create_table(
        "callbacks",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("patterns", DOCUMENT, nullable=False),
        sa.Column("account", sa.Text()),
        sa.Column("options", DOCUMENT, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("first_seen_at", TIME, nullable=False),
        sa.Column("last_seen_at", TIME, nullable=False),
        sa.Column("swept_at", TIME, nullable=False),
        sa.Column("paused_at", TIME),
        sa.Column("breaker", DOCUMENT),
        sa.PrimaryKeyConstraint("name", name="callbacks_pkey"),
    )


def create_upkeep() -> None:
    """Leases, the change feed, the audit trail, and which releases may serve this schema."""
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="leases_pkey"),
    )
    op.create_table(
        "feed",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Uuid()),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("envelope_id", sa.Text()),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("position", name="feed_pkey"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("details", DOCUMENT),
        sa.PrimaryKeyConstraint("id", name="audit_pkey"),
    )
    op.create_index("audit_at_idx", "audit", ["at"])
    op.create_table(
        "releases",
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("min_release", sa.Text(), nullable=False),
        sa.Column("migrated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="releases_pkey"),
    )


def downgrade() -> None:
    """Drop every table; what they hold is gone."""
    for table in (
        "releases",
        "audit",
        "feed",
        "leases",
        "callbacks",
        "attempts",
        "deliveries",
        "envelopes",
        "bodies",
        "events",
        "identities",
        "keys",
    ):
        op.drop_table(table)
