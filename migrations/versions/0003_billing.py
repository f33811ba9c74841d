"""Memberships and what was paid for them."""

from dovecote.migrations.schema import run_as_owner

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    run_as_owner("0003_billing.up.sql")


def downgrade() -> None:
    run_as_owner("0003_billing.down.sql")
