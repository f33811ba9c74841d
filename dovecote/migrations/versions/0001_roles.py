"""Roles: owner, writer, service, worker, operator, viewer."""

from dovecote.migrations.files import run

revision = "dovecote_0001"
down_revision = None
branch_labels = ("library",)


def upgrade() -> None:
    run(__file__, "up")


def downgrade() -> None:
    run(__file__, "down")
