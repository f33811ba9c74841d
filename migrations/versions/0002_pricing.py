"""Quotes and latest prices."""

from dovecote.migrations.files import run_as_owner

revision = "application_0002"
down_revision = "application_0001"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
