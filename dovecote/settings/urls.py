"""URLs of servers: what in them is secret, and how one looks without that.

A password is not only where it belongs. It is given as a parameter, percent-encoded, or as a token in place of a user.
"""

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit

from psycopg.pq import Conninfo

_NAMES = r"[\w.-]{0,40}(?:passw(?:or)?d|passphrase|secret|token|credential|signature|key)s?"
# A parameter of a URL or of a libpq conninfo.
_PARAMETER = re.compile(rf"(?i)(?<![\w.-])(?!sslkey=)({_NAMES})=('[^']*'|[^&\s#'\"]+)")
# Up to the last @: a password may have one in it.
_USER = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]{0,31}://)([^\s\"'<>]{0,4000})@")
_SECRET_NAME = re.compile(rf"(?i){_NAMES}")
# What libpq itself does not show.
_HIDDEN = {option.keyword.decode() for option in Conninfo.get_defaults() if option.dispchar == b"*"} | {
    "scram_client_key",
    "scram_server_key",
}
# Where a user alone is a token; a login of Postgres is none.
_TOKEN_SCHEMES = ("http", "https")


def without_passwords(text: str) -> str:
    """Return the text with *** for the password and the token of every URL in it."""
    return _PARAMETER.sub(r"\1=***", _USER.sub(_without_password, text))


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found[2].partition(":")
    if colon:
        return f"{found[1]}{user}:***@"
    return f"{found[1]}***@" if found[1].lower().startswith(_TOKEN_SCHEMES) else found[0]


def secrets_in(url: str) -> Iterator[str]:
    """Yield every secret of a URL, as it is written and as it is sent."""
    parts = urlsplit(url)
    for pair in parts.query.replace(";", "&").split("&"):
        name, _, value = pair.partition("=")
        if value and (_SECRET_NAME.fullmatch(name) or name in _HIDDEN) and name != "sslkey":
            yield from {value, *(sent for _, sent in parse_qsl(f"x={value}")), unquote(value)}
    user, _, host = parts.netloc.rpartition("@")
    login, colon, password = user.partition(":")
    if host and password:
        yield from {password, unquote(password)}
    if host and login and not colon and parts.scheme in _TOKEN_SCHEMES:
        yield from {login, unquote(login)}


def names_ports(netloc_ports: str) -> bool:
    """Return whether these are numbers of ports, one for each host, with commas between."""
    return all(
        not port or (port.isascii() and port.isdigit() and 0 < int(port) < 65_536) for port in netloc_ports.split(",")
    )
