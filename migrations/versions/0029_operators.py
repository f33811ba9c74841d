"""Operators' verbs write their own audit lines."""

from dovecote.migrations.schema import run_as_owner

revision = "0029"
down_revision = "0028"

CONTRACT = "only an operator's commands used these rights; nothing was released, and relay and consumers keep theirs"


def upgrade() -> None:
    run_as_owner("0029_operators_audit.up.sql")
    run_as_owner("0029_operators_deliveries.up.sql")
    run_as_owner("0029_operators_replays.up.sql")
    run_as_owner("0029_operators_rights.up.sql")


def downgrade() -> None:
    run_as_owner("0029_operators.down.sql")
