"""Locks of ours that strangers hold."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0013"
down_revision = "dovecote_0012"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
