"""The field's words, everywhere: a private word that was replaced does not come back (docs/glossary.md)."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each begins with its first letter in brackets, so that a search for the word does not find this list.
PRIVATE = (
    "[f]acts?",
    "[h]orizon",
    "[f]rontiers?",
    "[h]oles?",
    "[b]ells?",
    "[s]tor(?:y|ies)",
    "[t]old",
    "[t]ells?",
    "[a]t[ _]work",
    "[h]and(?:s|ed|ing)?[ _]back",
    "[l]et(?:s|ting)?[ _]go",
    "[p]ut[ _]aside",
    "[s]uspects?",
    "[s]tand[-_ ]ins?",
    "[s]trays?",
    "[o]bstacles?",
    "[f]orget[-_]handler",
    "[r]emed(?:y|ies)",
    "[s]trengths?",
    "[s]urveys?",
    "[m]eters?",
    "[g]oodbyes?",
    "[p]atience",
    "(?:un)?[s]eal(?:s|ed|ing)?",
    "[m]ake_ours",
    "[m]oments?",
    "[w]hoever",
    "[r]equested_by",
    "[p]aused_by",
    "[d]ropped_by",
    "(?-i:[M]OST_[A-Z]+)",
)
WORD = re.compile("|".join(f"(?<![A-Za-z])(?:{word})(?![a-z])" for word in PRIVATE), re.IGNORECASE)
# It says once how names have changed; and pictures and locks hold no prose.
ELSEWHERE = {"CHANGELOG.md"}
NO_PROSE = (".svg", ".png", ".lock", ".txt", ".json")


def test_no_private_word_comes_back() -> None:
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if name in ELSEWHERE or name.endswith(NO_PROSE) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {match[0]}" for match in WORD.finditer(line)]

    assert found == [], "use the field's word: docs/glossary.md and CONTRIBUTING.md"
