"""Which run of Postgres this is, and the history in which Redis was told what it holds."""

from dovecote.migrations.schema import run_as_owner

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    run_as_owner("0023_history.up.sql")


def downgrade() -> None:
    run_as_owner("0023_history.down.sql")
