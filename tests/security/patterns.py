"""Every regular expression of our code, how it is used, and texts that are hostile to it."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from re import _parser  # type: ignore[attr-defined] # typeshed does not have it; `re` parses with it
from types import ModuleType
from typing import Any

PACKAGES = ("dovecote", "domain", "workers", "benchmarks")
# What starts a process, is run by Alembic, or needs a package that is not there everywhere.
_NOT_IMPORTED = ("__main__", "env", "peers", "plots")

COMMON = (
    *(
        "a",
        "A",
        "1",
        "a_",
        "a-",
        "a.",
        "_",
        "-",
        " ",
        "\n",
        "\t",
        "\\",
        "\\a",
        "\\'",
        "'",
        '"',
        "`",
        "'\"`",
        "(",
        ")",
        "[",
        "]",
    ),
    *(
        "eyJaaa",
        "eyJaaa-",
        "Key (",
        "Key (a)=(",
        "Failing row contains (",
        "[SQL: ",
        "[SQL: '",
        "://",
        "a://a:",
        "a://a:@",
    ),
    *(
        "password ",
        "password=",
        "passwd='",
        "-----BEGIN ",
        "-----BEGIN PRIVATE KEY-----",
        "PRIVATE",
        "+1 ",
        "+1",
        "001",
        "tel (",
    ),
    *(
        "\u0661",
        "\u0131",
        "\u017f",
        "\u00e9",
        "\u202e",
        "\ud800",
        "key=",
        "a b@c:",
        "1.",
        "1,",
        "aA1 ",
        "AB12 ",
        ";",
        "$a$",
        "/*",
        "--",
    ),
)  # fmt: skip - a list


@dataclass(frozen=True)
class Used:
    """A pattern, where it is, and the methods that our code calls on it; finditer where that cannot be seen."""

    name: str
    pattern: re.Pattern[Any]
    methods: tuple[str, ...]

    def run(self, text: str) -> None:
        subject: Any = text if isinstance(self.pattern.pattern, str) else text.encode("utf-8", "surrogatepass")
        for method in self.methods:
            if method in ("match", "fullmatch"):
                getattr(self.pattern, method)(subject)
            else:
                for _ in self.pattern.finditer(subject):
                    pass

    def hostile(self) -> Iterator[tuple[str, str]]:
        """Yield beginnings, and what is repeated behind them."""
        literal = _sample(self.pattern.pattern)
        prefixes = sorted({literal[:length] for length in range(1, len(literal) + 1)}, key=len)[:40]
        yield from (("", unit) for unit in {*COMMON, *prefixes})
        for begun in prefixes[-1:] + prefixes[len(prefixes) // 2 : len(prefixes) // 2 + 1]:
            yield from ((begun, unit) for unit in ("a", "1", "A", " ", "\\", "'", "\\'", "a-", "a.", "(", "://"))


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        root = importlib.import_module(package)
        yield root
        for found in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not set(found.name.split(".")) & set(_NOT_IMPORTED):
                yield importlib.import_module(found.name)


def patterns() -> list[Used]:
    found: dict[int, Used] = {}
    for module in modules():
        methods = _methods(module)
        for name, value in vars(module).items():
            for number, pattern in enumerate(_patterns_in(value)):
                if id(pattern) not in found:
                    place = f"{module.__name__}.{name}" + (f"[{number}]" if not isinstance(value, re.Pattern) else "")
                    found[id(pattern)] = Used(place, pattern, tuple(sorted(methods.get(name, {"finditer"}))))
    return list(found.values())


def inline() -> Iterator[str]:
    """Yield places where a pattern is not compiled into a name: nobody would find and test it."""
    for module in modules():
        for node in ast.walk(_tree(module)):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=method)) if method != "escape":
                    if method != "compile" or (node.col_offset and not _at_top(module, node)):
                        yield f"{module.__name__}:{node.lineno} re.{method}"


def _patterns_in(value: object) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, list | tuple | set | frozenset) and len(value) < 100:
        for item in value:
            yield from _patterns_in(item)
    elif isinstance(value, dict) and len(value) < 100:
        for item in value.values():
            yield from _patterns_in(item)


def _tree(module: ModuleType) -> ast.Module:
    assert module.__file__ is not None
    return ast.parse(Path(module.__file__).read_text("utf-8"))


def _at_top(module: ModuleType, call: ast.Call) -> bool:
    return any(
        call.lineno >= node.lineno and call.lineno <= (node.end_lineno or node.lineno)
        for node in _tree(module).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    )


def _methods(module: ModuleType) -> dict[str, set[str]]:
    """Return what is called on each name: NAME.fullmatch(...), NAME[key].match(...)."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.value if isinstance(node.func.value, ast.Subscript) else node.func.value
            if isinstance(of, ast.Name) and node.func.attr in (
                *("match", "fullmatch", "search", "sub", "subn", "finditer", "findall", "split"),
            ):
                found.setdefault(of.id, set()).add(node.func.attr)
    return found


def _sample(pattern: str | bytes) -> str:
    """Return a short text that the pattern would begin to match: its literals, one character for anything else."""
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    return "".join(_one(part) for part in _parser.parse(text, re.VERBOSE if "\n" in text else 0))


def _one(part: Any) -> str:
    kind, value = str(part[0]), part[1]
    match kind:
        case "LITERAL":
            return chr(value)
        case "NOT_LITERAL" | "ANY":
            return "a"
        case "IN":
            return next((chr(low) for low in range(33, 127) if _is_in(chr(low), value)), "a")
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            return "".join(map(_one, value[2])) * max(1, min(int(value[0]), 8))
        case "SUBPATTERN":
            return "".join(map(_one, value[-1]))
        case "BRANCH":
            return "".join(map(_one, value[1][0]))
        case "GROUPREF_EXISTS":
            return "".join(map(_one, value[1]))
        case "ATOMIC_GROUP":
            return "".join(map(_one, value))
        case _:
            return ""  # an assertion


def _is_in(character: str, members: Any) -> bool:
    negated = str(members[0][0]) == "NEGATE"
    for kind, value in members:
        hit = (
            (str(kind) == "LITERAL" and ord(character) == value)
            or (str(kind) == "RANGE" and value[0] <= ord(character) <= value[1])
            or (str(kind) == "CATEGORY" and _in_category(character, str(value)))
        )
        if hit:
            return not negated
    return negated


def _in_category(character: str, category: str) -> bool:
    is_in = {
        "DIGIT": character.isdigit(),
        "SPACE": character.isspace(),
        "WORD": character.isalnum() or character == "_",
    }
    name = category.removeprefix("CATEGORY_")
    return not is_in[name.removeprefix("NOT_")] if name.startswith("NOT_") else is_in[name]
