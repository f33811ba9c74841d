"""Operators' verbs write their own audit lines."""

from workers.schema import run_as_owner

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    run_as_owner("0029_operators.up.sql")


def downgrade() -> None:
    run_as_owner("0029_operators.down.sql")
