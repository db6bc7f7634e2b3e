"""The examples run as they are written, on the tiny model in place of the embedded one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.pages import DOCS, ROOT, blocks

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "gearshift.ipynb"
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
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3 and not any("%" in text[:1] for text in code)
    run("\n".join(code), NOTEBOOK, monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_kernel_runs_the_notebook(tmp_path: Path) -> None:
    """As Jupyter does: cell after cell in a kernel, whose loop runs meanwhile."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        cell.source = cell.source.replace('"embedded"', '"tiny"')
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    shown = [output for cell in code for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    values = [output for output in shown if output.output_type == "execute_result"]
    assert len(values) == len(code), "each cell ends with a value that is shown"


def test_the_page_of_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "python.md"
    for block in blocks(page):
        if block.language == "python" and block.title != "sketch":
            with contextlib.suppress(FileExistsError):
                (tmp_path / "rewards.py").touch()
            run(block.text, page, monkeypatch, tmp_path)
