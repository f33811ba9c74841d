"""The list of commands says what each command says of itself, and neither it nor a command's help imports a server."""

import subprocess
import sys
from pathlib import Path

import pytest

from dovecote.cli import commands
from dovecote.local.demo import app as demo
from dovecote.route import Command
from workers.app import app as application

SLOW = ("alembic", "domain", "dramatiq", "opentelemetry", "phonenumbers", "psycopg", "redis", "sqlalchemy", "structlog")
PROGRAM = f"""
import sys
sys.orig_argv = ["python", "-m", "dovecote"]
from dovecote.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("imported:", [name for name in {SLOW!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("name", "listed"),
    [entry for some in (commands.COMMANDS, application.commands, demo.commands) for entry in some.items()],
)
def test_the_list_says_of_a_command_what_the_command_says_of_itself(name: str, listed: Command) -> None:

    described = commands.load(name, listed).help

    assert described is not None
    assert described.splitlines()[0] == listed.help


@pytest.mark.parametrize("app", [{"DOVECOTE_APP": "workers.app:app"}, {}], ids=["workers.app:app", "built-in"])
@pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["deliveries", "retry", "--help"]], ids=" ".join)
def test_help_imports_neither_servers_drivers_nor_the_application(
    words: list[str], app: dict[str, str], tmp_path: Path
) -> None:
    environment = {**app, "DOVECOTE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, env=environment, timeout=120
    )

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert "Usage: " in done.stdout
