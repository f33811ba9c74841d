"""Challenges, verified phones, and what was used of codes and answers."""

from dovecote.migrations.files import run_as_owner

revision = "application_0003"
down_revision = "application_0002"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
