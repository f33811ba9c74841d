"""`dovecote settings`: what can be set, and what is."""

from typing import Annotated

import typer
from rich.table import Table

from dovecote.cli.output import AsJson, add_row, document, print_json, print_table, say


def register(app: typer.Typer) -> None:
    app.command(name="settings")(show_settings)


def show_settings(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option(help="As the README's table.")] = False,
    in_force: Annotated[bool, typer.Option(help="The values in force, secrets masked.")] = False,
) -> None:
    """Print every option with its default, unit and meaning.

    Example: dovecote settings --in-force
    """
    from dovecote.settings import load_settings, options, shown

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
        table = Table("variable", "default", "unit", "meaning", box=None, pad_edge=False)
        for option in options():
            add_row(table, option["variable"], option["default"], option["unit"], option["meaning"])
        print_table(table, "")
        say("")
        say("NAME_FILE, the path of a file that holds the value, stands for NAME.")


def settings_table() -> str:
    """Return the options as a Markdown table; the README holds a copy that a test keeps true."""
    from dovecote.settings import options

    lines = ["| variable | default | unit | meaning |", "| --- | --- | --- | --- |"]
    for option in options():
        unit = option["unit"].replace("|", "or")
        lines.append(f"| `{option['variable']}` | {option['default']} | {unit} | {option['meaning']} |")
    return "\n".join(lines) + "\n"
