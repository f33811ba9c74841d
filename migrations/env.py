"""Alembic's entry for library and application. The database is DATABASE_URL, or the running `./dev up` system."""

from dovecote.migrations import environment
from migrations.tables import metadata


def _url() -> str:
    from dovecote.settings import load_settings  # only the command line needs it

    return load_settings().database.url.get_secret_value()


environment.migrate(metadata, _url)
