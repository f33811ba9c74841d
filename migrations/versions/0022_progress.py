"""How far each handler is: its low-water mark, and what is open above it."""

from dovecote.migrations.schema import run_as_owner

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    run_as_owner("0022_progress.up.sql")


def downgrade() -> None:
    run_as_owner("0022_progress.down.sql")
