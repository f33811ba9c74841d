"""The table of commands: what it says without importing them is what they say themselves."""

import subprocess
import sys

from dovecote.cli.commands import COMMANDS, _registered_by

HEAVY = {"sqlalchemy", "psycopg", "redis", "dramatiq", "alembic", "pydantic_settings", "opentelemetry", "structlog"}


def test_each_command_s_line_is_its_own() -> None:
    found = {
        name: (command.help or "").split("\n\n")[0].replace("\n", " ")
        for module in sorted({entry.module for entry in COMMANDS.values()})
        for name, command in _registered_by(f"dovecote.cli.{module}").items()
    }

    assert found == {name: entry.help for name, entry in COMMANDS.items()}


def test_help_imports_nothing_that_help_does_not_need() -> None:
    script = f"""
import contextlib, io, sys
from dovecote.cli import app
for words in (["--help"], ["status", "--help"], ["deliveries", "list", "--help"], ["replay", "start", "--help"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        app(words)
print(sorted({HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}}))
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "DOVECOTE_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_public_functions_are_found_whatever_was_imported_before() -> None:
    for first in ("import dovecote.unit_of_work", "import dovecote"):
        script = f"{first}\nfrom dovecote import unit_of_work, Event\nassert callable(unit_of_work), unit_of_work"
        subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there() -> None:
    import dovecote

    assert all(getattr(dovecote, name) is not None for name in dovecote.__all__)
    assert set(dovecote.__all__) <= set(dir(dovecote))
