"""Old weeks: what holds them back, how they are dropped, which are gone."""

from dovecote.migrations.schema import run_as_owner

revision = "0008"
down_revision = "0005"


def upgrade() -> None:
    run_as_owner("0008_retention.up.sql")


def downgrade() -> None:
    run_as_owner("0008_retention.down.sql")
