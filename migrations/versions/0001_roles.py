"""Roles: owner, writer, worker, operator."""

from dovecote.migrations.schema import run

revision = "0001"
down_revision = None


def upgrade() -> None:
    run("0001_roles.up.sql")


def downgrade() -> None:
    run("0001_roles.down.sql")
