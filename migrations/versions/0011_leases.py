"""Leases of retries, which a relay can end."""

from dovecote.migrations.schema import run_as_owner

revision = "0011"
down_revision = "0009"


def upgrade() -> None:
    run_as_owner("0011_leases.up.sql")


def downgrade() -> None:
    run_as_owner("0011_leases.down.sql")
