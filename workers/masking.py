"""What nobody may read in a log, an error or a trace: secrets and phone numbers.

Two nets. What this process knows to be secret is taken out by value, wherever it turns up; what looks like
a secret or a phone number is taken out by its shape.
"""

import re
from collections.abc import Callable, Iterable

_SHAPES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), "***"),
    # scheme://user:password@host
    (re.compile(r"(\w+://[^:/@\s]*):[^@\s]+@"), r"\1:***@"),
    # Authorization: Bearer abc
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1 ***"),
    # password=abc, "api_key": "abc"; in JSON within JSON the quotes have backslashes
    (
        re.compile(
            r"""((?:passw(?:or)?d|passwd|secret|token|api[-_]?key|access[-_]?key|private[-_]?key|[a-z]+_key"""
            r"""|authorization|credentials?)(?:\\*["'])?\s*[:=]\s*(?:\\*["'])?)"""
            r"""(?!Bearer |Basic |\*\*\*)[^\s"'\\,;&)}\]]+""",
            re.I,
        ),
        r"\1***",
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

_known: set[str] = set()


def never_show(secrets: Iterable[str]) -> None:
    """Take these texts out of everything this process masks from now on. Short ones would garble it: they are left."""
    _known.update(secret for secret in secrets if len(secret) >= 8)


def masked(text: str, hidden: Iterable[str] = ()) -> str:
    """Return the text without secrets and without phone numbers, whose last two digits stay.

    `hidden` are texts that must not be read here, such as the sensitive fields of an event.
    """
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, "***")
    for value in sorted(set(hidden), key=len, reverse=True):
        if value:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "***", text)
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text
