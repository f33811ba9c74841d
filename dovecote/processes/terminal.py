"""Text on its way to a terminal. Whatever people read there goes through `plain` or `block`, whichever process says it.

A terminal obeys what it is sent: escape sequences change its title, its clipboard and lines that are already there,
bidirectional overrides turn a sentence around, and a line break makes a line that nobody wrote. Events, errors and
names are written by others. So no such character leaves this module; it is shown as Python writes it, such as \\x1b.
"""

import sys
import unicodedata
from typing import NoReturn, TextIO

# A letter with more accents than any language has runs over the lines above it.
_MAX_MARKS = 4
_INDENT = "    "


def plain(text: str) -> str:
    """Return one line without anything that a terminal obeys: a line break in it is shown as \\n, any space as one."""
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if category == "Zs" or character == "\t":
            shown.append(" ")
        elif not character.isprintable() or marks > _MAX_MARKS:
            shown.append(_escaped(character))
        else:
            shown.append(character)
    return "".join(shown)


def block(text: str) -> str:
    """Return many lines, such as a traceback; they are indented, so that none of them looks like one of ours."""
    return "\n".join(_INDENT + plain(line) for line in text.split("\n"))


def write_line(stream: TextIO, text: str, *, before: str = "") -> None:
    """Write one line of text that others may have a part in; `before` is ours and written as it is."""
    write(stream, f"{before}{plain(text)}\n")


def write_block(stream: TextIO, text: str) -> None:
    """Write many lines of text that others may have a part in."""
    write(stream, block(text) + "\n")


def write(stream: TextIO, ours: str, *, flush: bool = True) -> None:
    """Write a text that is legible already. What the stream's encoding does not have is written as Python writes it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(ours.encode(encoding, "backslashreplace").decode(encoding))
    if flush:
        stream.flush()


def refuse(sentence: str, code: int = 2) -> NoReturn:
    """End the process with a sentence and a code: 2 if it was started wrongly."""
    write_line(sys.stderr, sentence, before="dovecote: ")
    raise SystemExit(code)


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else repr(character)[1:-1]
