"""Which statements in a text of SQL end a transaction, open a savepoint, or change a setting.

A text may hold several statements. Words in literals, quoted names and comments are none of SQL's. A text without
any such word costs a look into a cache.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["commit", "rollback", "begin", "savepoint", "release", "rollback to", "set"]


class Statement(NamedTuple):
    """`words` are the statement's own beginning; `name` is that of a savepoint."""

    kind: Kind
    words: str
    name: str = ""


# They begin a statement: at the start of the text, or after another statement or a comment.
_WORDS = r"(?:commit|end|rollback|abort|begin|start|prepare|savepoint|release|set|reset|do|call)\b"
_FIRST = re.compile(rf"\s*{_WORDS}", re.IGNORECASE)
# Empty lines are looked at once: the last line break before the word is what counts.
_LATER = re.compile(rf"(?:[;/]\s*|[\n\r][^\S\n\r]*){_WORDS}", re.IGNORECASE)

_TOKEN = re.compile(
    r"""
      --[^\n\r]*                                   # a comment; one in slashes may hold others, see below
    | (?P<slashes> /\*)
    | [eE]'(?:[^'\\]|\\.)*'                        # a literal; a doubled quote reads as two literals side by side
    | '[^']*'
    | (?P<dollars> \$(?:[^\W\d]\w*)?\$) .*? (?P=dollars)
    | "(?P<quoted> (?:[^"]|"")*)"
    | (?P<word> [^\W\d][\w$]*)
    | (?P<sign> [;()])
    """,
    re.VERBOSE | re.DOTALL,
)
_SLASHES = re.compile(r"/\*|\*/")

_BY_FIRST_WORD: dict[str, Kind] = {
    "commit": "commit",
    "end": "commit",
    "rollback": "rollback",
    "abort": "rollback",
    "begin": "begin",
    "start": "begin",
    "savepoint": "savepoint",
    "release": "release",
    "set": "set",
    "reset": "set",
    # What such a block or procedure sets cannot be read here: it is looked for.
    "do": "set",
    "call": "set",
}
# Enough for `rollback transaction to savepoint name`, and for `create or replace function`.
_MAX_WORDS = 6
# Longer texts are read each time: they are made for one occasion, and a cache would keep them.
_LONGEST_KEPT = 4_000


def statements_in(text: str) -> Sequence[Statement]:
    """Return those statements of the text that matter to its transaction; mostly there are none."""
    return _kept(text) if len(text) <= _LONGEST_KEPT else _read(text)


def _read(text: str) -> tuple[Statement, ...]:
    found = []
    if _FIRST.match(text) or (any(sign in text for sign in (";", "*/", "--")) and _LATER.search(text)):
        found = [statement for words in _statements(text) if (statement := _judged(words)) is not None]
    if "set_config" in text.lower():
        found.append(Statement("set", "set_config()"))
    return tuple(found)


_kept = lru_cache(maxsize=512)(_read)


def _judged(words: Sequence[str]) -> Statement | None:
    kind, started = _BY_FIRST_WORD.get(words[0]), " ".join(words[:2])
    match list(words):
        case ["prepare", "transaction", *_]:
            return Statement("commit", started)
        case ["set", "constraints", *_]:
            return None
        case ["rollback" | "abort", "to", *name] | ["rollback" | "abort", "work" | "transaction", "to", *name]:
            return Statement("rollback to", "rollback to", _name(name))
        case ["savepoint" | "release", *name] if kind is not None:
            return Statement(kind, words[0], _name(name))
    return Statement(kind, started if kind == "set" else words[0]) if kind is not None else None


def _name(words: Sequence[str]) -> str:
    return words[1] if len(words) > 1 and words[0] == "savepoint" else "".join(words[:1])


def _statements(text: str) -> Iterator[list[str]]:
    """Yield the first words of each statement, in lower case unless quoted."""
    words: list[str] = []
    last, parentheses, blocks = "", 0, 0
    for token in _tokens(text):
        sign, word = token["sign"], token["word"]
        if sign == ";" and parentheses == 0 and blocks == 0:
            if words:
                yield words
            words = []
        elif sign is not None:
            parentheses += {"(": 1, ")": -1, ";": 0}[sign]
        elif word is not None:
            word = word.lower()
            # The body of a function may be SQL, with semicolons and an END of its own: BEGIN ATOMIC ... END.
            if word == "atomic" and last == "begin" and words[:1] == ["create"]:
                blocks = 1
            elif blocks:
                blocks += {"case": 1, "end": -1}.get(word, 0)
            last = word
        if len(words) < _MAX_WORDS and (word or token["quoted"]):
            words.append(word or token["quoted"].replace('""', '"'))
    if words:
        yield words


def _tokens(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while (token := _TOKEN.search(text, at)) is not None:
        at = token.end()
        if token["slashes"]:
            depth = 1
            while depth and (slashes := _SLASHES.search(text, at)) is not None:
                depth += 1 if slashes.group() == "/*" else -1
                at = slashes.end()
            if depth:
                return
        else:
            yield token
