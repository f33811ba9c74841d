"""Logins of a test's own, each with one of our roles, as a cluster has them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import make_url

#: The login of each name: a writer that has a schema of its own, as every service has, and one that has no role.
ROLES: Mapping[str, str | None] = {
    "writer": "dovecote_writer",
    "worker": "dovecote_worker",
    "operator": "dovecote_operator",
    "viewer": "dovecote_viewer",
    "service": "dovecote_service",
    "stranger": None,
}


@contextmanager
def logins(database_url: str) -> Iterator[Mapping[str, str]]:
    """Give a URL for each of ROLES, and `owner`'s as it was given; the writer owns the schema `shop`."""
    suffix, urls = uuid4().hex[:8], {"owner": database_url}
    with psycopg.connect(database_url, autocommit=True) as owner:
        for name, role in ROLES.items():
            login = f"{name}_{suffix}"
            owner.execute(sql.SQL("create role {} login password 'pw'").format(sql.Identifier(login)))
            if role is not None:
                owner.execute(sql.SQL("grant {} to {}").format(sql.Identifier(role), sql.Identifier(login)))
            urls[name] = make_url(database_url).set(username=login, password="pw").render_as_string(hide_password=False)
        owner.execute(sql.SQL("create schema shop authorization {}").format(sql.Identifier(f"writer_{suffix}")))
    try:
        yield urls
    finally:
        with psycopg.connect(database_url, autocommit=True) as owner:
            for name in ROLES:
                doomed = sql.Identifier(f"{name}_{suffix}")
                owner.execute(sql.SQL("drop owned by {} cascade; drop role {}").format(doomed, doomed))
