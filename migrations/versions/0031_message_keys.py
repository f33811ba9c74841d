"""The keys that sign messages."""

from dovecote.migrations.schema import run_as_owner

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    run_as_owner("0031_message_keys.up.sql")


def downgrade() -> None:
    run_as_owner("0031_message_keys.down.sql")
