"""Roles for looking and for services."""

from workers.schema import run

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    run("0028_roles.up.sql")


def downgrade() -> None:
    run("0028_roles.down.sql")
