"""Index envelopes and deliveries for every list of the API.

Locks: none that writers wait for; PostgreSQL builds the indexes beside them.
Deploy: before the release. Replicas of the release before go on. Cut off in the middle, it can
be run again: what was left half-built is built anew.

Revision: 20261122_0502, after 20261122_0501.
"""

import sqlalchemy as sa
from alembic import op

revision = "20261122_0502"
down_revision = "20261122_0501"
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

LISTED = ("updated_at", "account", "id")
# Index, table, columns, and which rows it holds.
INDEXES = (
    ("envelopes_status_idx", "envelopes", ("status", *LISTED), None),
    ("envelopes_tenant_idx", "envelopes", ("tenant", *LISTED), "tenant IS NOT NULL"),
    ("envelopes_is_test_idx", "envelopes", ("is_test", *LISTED), "is_test"),
    (
        "envelopes_external_id_idx",
        "envelopes",
        ("external_id", *LISTED),
        "external_id IS NOT NULL",
    ),
    (
        "envelopes_client_reference_id_idx",
        "envelopes",
        ("client_reference_id", *LISTED),
        "client_reference_id IS NOT NULL",
    ),
    ("deliveries_owed_idx", "deliveries", ("id",), "due_at IS NOT NULL"),
    (
        "deliveries_set_aside_idx",
        "deliveries",
        ("state", "id"),
        "state IN ('dead', 'parked', 'discarded')",
    ),
)
BEFORE = (
    ("envelopes_external_id_idx", "envelopes", ("external_id",), "external_id IS NOT NULL"),
    (
        "envelopes_client_reference_id_idx",
        "envelopes",
        ("client_reference_id",),
        "client_reference_id IS NOT NULL",
    ),
)


def upgrade() -> None:
    """Build each index, in place of one of its name."""
    with op.get_context().autocommit_block():
        for index in INDEXES:
            build(*index)


def build(name: str, table: str, columns: tuple[str, ...], rows: str | None) -> None:
    """Build one index beside the writers."""
    where = None if rows is None else sa.text(rows)
    op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
    op.create_index(
        name,
        table,
        list(columns),
        postgresql_where=where,
        sqlite_where=where,
        postgresql_concurrently=True,
    )


def downgrade() -> None:
    """Give back the indexes of the revision before."""
    with op.get_context().autocommit_block():
        for name, table, _, _ in INDEXES:
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        for index in BEFORE:
            build(*index)
