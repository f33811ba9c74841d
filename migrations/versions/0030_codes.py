"""Limits on codes and on wrong answers."""

from dovecote.migrations.schema import run_as_owner

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    run_as_owner("0030_codes.up.sql")


def downgrade() -> None:
    run_as_owner("0030_codes.down.sql")
