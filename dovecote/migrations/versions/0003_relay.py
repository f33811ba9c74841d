"""What the relay keeps, reads, asks and sends."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0003"
down_revision = "dovecote_0002"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
