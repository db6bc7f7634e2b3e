"""What the pages for users name is there: files, folders, commands, keys, modules, tests."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import gearshift
from gearshift.cli.main import make_parser
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.keys import describe_keys
from gearshift.tasks.registry import TASKS
from tests.pages import DOCS, PAGES, ROOT, blocks

SECTIONS = tuple(name for name in Recipe.model_fields if name != "task")  # its keys are its own
HISTORY = ("log.md", "results.md")
"""Pages that also tell of what was; the recipes in them need not load."""


def keys() -> set[str]:
    """Every key of a recipe, and every section of keys."""
    found = {
        re.sub(r"\[.*?\]|\.0(?=\.)", "", re.split(r"[ =:]", line.strip())[0])
        for line in describe_keys(Recipe)
    }
    sections = {".".join(key.split(".")[:i]) for key in found for i in range(1, key.count(".") + 1)}
    return found | sections


def named_in(tree: Any, above: str = "") -> list[str]:
    """The dotted keys of a YAML tree, lists looked through."""
    if isinstance(tree, list):
        return [key for item in tree for key in named_in(item, above)]
    if not isinstance(tree, dict):
        return [above]
    return [key for name, inner in tree.items() for key in named_in(inner, f"{above}.{name}")]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(page))
    here = [t for t in targets if "://" not in t and not t.startswith("mailto:")]
    missing = [t for t in here if not (page.parent / t).exists()]
    assert not missing


@pages
def test_commands_are_there(page: Path) -> None:
    [commands] = [a for a in make_parser()._actions if a.dest == "do" or a.choices]
    said = re.findall(r"^(?:\$ |\.venv/bin/)?gearshift ([a-z|-]+)", text_of(page), re.M)
    said += re.findall(r"`gearshift ([a-z|-]+)", text_of(page))
    names = {name for words in said for name in words.split("|")}
    assert names <= set(commands.choices or ())


@pages
def test_make_targets_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.M))
    assert set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text_of(page), re.M)) <= {
        pair for name in targets for pair in ((name, ""), ("", name))
    }


def test_the_hosts_files_are_right() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.M))
    folder = ROOT / ".github"
    found = {path: yaml.safe_load(text_of(path)) for path in folder.rglob("*.yml")}
    assert len(found) >= 4
    jobs = found[folder / "workflows" / "ci.yml"]["jobs"]
    run = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    parts = jobs["nightly"]["strategy"]["matrix"]["part"]
    assert set(re.findall(r"^make ([a-z-]+)", "\n".join(run), re.M)) | set(parts) <= targets
    for path in (ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"):
        assert yaml.safe_load(text_of(path))
    assert yaml.safe_load(text_of(ROOT / "CITATION.cff"))["version"] == gearshift.__version__


@pages
def test_keys_are_there(page: Path) -> None:
    text = re.sub(r"\S+\.(py|yaml|md|json|jsonl|so|cpp|lock)\b", "", text_of(page))
    said = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)[`=:]", text))
    assert said <= keys()


@pages
def test_keys_of_recipes_in_a_page_are_there(page: Path) -> None:
    if page.name in HISTORY:
        pytest.skip("it describes former recipes")
    for block in blocks(page):
        tree = yaml.safe_load(block.text) if block.language == "yaml" else None
        if not isinstance(tree, dict) or not set(tree) <= set(Recipe.model_fields):
            continue
        said = {key.lstrip(".") for key in named_in(tree)}
        unknown = {key for key in said if not key.startswith(("task.", "algorithm"))} - keys()
        assert not unknown, block.text


@pages
def test_whole_recipes_in_a_page_are_right(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml" and block.title:
            tree = yaml.load(block.text, yaml.CSafeLoader)
            if tree["task"]["name"] not in TASKS:  # the page makes that task
                tree["task"] = {"name": "sentiment"}
            Recipe.model_validate(tree)


@pages
def test_paths_are_there(page: Path) -> None:
    folders = "gearshift|tests|benchmarks|recipes|docs|examples"
    said = re.findall(rf"`((?:{folders})/[\w./-]*\w/?)`", text_of(page))
    missing = [path for path in said if not (ROOT / path).exists()]
    assert not missing


@pages
def test_modules_are_there(page: Path) -> None:
    said = re.findall(r"`(gearshift(?:\.\w+)+)`|from (gearshift(?:\.\w+)*) import", text_of(page))
    for name in {a or b for a, b in said} - {"gearshift.tasks"}:  # an entry-point group, too
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@pages
def test_programs_are_there(page: Path) -> None:
    for name in re.findall(r"python -m ((?:tests|benchmarks)(?:\.\w+)*)", text_of(page)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_every_promise_names_a_test_that_is_there() -> None:
    page = text_of(DOCS / "reliability.md")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "| tested in" not in line
    ]
    for row in rows:
        tests = re.findall(r"`(tests/[^`]+)`", row)
        assert tests and all((ROOT / test).exists() for test in tests), row


def test_every_page_is_in_the_site() -> None:
    site = text_of(ROOT / "mkdocs.yml")
    for page in DOCS.glob("*.md"):
        assert f": {page.name}\n" in site and (
            page.name == "index.md" or f"]({page.name})" in text_of(DOCS / "index.md")
        ), page.name
