"""Operators pause and resume handlers."""

from dovecote.migrations.schema import run_as_owner

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    run_as_owner("0016_pauses.up.sql")


def downgrade() -> None:
    run_as_owner("0016_pauses.down.sql")
