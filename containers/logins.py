"""Give each process of docker-compose.yml a login of its own with one role of ours. Run by `migrate`, as the owner.

Name and password of a login are those of the URL that its process is handed. Run again, it sets both right: a password
that was renewed, a role that somebody granted by hand.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg import sql

SECRETS = Path("/run/secrets")
ROLES = ("owner", "writer", "worker", "operator", "viewer", "service")


class Login(NamedTuple):
    file: str
    role: str
    sees_activity: bool  # how long other logins' transactions have been open: `status`, `doctor`, the relay's metrics


LOGINS = (
    Login("database_url_relay", "dovecote_worker", sees_activity=True),
    Login("database_url_consumers", "dovecote_worker", sees_activity=False),
    Login("database_url_cli", "dovecote_operator", sees_activity=True),
    Login("database_url_look", "dovecote_viewer", sees_activity=True),
)


def main() -> None:
    owner = Path(os.environ["DATABASE_URL_FILE"]).read_text(encoding="utf-8").strip()
    with psycopg.connect(owner) as connection:
        for login in LOGINS:
            url = urlsplit((SECRETS / login.file).read_text(encoding="utf-8").strip())
            if not url.username or not url.password:
                sys.exit(f"logins: {login.file} lacks a login or password: remove it and run containers/make-secrets.")
            name = unquote(url.username)
            make(connection, name, unquote(url.password), login)
            print(f"logins: {name} is a {login.role}", file=sys.stderr)
        close_to_strangers(connection)


def make(connection: psycopg.Connection, name: str, password: str, login: Login) -> None:
    # Hashed here: neither a log of statements nor pg_stat_activity sees the password itself.
    hashed = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    if connection.execute("select from pg_catalog.pg_roles where rolname = %s", [name]).fetchone() is None:
        run(connection, "create role {}", name)
    run(
        connection,
        "alter role {} login nosuperuser nocreatedb nocreaterole noreplication nobypassrls inherit password {}",
        name,
        literal=hashed,
    )
    wanted = {login.role} | ({"pg_read_all_stats"} if login.sees_activity else set())
    held = connection.execute(
        "select r.rolname from pg_catalog.pg_auth_members m join pg_catalog.pg_roles r on r.oid = m.roleid"
        " where m.member = (select oid from pg_catalog.pg_roles where rolname = %s)",
        [name],
    ).fetchall()
    for (role,) in held:
        if role not in wanted:
            run(connection, "revoke {} from {}", role, name)
    for role in sorted(wanted):
        run(connection, "grant {} to {}", role, name)


def close_to_strangers(connection: psycopg.Connection) -> None:
    """Let into this database only logins that have a role of ours; none may make temporary objects."""
    row = connection.execute("select current_database()").fetchone()
    assert row is not None
    run(connection, "revoke all on database {} from public", row[0])
    for role in ROLES:
        run(connection, "grant connect on database {} to {}", row[0], f"dovecote_{role}")


def run(connection: psycopg.Connection, statement: str, *names: str, literal: str | None = None) -> None:
    parts: list[sql.Composable] = [*map(sql.Identifier, names)]
    if literal is not None:
        parts.append(sql.Literal(literal))
    connection.execute(sql.SQL(statement).format(*parts))  # type: ignore[arg-type]  # only our own statements come here


if __name__ == "__main__":
    main()
