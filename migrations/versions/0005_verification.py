"""Challenges that prove a phone number, and the numbers proven."""

from dovecote.migrations.schema import run_as_owner

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    run_as_owner("0005_verification.up.sql")


def downgrade() -> None:
    run_as_owner("0005_verification.down.sql")
