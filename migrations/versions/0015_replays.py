"""Replays that run in the relay, and deliveries that remember theirs."""

from alembic import op

from dovecote.migrations.schema import run_as_owner

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    run_as_owner("0015_replays.up.sql")
    # `dovecote doctor` says whether the schema is up to date. The table belongs to the login that migrates.
    op.execute("grant select on dovecote.alembic_version to dovecote_worker, dovecote_operator")


def downgrade() -> None:
    op.execute("revoke select on dovecote.alembic_version from dovecote_worker, dovecote_operator")
    run_as_owner("0015_replays.down.sql")
