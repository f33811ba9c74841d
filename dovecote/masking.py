"""What nobody may read in a log, an error or a trace: secrets and phone numbers.

Two nets. What this process knows to be secret is taken out by value, wherever it turns up; what looks like
a secret or a phone number is taken out by its shape. Not seen: mail addresses, names, phone numbers without a plus,
leading zeros or a name (`phone`, `tel`, ...) before them, and secrets under a name that does not say so.

The writer of an event chooses what is read here, and Python's `re` lets no other thread run. So the work is linear in
the text, and the text is bounded: cut before it is searched, never after. A shape either takes what it has looked at or
has looked at a bounded number of characters; `tests/security/test_masking.py` tests each with hostile texts.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from dovecote.errors import shown

#: Characters of a text that are kept, of its beginning and its end, where nobody asks for more.
MAX_CHARACTERS = 20_000
#: More than the outbox takes of an event.
MAX_PAYLOAD_CHARACTERS = 300_000
_GAP = "\n...\n"
# Characters looked at beyond each cut, so that a secret which straddles it is recognised.
_MARGIN = 1_024

_HIDDEN_NAME = (
    r"(?:passw(?:or)?d|passwd|secret|token|api[-_]?key|access[-_]?key|private[-_]?key|_key"
    r"|authorization|credentials?|passcode)"
)
_IS_SECRET = re.compile(rf"(?:^|[-_.])(?:{_HIDDEN_NAME}|[a-z]{{1,40}}_key|pin|otp)\Z", re.I)
# Of a longer name only the end is looked at, which says what it is.
_MAX_NAME = 80


class _Span(NamedTuple):
    """Characters that nobody may read, and what stands there instead."""

    start: int
    end: int
    instead: str = "***"


# The group `secret` is taken out, or the whole match; of a number its last two digits stay.
_SECRETS = (
    # Authorization: Bearer abc
    re.compile(r"\b(?:Bearer|Basic)\s{1,16}(?P<secret>[A-Za-z0-9._~+/=-]{8,})", re.I),
    # password=abc, password="a b", "api_key": "abc"; in JSON within JSON the quotes have backslashes
    re.compile(
        rf"""(?:{_HIDDEN_NAME}(?:\\{{0,8}}["'])?\s{{0,16}}[:=]\s{{0,16}}(?!Bearer |Basic )|(?<![\w-])key=)"""
        r"""(?P<quote>\\{0,8}["'](?!Bearer |Basic ))?"""
        r"""(?P<secret>(?(quote)[^"'\\\n]|[^\s"'\\,;&)}\]])+)""",
        re.I,
    ),
    # key: AAAA..., "key": "AAAA..."
    re.compile(r"""(?<![\w-])key["']?\s{0,4}[:=]\s{0,4}["']?(?P<secret>[A-Za-z0-9+/_=-]{16,})""", re.I),
    # JSON Web Tokens, and keys of providers whose first letters say so
    re.compile(r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]*){0,2}"),
    re.compile(r"\b(?:[rs]k_(?:live|test)_\w{8,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|xox[a-z]-[\w-]{10,})"),
    # the words of our own text messages; a PIN, a one-time password
    re.compile(r"\bcode is (?P<secret>\d{4,8})\b", re.I),
    re.compile(r"\b(?:pin|otp|passcode|tan)\b\W{1,3}(?:is\W)?(?P<secret>\d{4,8})\b", re.I),
    # IBAN
    re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
)
_NUMBERS = (
    # +49 151 1234567, also as %2B49151... in a URL; 0049151...
    re.compile(r"(?:\+|%2B)\d[\d\s()./-]{5,18}\d", re.I),
    re.compile(r"(?<![\w.:-])00[1-9]\d{6,13}(?![\w.:-])"),
)
# "phone": "49151..."
_NAMED_NUMBER = re.compile(
    r"(?:phone|mobile|msisdn|tel|sms)(?:[-_ ]?(?:number|no))?\W{1,6}(?P<secret>\(?\d[\d ()./-]{5,18}\d)", re.I
)
# Each shape, what stands before the last two digits of a number, None where nothing stays.
_SHAPES: tuple[tuple[re.Pattern[str], str | None], ...] = (
    *((shape, None) for shape in _SECRETS),
    *((shape, "+***") for shape in _NUMBERS),
    (_NAMED_NUMBER, "***"),
)
_IN_URL = re.compile(r"://\S+")
_KEY_BLOCK = re.compile(r"-----(BEGIN|END) [A-Z ]{0,40}PRIVATE KEY-----")
# Postgres shows the row that it refuses.
_ROW = re.compile(r"(?:Key \([^\n=]{1,160}\)=|Failing row contains )(?P<secret>\([^\n]*)")
_SQL = re.compile(r"\[(?:SQL|parameters): ")
_LITERAL = re.compile(r"'[^']*(?:'|\Z)")
# An id of an event looks like nothing else, and there is one in every line and every span.
_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
# A value that holds itself has no end, and one that is wide has it late.
_DEEPEST, _DEEPEST_PAYLOAD = 8, 100
_MAX_ITEMS = 1_000
# Of a larger number only the size is shown: JSON has no place for it, and `str` refuses it.
_MAX_BITS = 256

# A long secret is recognised by its first or last characters, so that one which somebody else has cut is taken out.
_PART = 16

_known: set[str] = set()
# Short texts with nothing to take out, as names and states are. What has a secret in it is not kept.
_harmless: set[str] = set()
_MAX_HARMLESS, _MAX_HARMLESS_CHARACTERS = 2_048, 200


def never_show(secrets: Iterable[str]) -> None:
    """Take these texts out of everything this process masks from now on. Short ones would garble it: they are left."""
    _known.update(secret for secret in secrets if len(secret) >= 8)
    _harmless.clear()


def masked(text: str, hidden: Iterable[str] = (), most: int = MAX_CHARACTERS) -> str:
    """Return the text without secrets and without phone numbers, whose last two digits stay.

    `hidden` are texts that must not be read here, such as the sensitive fields of an event.
    Of more than `most` characters the middle is left out; a secret on either side of that gap is taken out whole.
    """
    values = {value for value in hidden if value}
    if len(text) <= most:
        if _ID.fullmatch(text) or (text in _harmless and not values):
            return text
        found = _without(text, _spans(text, values), 0, len(text))
        if found == text and not values and len(text) <= _MAX_HARMLESS_CHARACTERS:
            if len(_harmless) >= _MAX_HARMLESS:
                _harmless.clear()
            _harmless.add(text)
        return found
    half = most // 2
    head, tail = text[: half + _MARGIN], text[-half - _MARGIN :]
    first = _without(head, _spans(head, values, ends=False), 0, half)
    last = _without(tail, _spans(tail, values, begins=False), len(tail) - half, len(tail))
    # Stars may be longer than what they stand for.
    return first[:half] + _GAP + (last[-half:] if half else "")


def masked_fields(fields: Mapping[str, object], most: int = MAX_CHARACTERS) -> dict[str, Any]:
    """Return names and values without secrets and phone numbers, as deep as they are nested.

    A value whose name says that it is secret is hidden whole. What is no number, text or collection becomes its `repr`.
    Of each text at most `most` characters stay, of each collection its first 1,000 members.
    """
    return _masked_mapping(fields, _Limits(_DEEPEST, _MAX_ITEMS, most))


def masked_payload(payload: Mapping[str, object]) -> dict[str, Any]:
    """Return the same of a whole event, which is bounded by its table: nothing of it is left out but what is hidden."""
    return _masked_mapping(payload, _Limits(_DEEPEST_PAYLOAD, MAX_PAYLOAD_CHARACTERS, MAX_PAYLOAD_CHARACTERS))


class _Limits(NamedTuple):
    depth: int
    items: int
    characters: int

    def inside(self) -> "_Limits":
        return self._replace(depth=self.depth - 1)


def _masked_mapping(fields: Mapping[Any, object], limits: _Limits) -> dict[str, Any]:
    found = {}
    for count, (key, value) in enumerate(fields.items()):
        if count == limits.items:
            found["..."] = f"{len(fields) - count} more"
            break
        name = key if isinstance(key, str) else shown(key)
        found[masked(name, most=limits.characters)] = _masked_value(name[-_MAX_NAME:], value, limits)
    return found


def _masked_value(name: str, value: object, limits: _Limits) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _IS_SECRET.search(name):
        return "***"
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return shown(value)
    if isinstance(value, int | float):
        text = _masked_after(name, str(value), limits.characters)
        return value if text == str(value) else text
    if isinstance(value, Mapping) and limits.depth:
        return _masked_mapping(value, limits.inside())
    if isinstance(value, list | tuple | set | frozenset) and limits.depth:
        items = [_masked_value(name, item, limits.inside()) for item in islice(value, limits.items)]
        return items if len(value) <= limits.items else [*items, f"{len(value) - limits.items} more"]
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return shown(value)
    return _masked_after(name, value if isinstance(value, str) else _shown(value), limits.characters)


def _masked_after(name: str, text: str, most: int) -> str:
    # The name belongs to the shape: `phone` makes a number of what would be an order's otherwise.
    before = "" if _ID.fullmatch(text) else f"{name}="
    found = masked(before + text, most=most + len(before))
    return found[len(before) :] if found.startswith(before) else masked(text, most=most)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:
        return f"{type(value).__qualname__}: it cannot be shown"


# What to take out --------------------------------------------------------------------------------


def _without(text: str, spans: Iterable[_Span], start: int, end: int) -> str:
    """Return `text[start:end]` with what stands there instead of the spans. One that lies across an edge is inside."""
    parts, at = [], start
    for span in sorted(spans):
        if span.end <= at or span.start >= end:
            continue
        # What two shapes find is shown as the first of them shows it.
        if span.start >= at:
            parts += [text[at : span.start], span.instead]
        elif span.start < start and not parts:
            parts.append(span.instead)
        at = span.end
    parts.append(text[at:end])
    return "".join(parts)


def _spans(text: str, hidden: Iterable[str], *, begins: bool = True, ends: bool = True) -> Iterator[_Span]:
    """Yield what nobody may read. Without `begins` or `ends` the text goes on there: what touches it may be more."""
    for value in _known:
        yield from _known_value(text, value)
    for value in hidden:
        yield from _hidden_value(text, value)
    for shape, before in _SHAPES:
        group = "secret" if "secret" in shape.groupindex else 0
        for found in shape.finditer(text):
            yield _Span(*found.span(group), "***" if before is None else before + found[group][-2:])
    yield from _in_urls(text, ends)
    yield from _key_blocks(text, begins)
    yield from _in_rows(text)
    yield from _in_sql(text)


def _known_value(text: str, value: str) -> Iterator[_Span]:
    if len(value) > _PART:
        yield from _long_value(text, value)
    else:
        yield from _everywhere(text, value)


def _everywhere(text: str, value: str) -> Iterator[_Span]:
    at = text.find(value)
    while at >= 0:
        yield _Span(at, at + len(value))
        at = text.find(value, at + len(value))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _hidden_value(text: str, value: str) -> Iterator[_Span]:
    if len(value) > 2 * _PART:
        # It may stand there as `repr` or JSON writes it.
        for spelling in {value, repr(value)[1:-1]} if len(value) <= MAX_CHARACTERS else {value}:
            yield from _long_value(text, spelling)
        return
    # A short one may be part of any word: only as a word of its own is it the value.
    for span in _everywhere(text, value):
        if not (_is_word(text[span.start - 1 : span.start]) or _is_word(text[span.end : span.end + 1])):
            yield span


def _long_value(text: str, value: str) -> Iterator[_Span]:
    """Yield where the value begins or ends, as far as it is there."""
    first, last = value[:_PART], value[-_PART:]
    at = text.find(first)
    while at >= 0:
        # How many characters agree, by halving.
        length = bisect_left(range(len(value)), True, key=lambda most: not text.startswith(value[: most + 1], at))
        yield _Span(at, at + length)
        at = text.find(first, at + length)
    end = len(text)
    while (at := text.rfind(last, 0, end)) >= 0:
        behind = at + _PART
        length = bisect_left(range(len(value)), True, key=lambda most: not text.endswith(value[-most - 1 :], 0, behind))
        yield _Span(behind - length, behind)
        end = behind - length


def _in_urls(text: str, ends: bool) -> Iterator[_Span]:
    """scheme://user:password@host, and scheme://token@host."""
    for found in _IN_URL.finditer(text):
        at = found.start() + 3
        for part in found.group()[3:].split("://"):
            host = part.rfind("@")
            if host < 0 and not ends and at + len(part) == len(text):
                host = len(part)  # the text goes on, perhaps with the rest of a password
            colon = part.find(":", 0, max(host, 0))
            if colon >= 0 and "/" not in part[:colon] and "@" not in part[:colon]:
                yield _Span(at + colon + 1, at + host)
            elif host >= 20 and part[:host].isalnum():
                yield _Span(at, at + host)
            at += len(part) + 3


def _key_blocks(text: str, begins: bool) -> Iterator[_Span]:
    start = None if begins else 0
    for edge in _KEY_BLOCK.finditer(text):
        if edge[1] == "BEGIN":
            start = edge.start() if start is None else start
        elif start is not None:
            yield _Span(start, edge.end())
            start = None
        if edge[1] == "BEGIN" and start == 0 and not begins:
            start = edge.start()  # what the text began with was none
    if start is not None and (begins or start > 0):
        yield _Span(start, len(text))


def _in_rows(text: str) -> Iterator[_Span]:
    for found in _ROW.finditer(text):
        start = found.start("secret")
        bracket = text.rfind(")", start, found.end())
        # A value with a line break in it ends on a later line.
        end = bracket + 1 if bracket >= 0 else text.find(")", found.end()) + 1
        yield _Span(start, end or len(text), "(***)")


def _in_sql(text: str) -> Iterator[_Span]:
    """SQLAlchemy's statement: its literals; and its parameters: all of them."""
    at = 0
    while found := _SQL.search(text, at):
        end = text.find("]\n", found.end())
        at = len(text) if end < 0 else end
        if found.group() == "[parameters: ":
            yield _Span(found.end(), at)
            continue
        for literal in _LITERAL.finditer(text, found.end(), at):
            yield _Span(*literal.span(), "'***'")
