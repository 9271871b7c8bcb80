"""Add the breaker of each callback, where a signed PDF is kept, and two indexes.

Locks: `callbacks` and `envelopes`, each for the moment that nullable columns take. While an
index is built its table takes no writes: that on `deliveries` has dead letters only, and
`audit` has a row for each act of an operator.
Deploy: before the release. Replicas of the release before go on.

Revision: 20261122_0100, after 20261121_2200.
"""

import sqlalchemy as sa
from alembic import op

revision = "20261122_0100"
down_revision = "20261121_2200"
branch_labels = None
depends_on = None

# The oldest release that can still serve this schema.
MIN_RELEASE = "0.1.0"

# SQLite keeps instants as text that sorts by time.
TIME = sa.DateTime(timezone=True).with_variant(sa.String(), "sqlite")
DEAD = sa.text("state = 'dead'")


def upgrade() -> None:
    """Add columns that the release before does not look at."""
    op.add_column("callbacks", sa.Column("open_until", TIME))
    op.add_column("callbacks", sa.Column("probe_until", TIME))
    op.add_column("envelopes", sa.Column("archived_at", TIME))
    op.add_column("envelopes", sa.Column("archive_name", sa.Text()))
    op.add_column("envelopes", sa.Column("archive_sha256", sa.Text()))
    op.add_column("envelopes", sa.Column("archive_bytes", sa.BigInteger()))
    op.create_index(
        "deliveries_dead_idx",
        "deliveries",
        ["fingerprint", "id"],
        postgresql_where=DEAD,
        sqlite_where=DEAD,
    )
    op.create_index("audit_subject_idx", "audit", ["subject"])


def downgrade() -> None:
    """Take away what `upgrade` added; the archived files stay."""
    op.drop_index("audit_subject_idx", "audit")
    op.drop_index("deliveries_dead_idx", "deliveries")
    for column in ("archive_bytes", "archive_sha256", "archive_name", "archived_at"):
        op.drop_column("envelopes", column)
    op.drop_column("callbacks", "probe_until")
    op.drop_column("callbacks", "open_until")
