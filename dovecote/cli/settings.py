"""`dovecote settings`: what can be set, and what is."""

from __future__ import annotations

from operator import itemgetter
from typing import Annotated

import typer

from dovecote.cli.output import AsJson, document, print_json, print_listing, say


def settings(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option(help="As a Markdown table.")] = False,
    in_force: Annotated[bool, typer.Option(help="The values in force, secrets masked.")] = False,
) -> None:
    """Print every option with its default, unit and meaning.

    Example: dovecote settings --in-force
    """
    from dovecote.settings import load_settings, options, shown  # slow to import

    if in_force:
        values = shown(load_settings())
        if as_json:
            print_json(values)
        else:
            for section, fields in values.items():
                for name, value in fields.items():
                    say(f"{section}.{name} = {value}")
        return
    if as_json:
        print_json(list(options()))
    elif markdown:
        document(settings_table())
    else:
        columns = {name: itemgetter(name) for name in ("variable", "default", "unit", "meaning")}
        print_listing(list(options()), columns, if_empty="")
        say("")
        say("NAME_FILE, the path of a file that holds the value, stands for NAME.")


def settings_table() -> str:
    """Return the options as a Markdown table."""
    from dovecote.settings import options  # slow to import

    lines = ["| variable | default | unit | meaning |", "| --- | --- | --- | --- |"]
    for option in options():
        unit = option["unit"].replace("|", "or")
        lines.append(f"| `{option['variable']}` | {option['default']} | {unit} | {option['meaning']} |")
    return "\n".join(lines) + "\n"
