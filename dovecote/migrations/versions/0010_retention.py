"""Old weeks are dropped."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0010"
down_revision = "dovecote_0009"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
