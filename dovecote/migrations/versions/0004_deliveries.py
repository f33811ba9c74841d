"""What became of the events, handler by handler."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0004"
down_revision = "dovecote_0003"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
