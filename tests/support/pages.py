"""README.md and the pages of docs/, as tests read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


class Page:
    """One Markdown file, named by its path in the repository."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = ROOT / name
        self.text = self.path.read_text(encoding="utf-8")

    def __repr__(self) -> str:
        return self.name

    def section(self, title: str) -> str:
        """Return what is under a heading, down to the next one of its rank."""
        found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", self.text, re.MULTILINE | re.DOTALL)
        assert found, f"{self.name} has no section {title!r}"
        return found[2]

    def examples(self) -> list[tuple[str, str]]:
        """Return language and text of each fenced block, in order."""
        return [
            (language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE))
            for indent, language, code in _FENCE.findall(self.text)
        ]

    def blocks(self, language: str) -> list[str]:
        """Return the fenced blocks of a language, in order."""
        return [code for known, code in self.examples() if known == language]

    def prose(self) -> str:
        """Return the page without fenced blocks."""
        return _FENCE.sub("", self.text)

    def links(self) -> list[str]:
        """Return the targets of links and pictures."""
        return _LINK.findall(re.sub(r"`[^`\n]*`", "code", self.prose()))

    def anchors(self) -> set[str]:
        """Return what links may name after a #, as forges and the site make it of headings."""
        return {slug(heading) for heading in _HEADING.findall(self.prose())}

    def commands(self) -> list[str]:
        """Return the `dovecote` and `./dev` command lines in code and between backticks, without their first word."""
        code = "\n".join(line[4:].removeprefix("$ ") for line in self.text.splitlines() if line.startswith("    "))
        fenced = "\n".join(block for language, block in self.examples() if language in ("sh", "text"))
        lines = re.sub(r"\\\n\s*", "", f"{code}\n{fenced}").splitlines()
        quoted = [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose())]
        return [
            found[1]
            for line in [*lines, *quoted]
            if (found := re.match(r"(?:\w+: )?(?:\./dev|dovecote) ([a-z].*)", line))
        ]


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain))


#: Pages for readers, references included; decisions are history, and named apart.
PAGES = [Page("README.md")] + [
    Page(str(path.relative_to(ROOT))) for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "adr"
]
DECISIONS = [Page(str(path.relative_to(ROOT))) for path in sorted((DOCS / "adr").glob("*.md"))]
