"""Changes by operators, each with its line in the audit log."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0007"
down_revision = "dovecote_0006"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
