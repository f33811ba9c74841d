"""Which types were routed by whom; and processes may see how far the schema is."""

from alembic import op

from dovecote.migrations.schema import run_as_owner

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    # Alembic's own table belongs to the login that migrates.
    op.execute("grant select on dovecote.alembic_version to dovecote_worker, dovecote_operator")
    run_as_owner("0014_routing.up.sql")


def downgrade() -> None:
    run_as_owner("0014_routing.down.sql")
    op.execute("revoke select on dovecote.alembic_version from dovecote_worker, dovecote_operator")
