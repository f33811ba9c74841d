"""Deliveries whose event is gone."""

from dovecote.migrations.schema import run_as_owner

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    run_as_owner("0026_leftovers.up.sql")


def downgrade() -> None:
    run_as_owner("0026_leftovers.down.sql")
