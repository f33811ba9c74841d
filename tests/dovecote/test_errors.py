"""Every public exception of the library has one root."""

import importlib
import pkgutil

import dovecote
from dovecote.consumer.time_limits import CutOff
from dovecote.errors import DovecoteError, EventsDropped

# The reasons are in dovecote.errors: what no handler may catch, and a warning.
OTHERS = {CutOff, EventsDropped}


def test_every_public_exception_derives_from_the_one_root() -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(dovecote.__path__, "dovecote.")
        # What Alembic runs, and what runs the command line, is not for importing.
        if not found.name.startswith(("dovecote.migrations.versions", "dovecote.migrations.env", "dovecote.__main__"))
    ]
    public = {
        one
        for module in modules
        for name, one in vars(module).items()
        if isinstance(one, type) and issubclass(one, BaseException) and not name.startswith("_")
        if one.__module__.startswith("dovecote.")
    }

    assert len(public) > 40
    assert {one for one in public - OTHERS if not issubclass(one, DovecoteError)} == set()
