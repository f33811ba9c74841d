"""What the columns mean that people query."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0014"
down_revision = "dovecote_0013"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
