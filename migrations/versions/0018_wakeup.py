"""A wake-up never fails the transaction that it follows."""

from dovecote.migrations.schema import run_as_owner

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    run_as_owner("0018_wakeup.up.sql")


def downgrade() -> None:
    run_as_owner("0018_wakeup.down.sql")
