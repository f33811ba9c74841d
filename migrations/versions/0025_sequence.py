"""Positions that are handed out in order, and the cure where they were not."""

from dovecote.migrations.schema import run_as_owner

revision = "0025"
down_revision = "0024"


def upgrade() -> None:
    run_as_owner("0025_sequence.up.sql")


def downgrade() -> None:
    run_as_owner("0025_sequence.down.sql")
