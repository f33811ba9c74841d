"""The relay reads beside held snapshots, open writers and rolled-back ones at no cost."""

from dovecote.migrations.schema import run_as_owner

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    run_as_owner("0019_reading.up.sql")


def downgrade() -> None:
    run_as_owner("0019_reading.down.sql")
