"""Checks of what travels between us and the servers: can others on the way read it, or be the server?"""

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import psycopg

from dovecote.operations.doctor.finding import Finding, ok, warning

_VERIFIED = ("verify-full", "verify-ca")
_POSTGRES_ADVICE = (
    "Put ?sslmode=verify-full into DATABASE_URL, with sslrootcert=<file of the CA> or sslrootcert=system, and let "
    "Postgres have a certificate (ssl = on)."
)
_REDIS_ADVICE = (
    "Let the URL begin with rediss://, with ?ssl_ca_certs=<file of the CA> unless the system knows it, and take out "
    "what turns verification off."
)


def postgres(connection: psycopg.Connection[Any]) -> Finding:
    """Examine this session itself: the URL may allow less than was negotiated."""
    info = connection.info
    if info.host.startswith(("/", "@")):
        return ok("postgres.encrypted", "a socket of this machine")
    if _is_loopback(info.hostaddr or info.host):
        return ok("postgres.encrypted", "on the loopback of this machine")
    described = {option.keyword: (option.val or b"").decode() for option in connection.pgconn.info}
    # Behind a pooler the server's session is another one; both ways have to be encrypted.
    row = connection.execute(
        "select coalesce((select ssl from pg_catalog.pg_stat_ssl where pid = pg_catalog.pg_backend_pid()), false)"
        " as has_tls,"
        " coalesce((select encrypted from pg_catalog.pg_stat_gssapi where pid = pg_catalog.pg_backend_pid()), false)"
        " as has_gss"
    ).fetchone()
    has_tls, has_gss = (bool(row[0]), bool(row[1])) if row else (False, False)
    if has_gss:
        return ok("postgres.encrypted", "by GSSAPI")
    if not connection.pgconn.ssl_in_use or not has_tls:
        where = "to the server" if not connection.pgconn.ssl_in_use else "from a pooler to the server"
        found = f"not encrypted {where}: anybody on the network path reads and changes everything"
        return warning("postgres.encrypted", found, _POSTGRES_ADVICE)
    mode, binding = described.get(b"sslmode", ""), described.get(b"channel_binding", "")
    if mode in _VERIFIED or binding == "require":
        return ok("postgres.encrypted", f"TLS, sslmode={mode}{', channel_binding=require' * (binding == 'require')}")
    found = f"TLS, but sslmode={mode} takes any server for ours, and the next connection may have no TLS at all"
    return warning("postgres.encrypted", found, _POSTGRES_ADVICE)


def redis(clients: Mapping[str, Any]) -> Finding:
    """Judge the connections of these clients, by the variable that names the server."""
    described = {variable: _redis(client.connection_pool) for variable, client in clients.items()}
    wrong = [f"{variable}: {found}" for variable, (is_safe, found) in described.items() if not is_safe]
    if wrong:
        return warning("redis.encrypted", "; ".join(wrong), _REDIS_ADVICE)
    return ok("redis.encrypted", "; ".join(dict.fromkeys(found for _, found in described.values())))


def _redis(pool: Any) -> tuple[bool, str]:
    connection = pool.make_connection()  # it is not opened
    if getattr(connection, "path", ""):
        return True, "a socket of this machine"
    if _is_loopback(connection.host):
        return True, "on the loopback of this machine"
    requirements = getattr(connection, "cert_reqs", None)
    if requirements is None:
        return False, "not encrypted: anybody on the network path reads and changes everything"
    # By the value of ssl.CERT_REQUIRED: kept as a text or as that.
    if str(requirements).lower().removeprefix("verifymode.cert_") not in ("required", "2") or not getattr(
        connection, "check_hostname", True
    ):
        return False, "TLS, but any server is taken for ours"
    return True, "TLS, verified"


def _is_loopback(host: str) -> bool:
    """Return whether all addresses of the host are this machine's own; one that cannot be found is not."""
    try:
        found = {str(address[4][0]) for address in socket.getaddrinfo(host, None)}
        return bool(found) and all(ip_address(address.partition("%")[0]).is_loopback for address in found)
    except (OSError, ValueError):
        return False
