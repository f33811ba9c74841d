"""Run the SQL files of a revision: `versions/0002_outbox.py` has `sql/0002_outbox.up.sql` and `.down.sql`."""

from pathlib import Path

from alembic import op

OWNER = "dovecote_owner"


def run(revision: str, direction: str) -> None:
    """Run a file as the migrating login. `revision`: the revision's `__file__`; `direction`: up or down."""
    path = Path(revision)
    _execute((path.parents[1] / "sql" / f"{path.stem}.{direction}.sql").read_text())


def run_as_owner(revision: str, direction: str) -> None:
    """Run a file so that what it creates belongs to dovecote_owner."""
    _execute(f"set local role {OWNER}")
    run(revision, direction)
    _execute("reset role")


def _execute(sql: str) -> None:
    # Without parameters psycopg sends the file as one script, and a % or a colon in it is just itself.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(sql)
