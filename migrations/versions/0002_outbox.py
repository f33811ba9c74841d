"""The outbox and what becomes of its events."""

from dovecote.migrations.schema import run_as_owner

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    run_as_owner("0002_outbox.up.sql")


def downgrade() -> None:
    run_as_owner("0002_outbox.down.sql")
