"""The pages are true: what is generated is fresh, what is named exists, every link holds, the site builds."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import dovecote
from docs import generate, pictures
from dovecote.cli import app
from dovecote.settings import options
from tests.support.metrics_catalogue import sample_names
from tests.support.pages import DECISIONS, DOCS, PAGES, ROOT, Page

DESIGN = ROOT.parent / "shared" / "DESIGN.md"
README = Page("README.md")
PROMISES = Page("docs/design/promises.md")

#: Markdown beside docs/ whose links must hold as well.
OTHERS = [
    Page(str(path.relative_to(ROOT)))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tests/*/README.md"))
    if path.name != "README.md" or path.parent != ROOT
]


# Generated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_fresh(name: str) -> None:
    assert Page(f"docs/{name}").text == generate.page(name), f"docs/{name} is stale: run `./dev docs --pages`"


@pytest.mark.parametrize("name", generate.PAGES_OF_DATABASE)
def test_a_page_of_the_database_is_fresh(name: str, database_url: str) -> None:
    fresh = generate.page(name, database_url)

    assert Page(f"docs/{name}").text == fresh, f"docs/{name} is stale: run `./dev docs --pages`"


def test_every_table_to_query_and_each_of_its_columns_has_a_meaning() -> None:
    page = Page("docs/reference/tables.md")

    for name in generate.TO_QUERY:
        meaning, *columns = page.section(name).strip().split("\n| `")
        assert meaning.partition("\n\n")[0].endswith("."), name
        assert [f"{name}.{column.partition('`')[0]}" for column in columns if column.rstrip().endswith("|  |")] == []


def test_the_api_page_has_every_public_name() -> None:
    named = re.findall(r"^::: dovecote\.(\w+)$", Page("docs/reference/api.md").text, re.MULTILINE)

    assert sorted(named) == sorted(dovecote.__all__)


@pytest.mark.parametrize("name", pictures.COMMANDS)
def test_a_picture_asks_the_network_for_nothing(name: str) -> None:
    picture = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")

    assert re.findall(r"(?:href=|src=|url\()[\"']?(?!#)[^\"')]+", picture) == []


# Names -------------------------------------------------------------------------------------------

ROOT_COMMAND = get_command(app)
OF_THE_CHECKOUT = {"bench", "chaos", "docs", "help", "mutations", "setup", "test"}


def unknown_in(line: str) -> list[str]:
    """Return what is no command, or no option of it, in a line such as `deliveries list --rows  # a comment`."""
    words = shlex.split(line, comments=True)
    command = ROOT_COMMAND
    context = typer.Context(command)
    if words[0] in OF_THE_CHECKOUT:
        return []
    while words and isinstance(command, typer.core.TyperGroup):
        if words[0] not in command.list_commands(context):
            return words[:1]
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    if command.name == "exec":
        return []
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words if word.startswith("--") and word not in known | {"--help"}]


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_every_command_that_a_page_names_exists(page: Page) -> None:
    assert {line: unknown for line in page.commands() if (unknown := unknown_in(line))} == {}


def test_the_front_door_and_the_quickstart_name_commands_to_begin_with() -> None:
    named = {line.split()[0] for page in (README, Page("docs/quickstart.md")) for line in page.commands()}

    assert {"up", "test", "status", "demo", "exec", "ingest", "relay", "setup"} <= named


def test_dev_lists_the_commands_of_the_checkout() -> None:
    shown = subprocess.run([str(ROOT / "dev"), "help"], capture_output=True, text=True, timeout=30, check=True).stdout

    for word in OF_THE_CHECKOUT:
        assert f"./dev {word}" in shown


@pytest.mark.parametrize("page", [*PAGES, *DECISIONS], ids=repr)
def test_every_setting_that_a_page_names_exists(page: Page) -> None:
    named = set(re.findall(r"DOVECOTE_[A-Z]+__\w+", page.text))

    assert {name.removesuffix("_FILE") for name in named} <= {option["long"] for option in options()}


# Roles, and names in Postgres, look like metrics.
NO_METRICS = re.compile(r"dovecote_(owner|worker|service|writer|viewer|operator|version)")


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_every_metric_and_alert_that_a_page_names_exists(page: Page) -> None:
    metrics = {name for name in re.findall(r"\bdovecote_\w+", page.text) if not NO_METRICS.fullmatch(name)}
    alerts = set(re.findall(r"`(Dovecote[A-Z]\w+)`", page.text)) - set(dovecote.__all__)

    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in sample_names()}
    assert metrics <= known
    written = (ROOT / "monitoring" / "alerts.yml").read_text(encoding="utf-8")
    assert [name for name in alerts if f"alert: {name}\n" not in written] == []


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_every_file_that_a_page_names_is_there(page: Page) -> None:
    quoted = re.findall(
        r"`((?:dovecote|domain|workers|docs|migrations|tests|monitoring|containers)/[\w/.-]*)`", page.text
    )
    made = {"containers/secrets"}

    assert [name for name in quoted if name not in made and not (ROOT / name).exists()] == []


def test_every_attack_on_the_security_page_has_the_test_that_it_names() -> None:
    page = Page("docs/design/security-model.md")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?` \|$", page.text, re.MULTILINE)

    assert len(named) > 30
    for file, test in named:
        text = (ROOT / "tests" / "security" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test or 'test_'}", text, re.MULTILINE), (file, test)


# Links and lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *DECISIONS, *OTHERS], ids=repr)
def test_every_link_holds(page: Page) -> None:
    broken = []
    for link in page.links():
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        if not path.exists() or (DOCS in page.path.parents and DOCS not in path.parents):
            broken.append(link)  # the site is made of docs/ alone
        elif anchor and anchor not in Page(str(path.relative_to(ROOT))).anchors():
            broken.append(link)

    assert broken == []


def test_the_front_door_is_one_page() -> None:
    lines = README.text.splitlines()

    assert 120 <= len(lines) <= 170
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_prose_is_no_wider_than_code(page: Page) -> None:
    assert [line for line in page.text.splitlines() if len(line) > 120 and not line.startswith(("|", "- ["))] == []


# The site ----------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_of_the_site_and_on_its_first_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/-]+\.md)$", navigation, re.MULTILINE)
    pages = [str(page.path.relative_to(DOCS)) for page in PAGES[1:]]

    assert sorted(listed) == sorted(pages)
    assert sorted({*Page("docs/index.md").links(), "index.md"}) == sorted(pages)


@pytest.mark.skipif(find_spec("zensical") is None, reason="the extra `docs` is not installed")
def test_the_site_builds_strictly_can_be_searched_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")  # it must be beside its configuration, and the site is not
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for here, there in (("site_dir: .cache/site", "site_dir: site"), ("paths: [.]", f"paths: [{ROOT}]")):
        assert here in config
        config = config.replace(here, there)
    (tmp_path / "mkdocs.yml").write_text(config)

    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    assert built.returncode == 0, built.stdout + built.stderr
    found = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.html")}
    for page in PAGES[1:] + DECISIONS:
        place = Path(page.name).relative_to("docs").with_suffix("")
        assert (place.parent if place.name == "index" else place) / "index.html" in found
    for path in found:
        html = (tmp_path / "site" / path).read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", html
        )
        assert loaded == [], path
    searched = json.dumps(json.loads((tmp_path / "site" / "search.json").read_text(encoding="utf-8")))
    for word in ("run_unit_of_work", "DOVECOTE_RELAY__BATCH_SIZE", "low-water mark"):
        assert word in searched


# Promises and decisions --------------------------------------------------------------------------


def promises(text: str) -> dict[str, str]:
    """Number and words of each row `| P1 | words | ... |`."""
    return {number: words.strip() for number, words in re.findall(r"^\| (P\d+) \| ([^|]+)\|", text, re.MULTILINE)}


def test_there_are_twelve_promises_and_the_front_door_has_as_many() -> None:
    assert list(promises(PROMISES.text)) == [f"P{number}" for number in range(1, 13)]
    assert len(re.findall(r"^\d+\. ", README.section("What is promised"), re.MULTILINE)) == 12


@pytest.mark.skipif(not DESIGN.exists(), reason="the design is not beside this checkout")
def test_the_promises_are_the_design_s_word_for_word() -> None:
    assert promises(PROMISES.text) == promises(DESIGN.read_text(encoding="utf-8"))


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [page.path.name[:4] for page in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    assert len(DECISIONS) >= 10


@pytest.mark.parametrize("page", DECISIONS, ids=repr)
def test_a_decision_is_one_page_with_its_four_parts(page: Page) -> None:
    assert re.match(rf"# {page.path.name[:4]}\. [A-Z]", page.text)
    assert re.findall(r"^## (.+)$", page.text, re.MULTILINE) == [
        "Context",
        "Decision",
        "Alternatives",
        "Consequences",
    ]
    assert len(page.text.splitlines()) <= 80


@pytest.mark.parametrize("folder", ["dovecote", "domain", "workers", "migrations", "tests", "benchmarks"])
def test_every_page_that_the_code_names_is_there(folder: str) -> None:
    named = {
        name
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sql", ".lua")
        for name in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8"))
    }

    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
