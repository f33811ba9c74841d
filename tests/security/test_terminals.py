"""The attack: an event, an error or a name holds escape sequences, and an operator's terminal obeys them.

They change its title and its clipboard, move the cursor over true lines, turn text around; a line break alone forges a
line. Whatever the data, only printable characters and our own line breaks leave a command.
"""

import ast
import builtins
import collections.abc
import io
import json
import logging
import os
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from unittest.mock import patch
from uuid import UUID

import psycopg
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from dovecote import cli
from dovecote.cli import deliveries, events, output, status
from dovecote.cli import recover as recovering
from dovecote.cli import replays as replaying
from dovecote.cli import retention as maintaining
from dovecote.local.supervisor import prefixed
from dovecote.operations.deliveries import Delivery, Groups
from dovecote.operations.events import EventLife
from dovecote.operations.recover import Recovery
from dovecote.operations.replays import Plan, Replay
from dovecote.operations.retention import Maintenance
from dovecote.operations.status import Status
from dovecote.processes.terminal import block, plain, write_line
from dovecote.settings import Telemetry
from dovecote.telemetry.configure import configure
from tests.security.patterns import modules
from tests.support.profiles import examples
from workers.commands import ingest as ingesting
from workers.gateways.price_files import Refusal, Summary

EVIL = (
    "42\x1b]0;title\x1b\\\x1b[2K\x1b[1A\x1b[31mFAKE\x1b[0m\x07\x08\x7f\n2026-11-28 FORGED\r\nFORGED"
    "\x0b\x0c\x1c\x85FORGED\u2028FORGED"
    "\u2029FORGED\u202e\u2066\u200f\u200b\u00ad\ufeff\x9b31mC1\x9d\ud800\ue000\U000e0041 "
    "[red]markup[/red] :skull:"
)
DATABASE_EVIL = EVIL.replace("\ud800", "")


def assert_harmless(seen: str) -> None:
    assert not [line for line in seen.split("\n") if not line.isprintable()], ascii(seen)
    assert not [line for line in seen.split("\n") if line.startswith(("FORGED", "2026-11-28 FORGED"))]


def printed(work: Callable[[], object]) -> str:
    """Return what the work prints, to stdout and stderr."""
    seen = io.StringIO()
    with redirect_stdout(seen), redirect_stderr(seen):
        work()
    return seen.getvalue()


# Any text -----------------------------------------------------------------------------------------

HOSTILE = st.sampled_from(
    ["\x1b]0;", "\n", "\r", "\x9b31m", "\u202e", "\u2028", "\t", "\x00", "\u0301" * 9, "\nFORGED"]
)
TEXTS = st.one_of(
    st.lists(HOSTILE | st.text(max_size=3), max_size=6).map("".join),
    st.text(st.characters(), max_size=20),  # surrogates too
)


@given(text=TEXTS)
@settings(max_examples=examples(300, 100_000))
def test_any_text_becomes_one_line_that_no_terminal_obeys(text: str) -> None:
    line = plain(text)

    assert line.isprintable()
    assert plain(line) == line
    assert "\u0301" * 5 not in line
    assert all(each.startswith("    ") and each.isprintable() for each in block(text).split("\n"))


JSON = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
)


LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(0, 10**6),
    float: st.floats(0, 10**6),
    bool: st.booleans(),
    datetime: st.just(datetime(2026, 11, 20, 12, tzinfo=UTC)),
    UUID: st.uuids(),
    type(None): st.none(),
    Any: JSON,
}


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type as verbs return it, with any text in it."""
    if hint in LEAVES:
        return LEAVES[hint]
    if get_origin(hint) is typing.Literal:
        return st.sampled_from(get_args(hint))
    inner = [anything(one) for one in get_args(hint) if one is not ...]
    match get_origin(hint):
        case builtins.list | collections.abc.Sequence:
            return st.lists(inner[0], max_size=2)
        case builtins.tuple:
            return st.lists(inner[0], max_size=2).map(tuple)
        case builtins.dict | collections.abc.Mapping:
            return st.dictionaries(inner[0], inner[1], max_size=2)
        case builtins.set | builtins.frozenset:
            return st.frozensets(inner[0], max_size=2)
        case types.UnionType | typing.Union:
            return st.one_of(inner)
    hints = get_type_hints(hint)
    return st.builds(hint, **{one.name: anything(hints[one.name]) for one in fields(hint)})


def shown_by(kind: Any, show: Callable[[Any], object]) -> st.SearchStrategy[Callable[[], object]]:
    """What a verb may return, and the command's own function that prints it."""
    return anything(kind).map(lambda value: partial(show, value))


SHOWN = st.one_of(
    shown_by(EventLife, events._show_life),
    shown_by(Groups, deliveries._show_groups),
    shown_by(list[Delivery], lambda found: output.print_listing(found, deliveries._columns(), if_empty="none")),
    shown_by(Status, lambda found: output.show(status._screen(found))),
    shown_by(Replay, replaying._print),
    shown_by(Plan, lambda plan: replaying._print_plan(plan, dry_run=True)),
    shown_by(Maintenance, maintaining._report),
    shown_by(Recovery, recovering._report),
    st.builds(Refusal, LEAVES[int], TEXTS).map(lambda one: lambda: ingesting._print_summary(Summary(refused=[one]))),
    TEXTS.map(lambda text: lambda: output.print_json({text: text})),
    TEXTS.map(lambda text: lambda: output.note(text)),
    TEXTS.map(lambda text: lambda: output.say_block(text)),
    TEXTS.map(lambda text: lambda: prefixed(["a"], sys.stdout)("a", text)),
)


@given(show=SHOWN)
@settings(max_examples=examples(150, 100_000))
def test_any_text_in_any_field_of_a_listing_is_harmless(show: Callable[[], object]) -> None:
    assert_harmless(printed(show))


def test_rich_itself_may_still_draw_and_colour() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=2_000)

    screen.print(output.Legible(output.cell(EVIL, "bold red")))

    seen = screen.file.getvalue()  # type: ignore[attr-defined] # a StringIO
    assert seen.startswith("\x1b[1;31m")
    assert "]0;title" in seen
    assert "\x1b]0;" not in seen
    assert_harmless(seen.replace("\x1b[1;31m", "").replace("\x1b[0m", ""))


def test_a_terminal_without_utf_8_gets_what_it_has() -> None:
    raw = io.BytesIO()

    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    write_line(stream, "caf\u00e9 \ud800 \u202e")

    assert raw.getvalue() == b"caf\\xe9 \\ud800 \\u202e\n"


def test_a_wide_cell_does_not_push_the_others_out_of_sight() -> None:
    table = Table("a", "b", box=None)
    output.add_row(table, "w" * 10_000, "here")

    seen = printed(lambda: output.print_table(table, ""))

    assert max(map(len, seen.splitlines())) < 400


# Every command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_url(database_url: str) -> str:
    with psycopg.connect(database_url, autocommit=True) as connection:
        # Postgres keeps numbers and nestings that Python's parser refuses.
        for huge in ("1", "9" * 5_000, "[" * 1_500 + "]" * 1_500):
            connection.execute(
                "select dovecote.append_event('order', %s, 'shop.order_placed.v1', %s, %s)",
                (
                    DATABASE_EVIL[:200],
                    json.dumps({"note": DATABASE_EVIL, DATABASE_EVIL: "N", "phone": 4915112345678}).replace(
                        '"N"', huge
                    ),
                    json.dumps({"correlation_id": DATABASE_EVIL}),
                ),
            )
        connection.execute(
            "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
            " event_type, state, attempts, error_type, error_fingerprint, error, next_attempt_at)"
            " select %s, id, position, 'order', aggregate_id, %s, state, 1, %s, %s, %s,"
            " case when state = 'retrying' then now() end"
            " from dovecote.outbox, unnest(array['dead', 'waiting', 'retrying']) with ordinality s (state, n)"
            " where n = position",
            (
                "pricing.apply_quotes",
                DATABASE_EVIL,
                DATABASE_EVIL,
                DATABASE_EVIL[:12],
                "Traceback\nX: " + DATABASE_EVIL,
            ),
        )
        # The log refuses such texts today. Lines from before it did are shown all the same.
        connection.execute("set session_replication_role = replica")
        connection.execute(
            "insert into dovecote.audit_log (actor, action, reason, details) values (%s, 'x.y', %s, %s)",
            (DATABASE_EVIL, DATABASE_EVIL, json.dumps({DATABASE_EVIL: DATABASE_EVIL})),
        )
        connection.execute("reset session_replication_role")
        connection.execute(
            "insert into dovecote.paused_handlers (handler_name, reason, actor)"
            " values ('pricing.apply_quotes', %s, %s)",
            (DATABASE_EVIL, DATABASE_EVIL),
        )
    return database_url


def ids(url: str) -> list[UUID]:
    with psycopg.connect(url) as connection:
        return [row[0] for row in connection.execute("select id from dovecote.outbox order by position")]


LISTINGS = [
    ["events", "list"],
    ["events", "show", "{0}"],
    ["events", "show", "{1}"],
    ["events", "show", "{2}"],
    ["deliveries", "list"],
    ["deliveries", "list", "--rows"],
    ["deliveries", "show", "pricing.apply_quotes", "{0}"],
    ["deliveries", "show", "pricing.apply_quotes", DATABASE_EVIL],
    ["deliveries", "retry", "--all-matching", "--dry-run"],
    ["aggregates", "blocked"],
    ["handlers", "list"],
    ["audit"],
    ["status"],
    ["doctor"],
    ["replay", "list"],
    ["partitions"],
    ["settings", "--in-force"],
    ["events", "list", f"--{DATABASE_EVIL}"],
    ["events", DATABASE_EVIL],
    ["events", "list", "--since", DATABASE_EVIL],
    ["events", "list", "--limit", DATABASE_EVIL],
    ["handlers", "pause", DATABASE_EVIL, "--reason", "x"],
    ["ingest", "prices", DATABASE_EVIL],
    ["ingest", "prices", "{file}"],
    ["up", "--procfile", DATABASE_EVIL],
    ["exec", "\x1b[2J"],
]


@pytest.mark.servers
@pytest.mark.once
def test_no_command_lets_anything_through(hostile_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prices.csv"
    rows = [f'"{text}","{text}","{text}"\n' for text in (EVIL, DATABASE_EVIL)]
    file.write_text("symbol,price,at\n" + "".join(rows), "utf-8", "surrogatepass")
    found = ids(hostile_url)
    variables = {
        "DATABASE_URL": hostile_url,
        "REDIS_URL": "redis://localhost:1/0",
        "DOVECOTE_APP": "workers.app:app",
        "DOVECOTE_HOME": str(tmp_path),
        "DOVECOTE_DATABASE__CONNECT_TIMEOUT_SECONDS": "1",
        "DOVECOTE_COMMAND": "dovecote",
    }
    seen = {}

    for words in LISTINGS:
        line = [word.format(*found, file=file) if "{" in word else word for word in words]
        for given_words in (line, [*line, "--json"]):

            def run(given_words: list[str] = given_words) -> None:
                words_of_line = patch.object(sys, "argv", ["dovecote", *given_words])
                with patch.dict(os.environ, variables), words_of_line, pytest.raises(SystemExit):
                    cli.main()

            seen[(*words, *given_words[len(line) :])] = printed(run)

    for each, text in seen.items():
        assert_harmless(text)
        assert text, each
        assert "Traceback (most" not in text, each
    for listing in (
        ("events", "list"),
        ("deliveries", "list", "--rows"),
        ("audit",),
        ("status",),
        ("ingest", "prices", "{file}"),
    ):
        assert "x1b" in seen[listing], listing
    assert "4915112345678" not in seen["events", "show", "{0}"]


def test_a_wrong_word_and_a_wrong_setting_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    """In processes of their own, on a terminal that knows ASCII only."""
    urls = {"DATABASE_URL": "postgresql://x@localhost:1/x", "REDIS_URL": "redis://localhost:1/0"}
    for words, variables in (
        (["--\x1b[2J"], {}),
        (["status"], {**urls, "DOVECOTE_RELAY__BATCH_SIZE": "\x1b[2J\n\u202eFORGED"}),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dovecote", *words],
            env={**os.environ, "DOVECOTE_HOME": str(tmp_path), "PYTHONIOENCODING": "ascii", **variables},
            cwd=tmp_path,
            capture_output=True,
        )
        assert done.returncode == 2, done.stderr
        assert_harmless((done.stdout + done.stderr).decode("ascii"))
        assert b"x1b" in done.stdout + done.stderr


def test_log_lines_for_people_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    configure(Telemetry(log_format="console"), "test")
    log = structlog.get_logger()
    try:
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.exception(EVIL, symbol=EVIL, nested={EVIL: [EVIL]}, **{EVIL: 1})
            logging.getLogger("dramatiq").error("said %s", EVIL)
        seen = capsys.readouterr().err
    finally:
        structlog.reset_defaults()

    assert "x1b" in seen
    assert_harmless(seen)


def test_lines_of_supervised_processes_are_harmless() -> None:
    seen = io.StringIO()

    prefixed(["relay"], seen)("relay", EVIL)

    assert_harmless(seen.getvalue())
    assert seen.getvalue().count("\n") == 1


# The next command ---------------------------------------------------------------------------------

# The last one writes files.
MAY_WRITE = {"dovecote.processes.terminal", "dovecote.cli.output", "dovecote.local.child_server"}


def test_no_module_prints_by_itself() -> None:
    found = [
        f"{module.__name__}:{node.lineno}"
        for module in modules()
        if module.__name__ not in MAY_WRITE
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text("utf-8")))
        if isinstance(node, ast.Call) and _prints(node.func)
    ]

    assert not found


def _prints(function: ast.expr) -> bool:
    match function:
        case ast.Name(id="print" | "Console" | "Progress" | "Live" | "input"):
            return True
        case ast.Attribute(attr="echo" | "secho" | "prompt" | "confirm" | "print"):
            return True
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr"), attr="write"):
            return True
        case ast.Attribute(value=ast.Name(id="stream"), attr="write"):
            return True
    return False
