"""Is an event in the outbox?"""

from dovecote.migrations.schema import run_as_owner

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    run_as_owner("0024_lookup.up.sql")


def downgrade() -> None:
    run_as_owner("0024_lookup.down.sql")
