"""Indexes for every listing, an audit log nobody can rewrite, paused handlers."""

from workers.schema import run_as_owner

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    run_as_owner("0009_operators.up.sql")


def downgrade() -> None:
    run_as_owner("0009_operators.down.sql")
