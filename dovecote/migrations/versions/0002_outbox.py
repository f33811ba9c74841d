"""The outbox, and what writers pay for."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0002"
down_revision = "dovecote_0001"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
