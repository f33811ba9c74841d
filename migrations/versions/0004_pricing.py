"""Quotes as they came in, and the latest price of each symbol."""

from dovecote.migrations.schema import run_as_owner

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    run_as_owner("0004_pricing.up.sql")


def downgrade() -> None:
    run_as_owner("0004_pricing.down.sql")
