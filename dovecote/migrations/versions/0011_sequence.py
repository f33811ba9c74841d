"""Positions in order, and the cure where they are not."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0011"
down_revision = "dovecote_0010"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
