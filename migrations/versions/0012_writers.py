"""Functions of the outbox that cost its writers less."""

from dovecote.migrations.schema import run_as_owner

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    run_as_owner("0012_writers.up.sql")


def downgrade() -> None:
    run_as_owner("0012_writers.down.sql")
