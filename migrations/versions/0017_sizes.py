"""Sizes are limited in the form that is worked with: JSON text."""

from dovecote.migrations.schema import run_as_owner

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    run_as_owner("0017_sizes.up.sql")


def downgrade() -> None:
    run_as_owner("0017_sizes.down.sql")
