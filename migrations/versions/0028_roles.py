"""Roles for looking and for services, and a moment that only the server says."""

from alembic import op

from dovecote.migrations.schema import run, run_as_owner

revision = "0028"
down_revision = "0027"
# The default has written it since the first release; no code of ours gives it.
CONTRACT = "writers no longer have the right to say when an event was written, which none of ours has used"


def upgrade() -> None:
    run("0028_roles.up.sql")
    op.execute("grant select on dovecote.alembic_version to dovecote_viewer")
    run_as_owner("0028_rights.up.sql")


def downgrade() -> None:
    run_as_owner("0028_rights.down.sql")
    op.execute("revoke select on dovecote.alembic_version from dovecote_viewer")
    run("0028_roles.down.sql")
