"""Alembic's entry for the library's branch alone. The database is `sqlalchemy.url` of the configuration."""

from alembic import context

from dovecote.migrations import environment
from dovecote.migrations.tables import metadata


def _url() -> str:
    url = context.config.get_main_option("sqlalchemy.url")
    if not url:
        raise SystemExit("set sqlalchemy.url to the database that is to be migrated")
    return url


environment.migrate(metadata, _url)
