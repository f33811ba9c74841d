"""Indexes for every listing, an audit log nobody can rewrite, paused handlers."""

from dovecote.migrations.schema import run_as_owner

revision = "0009"
down_revision = "0008"
# The dropped index has a successor in the same transaction, and before this nobody wrote to the audit log.
CONTRACT = "two indexes do what the one did; nobody needed the right to insert whole audit rows"


def upgrade() -> None:
    run_as_owner("0009_operators.up.sql")


def downgrade() -> None:
    run_as_owner("0009_operators.down.sql")
