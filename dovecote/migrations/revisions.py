"""Which revisions there are and how they stand on each other, read from their files without importing them.

A process that only compares a database with its code needs no Alembic for that, which would take 9 MB of it.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dovecote.database import SCHEMA
from dovecote.errors import DovecoteError

LIBRARY = Path(__file__).parent

#: Not `alembic_version`, which a service's own tables in the same database may have.
VERSION_TABLE = "dovecote_version"
#: One row with one array: what is applied, as the version table has it.
HEADS = f"select array_agg(version_num) from {SCHEMA}.{VERSION_TABLE}"  # noqa: S608 - two constants

_NAMES = ("revision", "down_revision", "depends_on")


class SchemaError(DovecoteError):
    """The schema cannot be brought to where it was asked to go; the message says why."""


@dataclass(frozen=True)
class _Revision:
    name: str
    stands_on: tuple[str, ...]


def revisions(*, locations: Sequence[Path]) -> list[str]:
    """Return all that this code knows, each after those it stands on.

    Errors: SchemaError for a file that does not say as plain text what its revision stands on.
    """
    return [*_known(tuple(locations))]


def pending_for(applied: Sequence[str] | None, *, locations: Sequence[Path]) -> list[str]:
    """Return the revisions above these, of HEADS; none where a newer deploy's is one we do not know."""
    known = _known(tuple(locations))
    heads = [*(applied or ())]
    if not known.keys() >= set(heads):
        return []
    done: set[str] = set()
    while heads:
        name = heads.pop()
        if name not in done:
            done.add(name)
            heads += known[name].stands_on
    return [name for name in known if name not in done]


@cache
def _known(locations: tuple[Path, ...]) -> Mapping[str, _Revision]:
    """Return them by name, in an order in which they can be applied."""
    files = sorted(file for place in (LIBRARY, *locations) for file in (place / "versions").glob("*.py"))
    # The library's come first, as they are applied.
    files.sort(key=lambda file: file.parents[1] != LIBRARY)
    found = {revision.name: revision for revision in map(_read, files)}
    ordered: dict[str, _Revision] = {}
    while len(ordered) < len(found):
        ready = [one for one in found.values() if one.name not in ordered and ordered.keys() >= {*one.stands_on}]
        if not ready:
            raise SchemaError(f"these revisions stand on some that are missing: {', '.join(found.keys() - ordered)}")
        ordered[ready[0].name] = ready[0]
    return ordered


def _read(file: Path) -> _Revision:
    said = {name: value for name, value in _assignments(ast.parse(file.read_text(), str(file))) if name in _NAMES}
    try:
        texts = {name: _texts(ast.literal_eval(value)) for name, value in said.items()}
        (name,) = texts["revision"]
    except (KeyError, ValueError) as error:
        raise SchemaError(f"{file} has to assign plain text to revision, down_revision and depends_on") from error
    return _Revision(name, (*texts.get("down_revision", ()), *texts.get("depends_on", ())))


def _assignments(module: ast.Module) -> Iterable[tuple[str, ast.expr]]:
    for statement in module.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, statement.value
                elif isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                    for one, value in zip(target.elts, statement.value.elts, strict=False):
                        if isinstance(one, ast.Name):
                            yield one.id, value


def _texts(value: object) -> tuple[str, ...]:
    """Return what Alembic takes as one name, several or none."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(given, tuple | list) or not all(isinstance(text, str) for text in given):
        raise ValueError(value)
    return tuple(given)
