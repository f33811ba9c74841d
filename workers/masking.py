"""What nobody may read in a log, an error or a trace: secrets and phone numbers.

Two nets. What this process knows to be secret is taken out by value, wherever it turns up; what looks like
a secret or a phone number is taken out by its shape.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

_HIDDEN_NAME = (
    r"(?:passw(?:or)?d|passwd|secret|token|api[-_]?key|access[-_]?key|private[-_]?key|[a-z]+_key"
    r"|authorization|credentials?)"
)

_SHAPES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), "***"),
    # scheme://user:password@host
    (re.compile(r"(\w+://[^:/@\s]*):[^@\s]+@"), r"\1:***@"),
    # Authorization: Bearer abc
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1 ***"),
    # password=abc, password="a b", "api_key": "abc"; in JSON within JSON the quotes have backslashes
    (
        re.compile(
            rf"""({_HIDDEN_NAME}(?:\\*["'])?\s*[:=]\s*)(?!Bearer |Basic |\*\*\*)"""
            r"""(\\*["'](?!Bearer |Basic |\*\*\*))?(?(2)[^"'\\\n]|[^\s"'\\,;&)}\]])+""",
            re.I,
        ),
        lambda found: f"{found[1]}{found[2] or ''}***",
    ),
    # JSON Web Tokens, and keys of providers whose first letters say so
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), "***"),
    (re.compile(r"\b(?:[rs]k_(?:live|test)_\w{8,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|xox[a-z]-[\w-]{10,})"), "***"),
    # Postgres shows the row that it refuses.
    (re.compile(r"(Key \([^)]*\)=)\(.*?\)(?= |$)", re.M), r"\1(***)"),
    (re.compile(r"(Failing row contains )\(.*\)"), r"\1(***)"),
    (re.compile(r"\[SQL: .*?\](?=\n|$)", re.S), lambda found: re.sub(r"'[^']*'", "'***'", found.group())),
    # the words of our own text messages
    (re.compile(r"(\bcode is )\d{4,8}\b", re.I), r"\1***"),
    # +49 151 1234567, also as %2B49151... in a URL; 0049151...; and "phone": "49151..."
    (re.compile(r"(?:\+|%2B)\d[\d\s()./-]{5,18}\d", re.I), lambda found: "+***" + found.group()[-2:]),
    (re.compile(r"(?<![\w.:-])00[1-9]\d{6,13}(?![\w.:-])"), lambda found: "+***" + found.group()[-2:]),
    (
        re.compile(r"((?:phone|mobile|msisdn|tel|sms)(?:[-_ ]?(?:number|no))?\W{1,6})(\(?\d[\d ()./-]{5,18}\d)", re.I),
        lambda found: f"{found[1]}***{found[2][-2:]}",
    ),
]

_IS_SECRET = re.compile(rf"(?:.*[-_.])?{_HIDDEN_NAME}", re.I)
# An id of an event looks like nothing else, and there is one in every line and every span.
_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
# A value that holds itself has no end.
_DEEPEST = 8

_known: set[str] = set()


def never_show(secrets: Iterable[str]) -> None:
    """Take these texts out of everything this process masks from now on. Short ones would garble it: they are left."""
    _known.update(secret for secret in secrets if len(secret) >= 8)
    _masked_name.cache_clear()
    _masked_after.cache_clear()


def masked(text: str, hidden: Iterable[str] = ()) -> str:
    """Return the text without secrets and without phone numbers, whose last two digits stay.

    `hidden` are texts that must not be read here, such as the sensitive fields of an event.
    """
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, "***")
    for value in sorted(set(hidden), key=len, reverse=True):
        if value:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "***", text)
    if _ID.fullmatch(text):
        return text
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def masked_facts(facts: Mapping[str, object]) -> dict[str, Any]:
    """Return names and values without secrets and phone numbers, as deep as they are nested.

    A value whose name says that it is secret is hidden whole. What is no number, text or collection becomes its `repr`.
    """
    return _masked_mapping(facts, _DEEPEST)


def _masked_mapping(facts: Mapping[Any, object], deepest: int) -> dict[str, Any]:
    return {_masked_name(str(name)): _masked_value(str(name), value, deepest) for name, value in facts.items()}


def _masked_value(name: str, value: object, deepest: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _IS_SECRET.fullmatch(name):
        return "***"
    if isinstance(value, int | float):
        text = _masked_after(name, str(value))
        return value if text == str(value) else text
    if isinstance(value, Mapping) and deepest:
        return _masked_mapping(value, deepest - 1)
    if isinstance(value, list | tuple | set | frozenset) and deepest:
        return [_masked_value(name, item, deepest - 1) for item in value]
    return _masked_after(name, value if isinstance(value, str) else _shown(value))


@lru_cache(2_048)
def _masked_name(name: str) -> str:
    return masked(name)


@lru_cache(2_048)
def _masked_after(name: str, text: str) -> str:
    # The name belongs to the shape: `phone` makes a number of what would be an order's otherwise.
    before = "" if _ID.fullmatch(text) else f"{name}="
    found = masked(before + text)
    return found[len(before) :] if found.startswith(before) else masked(text)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return f"{type(value).__qualname__}: it cannot be shown"
