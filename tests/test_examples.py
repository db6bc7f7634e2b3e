"""The examples run as they are written, on the tiny model in place of the embedded one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.pages import DOCS, ROOT, blocks

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 40


def run(text: str, path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run a program in the folder, in this process, as a script."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text.replace('"embedded"', '"tiny"'), str(path), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    run(text, path, monkeypatch, tmp_path)
    assert capsys.readouterr().out.strip()


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "gearshift.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3 and not any("%" in text[:1] for text in code)
    run("\n".join(code), path, monkeypatch, tmp_path)


def test_the_page_of_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "python.md"
    for block in blocks(page):
        if block.language == "python" and block.title != "sketch":
            with contextlib.suppress(FileExistsError):
                (tmp_path / "rewards.py").touch()
            run(block.text, page, monkeypatch, tmp_path)
