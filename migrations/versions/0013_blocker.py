"""Who must be done first: the last one before that was not discarded."""

from dovecote.migrations.schema import run_as_owner

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    run_as_owner("0013_blocker.up.sql")


def downgrade() -> None:
    run_as_owner("0013_blocker.down.sql")
