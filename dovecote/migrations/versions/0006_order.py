"""Order of aggregates: what blocks an event, what is released, what is sent again."""

from dovecote.migrations.files import run_as_owner

revision = "dovecote_0006"
down_revision = "dovecote_0005"


def upgrade() -> None:
    run_as_owner(__file__, "up")


def downgrade() -> None:
    run_as_owner(__file__, "down")
