"""Waiting events are released one bundle at a time."""

from dovecote.migrations.schema import run_as_owner

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    run_as_owner("0021_releasing.up.sql")


def downgrade() -> None:
    run_as_owner("0021_releasing.down.sql")
