"""Leadership needs a privilege."""

from dovecote.migrations.schema import run_as_owner

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    run_as_owner("0032_leader_lock.up.sql")


def downgrade() -> None:
    run_as_owner("0032_leader_lock.down.sql")
