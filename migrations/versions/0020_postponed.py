"""What is left for later: handlers whose queue is full, and where a new handler begins."""

from dovecote.migrations.schema import run_as_owner

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    run_as_owner("0020_postponed.up.sql")


def downgrade() -> None:
    run_as_owner("0020_postponed.down.sql")
