"""Memberships and their history."""

from dovecote.migrations.files import run_as_owner

revision = "application_0001"
down_revision = None
depends_on = "dovecote_0014"
branch_labels = ("application",)


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
