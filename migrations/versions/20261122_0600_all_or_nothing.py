"""Let one statement write a whole batch, or refuse it.

Locks: none; a function and some row types are new.
Deploy: before the release. Replicas of the release before do not use them.

Revision: 20261122_0600, after 20261122_0502.
"""

import sqlalchemy as sa
from alembic import op

revision = "20261122_0600"
down_revision = "20261122_0502"
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

# The error is the one that PostgreSQL itself has for this: who sees it tries again.
POSTGRESQL_FUNCTION = """
CREATE FUNCTION "{schema}".insist(is_so boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF is_so IS NOT TRUE THEN
        RAISE EXCEPTION 'what this batch was made of has changed meanwhile'
            USING ERRCODE = 'serialization_failure';
    END IF;
END $$
"""

# Rows as they come in; documents are text until they are stored. A release that brings more
# columns brings types of its own.
POSTGRESQL_TYPES = {
    "incoming_identity": "account text, key text, event_id uuid",
    "incoming_event": """id uuid, account text, envelope_id text, type text,
        atlas_event_id text, occurred_at timestamptz, received_at timestamptz, sequence int8,
        effect text, status text, version int8, core_status text, core_reason text,
        content text, reason text, degraded text, original_id uuid, key_label text""",
    "incoming_body": "event_id uuid, body bytea",
    "incoming_envelope": """account text, id text, version int8, sequence int8,
        first_seen_at timestamptz, updated_at timestamptz, erased_at timestamptz, status text,
        status_word text, disputed bool, tenant text, created_at timestamptz,
        sent_at timestamptz, viewed_at timestamptz, signed_at timestamptz,
        declined_at timestamptz, voided_at timestamptz, expired_at timestamptz,
        extracted_at timestamptz, parties text, signed_count int4, total int4,
        next_signer_email text, metadata text, external_id text, client_reference_id text,
        is_test bool, send_error text, detection_error text, fields_status text,
        fields_version int4, extraction text, decline_reason text, void_reason text,
        marks text, version_read int8""",
    "incoming_delivery": """id uuid, event_id uuid, callback text, account text,
        envelope_id text, sequence int8""",
}


def upgrade() -> None:
    """Create the function by which a statement undoes itself, and the types of its rows."""
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        schema = connection.execute(sa.text("SELECT current_schema()")).scalar_one()
        op.execute(POSTGRESQL_FUNCTION.format(schema=schema))
        for name, attributes in POSTGRESQL_TYPES.items():
            op.execute(f'CREATE TYPE "{schema}".{name} AS ({attributes})')


def downgrade() -> None:
    """Drop the types and the function."""
    if op.get_bind().dialect.name != "sqlite":
        for name in reversed(POSTGRESQL_TYPES):
            op.execute(f"DROP TYPE {name}")
        op.execute("DROP FUNCTION insist(boolean)")
