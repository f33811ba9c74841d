"""Waiting events are released one bundle at a time."""

from workers.schema import run_as_owner

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    run_as_owner("0020_releasing.up.sql")


def downgrade() -> None:
    run_as_owner("0020_releasing.down.sql")
