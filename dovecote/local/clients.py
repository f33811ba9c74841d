"""What lets other programs find our servers as we do: psql by libpq's variables, others by DATABASE_URL and REDIS_URL.

Nothing that the URL says may get lost on the way: a word about TLS that is not handed on is a connection to anybody.
"""

import os
from collections.abc import Mapping

from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from dovecote.local.binaries import ServerError, find_postgres
from dovecote.settings.variables import ALIASES, SettingsError, long_name

_SERVICE = "dovecote"
_SEARCH_PATH = "-c search_path=dovecote,public"


def environment_for_clients(urls: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a program that is to find the system; `urls` are DATABASE_URL and REDIS_URL.

    Errors: SettingsError for what libpq's variables cannot carry.
    """
    # One spelling of each: a nested `dovecote` must not find two.
    others = {name: value for name, value in environ.items() if long_name(name) not in ALIASES.values()}
    return {
        **others,
        **urls,
        **libpq_variables(urls["DATABASE_URL"], environ),
        "PATH": _with_psql(environ.get("PATH", os.defpath)),
    }


def libpq_variables(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return every word of the URL as libpq's variables, and our schema on the search path.

    What has no variable goes into a service file in memory, which the next program inherits by its descriptor.
    Errors: SettingsError where a service is named besides: it would win over all the variables.
    """
    given = {keyword: str(value) for keyword, value in conninfo_to_dict(url).items() if value not in (None, "")}
    names = {option.keyword.decode(): (option.envvar or b"").decode() for option in Conninfo.get_defaults()}
    service = given.pop("service", None)
    if service and given.keys() - {"dbname"}:
        raise SettingsError(
            f"DATABASE_URL names the service {service!r} and says more than that, which psql would take from the "
            "service instead: put all of it into the service or none."
        )
    if environ.get("PGSERVICE") and not service:
        raise SettingsError(
            "PGSERVICE is set beside DATABASE_URL, and psql would believe it first: unset it, or let DATABASE_URL "
            "name the service."
        )
    carried = {names[keyword]: value for keyword, value in given.items() if names[keyword]}
    if service:
        carried["PGSERVICE"] = service
    if rest := {keyword: value for keyword, value in given.items() if not names[keyword]}:
        carried |= _service_with(rest)
    # Theirs comes last and wins.
    theirs = carried.get("PGOPTIONS") or environ.get("PGOPTIONS", "")
    carried["PGOPTIONS"] = f"{_SEARCH_PATH} {theirs}".strip()
    return carried


def _service_with(words: Mapping[str, str]) -> dict[str, str]:
    for keyword, value in words.items():
        if "\n" in value or value != value.strip():
            raise SettingsError(f"DATABASE_URL has a {keyword} that a service file cannot hold: psql would not get it.")
    descriptor = os.memfd_create("dovecote service", 0)  # kept by the program that takes our place
    os.write(descriptor, "".join([f"[{_SERVICE}]\n", *(f"{name}={value}\n" for name, value in words.items())]).encode())
    return {"PGSERVICE": _SERVICE, "PGSERVICEFILE": f"/proc/self/fd/{descriptor}"}


def _with_psql(path: str) -> str:
    """Add the psql of the embedded server behind any other: a machine without Postgres has none."""
    try:
        return f"{path}{os.pathsep}{find_postgres(os.environ).path.parent}"
    except ServerError:
        return path
