"""Which application this process belongs to: DOVECOTE_APP, or that of the running local system."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from dovecote.processes.state_directory import StateDirectory
from dovecote.route import Dovecote
from dovecote.settings.variables import SettingsError, dotenv

VARIABLE = "DOVECOTE_APP"
#: What `dovecote up` runs where none is named.
BUILT_IN_APP = "dovecote.local.demo:app"


def app_name(environ: Mapping[str, str] | None = None, directory: Path | None = None) -> str | None:
    """Return what DOVECOTE_APP names: in the environment, in `.env`, or in the running `dovecote up`. None without."""
    environ = os.environ if environ is None else environ
    named = environ.get(VARIABLE) or dotenv((directory or Path.cwd()) / ".env").get(VARIABLE)
    if not named and (system := StateDirectory.locate(environ).running()):
        named = system.environment.get(VARIABLE)
    return named or None


def find_app(environ: Mapping[str, str] | None = None, directory: Path | None = None) -> Dovecote:
    """Import the app object that DOVECOTE_APP names.

    Errors: SettingsError where it is not given, cannot be imported, or is no Dovecote.
    """
    named = app_name(environ, directory)
    if named is None:
        raise SettingsError(f"{VARIABLE} is missing: it wants where the app object is, as package.module:name.")
    return load_app(named)


def load_app(named: str) -> Dovecote:
    """Import `package.module:name`.

    Errors: SettingsError where it cannot be imported, or is no Dovecote.
    """
    module, _, name = named.partition(":")
    wrong = f"{VARIABLE} got {named[:200]!r}, but wants where the app object is, as package.module:name"
    if not module or not name:
        raise SettingsError(f"{wrong}.")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"{wrong}: {error}.") from error
    if not isinstance(found, Dovecote):
        raise SettingsError(f"{wrong}: that is a {type(found).__name__}.")
    return found
