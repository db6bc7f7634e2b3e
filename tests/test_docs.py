"""What the pages for users name is there: files, commands, keys."""

import re
from pathlib import Path

import pytest

from gearshift.cli.main import _parser
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import describe_keys

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = tuple(name for name in Recipe.model_fields if name != "task")  # its keys are its own


def keys() -> set[str]:
    """Every key of a recipe, and every section of keys."""
    found = {re.split(r"[ =:]", line.strip())[0] for line in describe_keys(Recipe)}
    return found | {key.rpartition(".")[0] for key in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    here = [t for t in targets if "://" not in t and not t.startswith("mailto:")]
    missing = [t for t in here if not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_there(page: Path) -> None:
    [commands] = [a for a in _parser()._actions if a.dest == "do" or a.choices]
    said = re.findall(r"^(?:\$ )?gearshift ([a-z|-]+)", page.read_text(encoding="utf-8"), re.M)
    said += re.findall(r"`gearshift ([a-z|-]+)", page.read_text(encoding="utf-8"))
    names = {name for words in said for name in words.split("|")}
    assert names <= set(commands.choices or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_are_there(page: Path) -> None:
    known = keys()
    text = re.sub(
        r"\S+\.(py|yaml|md|json|jsonl|so|cpp|lock)\b", "", page.read_text(encoding="utf-8")
    )
    said = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)[`=:]", text))
    assert said <= known


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "| tested in" not in line
    ]
    for row in rows:
        tests = re.findall(r"`(tests/[^`]+)`", row)
        assert tests and all((ROOT / test).exists() for test in tests), row
