"""Revisions are read from their files, without Alembic, as Alembic reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from dovecote.migrations import schema
from dovecote.migrations.revisions import SchemaError, pending_for, revisions
from tests.support.migrations import LOCATIONS

# What no relay and no process of consumers needs: the first would cost each of them 9 MB.
NEEDLESS = ("alembic", "mako", "opentelemetry.exporter", "cryptography.hazmat", "phonenumbers", "typer")


def as_alembic(heads: tuple[str, ...], locations: tuple[Path, ...]) -> list[str]:
    script = ScriptDirectory.from_config(schema._config(locations))
    return [one.revision for one in script.iterate_revisions("heads", heads, implicit_base=True)][::-1]


@pytest.mark.parametrize("locations", [(), LOCATIONS], ids=["library", "application"])
def test_they_are_those_of_alembic_in_its_order(locations: tuple[Path, ...]) -> None:
    assert revisions(locations=locations) == as_alembic((), locations)


def test_what_is_pending_is_what_alembic_would_apply(tmp_path: Path) -> None:
    for name in ((), *((one,) for one in revisions(locations=LOCATIONS))):
        assert pending_for(name, locations=LOCATIONS) == as_alembic(name, LOCATIONS), name

    # Two heads, of an application that stands on an early revision of the library.
    library = revisions(locations=())
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "one.py").write_text(
        f'revision, down_revision, depends_on = "one", None, "{library[2]}"\n'
        'branch_labels = ("application",)\ndef upgrade(): ...\ndef downgrade(): ...\n'
    )
    (tmp_path / "versions" / "two.py").write_text('revision, down_revision = "two", "one"\n')
    for heads in (("one",), *((name, "one") for name in library[3:])):
        assert set(pending_for(heads, locations=(tmp_path,))) == set(as_alembic(heads, (tmp_path,))), heads


def test_revisions_are_read_in_every_way_to_write_them(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    one, two, three = (tmp_path / "versions" / f"{name}.py" for name in ("c", "b", "a"))
    last = revisions(locations=())[-1]
    one.write_text(f'revision, down_revision, depends_on = "one", None, ("{last}",)')
    two.write_text('revision: str = "two"\ndown_revision: str | None = "one"\n')
    three.write_text('from alembic import op\nrevision = "three"\ndown_revision = ["two"]\n')

    assert revisions(locations=(tmp_path,))[-4:] == [last, "one", "two", "three"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('revision = "a" + "b"\ndown_revision = None', "x.py has to assign plain text to revision"),
        ("down_revision = None", "x.py has to assign plain text to revision"),
        ('revision = "x"\ndown_revision = "gone"', "stand on some that are missing: x"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_applied(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "x.py").write_text(source)

    with pytest.raises(SchemaError, match=said):
        schema.upgrade("postgresql://x@127.0.0.1:1/x", locations=(tmp_path,))


def test_a_relay_and_a_consumer_import_no_migrations_tool() -> None:
    program = f"""
import sys
import dovecote.bootstrap
import dovecote.exporter.server
import workers.routes
from dovecote.migrations.revisions import pending_for
from workers.app import app
assert pending_for(None, locations=app.migration_locations)
print([name for name in {NEEDLESS!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)

    assert done.stdout == "[]\n"
