"""The only reader of the environment: every option, checked once at start and then passed on.

Which names there are says `model`. It is imported when it is first needed: pydantic and both drivers come with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dovecote.settings.variables import PREFIX, SettingsError

if TYPE_CHECKING:
    from dovecote.settings.model import (
        Relay,
        Settings,
        Telemetry,
        given_variables,
        load_settings,
        options,
        secrets,
        shown,
        without_passwords,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.model"), name)


__all__ = [
    "PREFIX",
    "Relay",
    "Settings",
    "SettingsError",
    "Telemetry",
    "given_variables",
    "load_settings",
    "options",
    "secrets",
    "shown",
    "without_passwords",
]
