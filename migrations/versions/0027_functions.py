"""Functions mean the same whatever the caller's session says."""

from dovecote.migrations.schema import run_as_owner

revision = "0027"
down_revision = "0026"


def upgrade() -> None:
    run_as_owner("0027_functions.up.sql")


def downgrade() -> None:
    run_as_owner("0027_functions.down.sql")
