"""Pages that show a whole example work as they are written: files, commands, what is printed."""

import json
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from benchmarks.closed_loop import SMALL, person
from tests.pages import DOCS, ROOT, blocks, programs, run_page
from tests.serve.browser import needs_browser


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    printed = run_page(DOCS / "tutorial.md", tmp_path, programs(tmp_path / "bin"))
    assert len(printed) > 5
    assert (tmp_path / "runs/dates/report.html").exists()
    assert (tmp_path / "runs/dates/rl/model.safetensors").exists()


@needs_browser
@pytest.mark.slow
def test_the_loop_of_labels_closes(tmp_path: Path) -> None:
    answers = []

    def visit(command: str, url: str) -> None:
        if command.startswith("gearshift label"):
            person(url, 8, random.Random(0), guesses=True)
            return
        for model in ("policy", "base"):
            body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
            request = urllib.request.Request(
                f"{url}v1/chat/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as answer:
                answers.append((model, json.load(answer)["usage"]["completion_tokens"]))

    words = {"run": SMALL, "serve": ["--port", "0"], "label": ["--port", "0"]}
    run_page(DOCS / "closed_loop.md", tmp_path, programs(tmp_path / "bin", words), visit)
    assert len(answers) == 4
    done = json.loads((tmp_path / "runs/judge/reward/done.json").read_text())
    assert done["pairs"] == 8
    assert (tmp_path / "runs/second/test/rl.json").exists()


@pytest.mark.slow
def test_an_environment_and_a_task_of_ones_own_run(tmp_path: Path) -> None:
    run_page(DOCS / "environments.md", tmp_path, programs(tmp_path / "bin"))
    for run in ("backwards", "greetings"):
        assert (tmp_path / "runs" / run / "rl" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_example_of_the_first_page_runs(tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin")
    [example] = [block for block in blocks(ROOT / "README.md") if block.title]
    text = example.text.replace('"embedded"', '"tiny"')
    (tmp_path / example.title).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["python", example.title], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/shout/rl"


def test_the_figure_shows_the_text_beside_it() -> None:
    figures = DOCS / "figures"
    drawn = subprocess.run(
        [sys.executable, figures / "terminal.py"],
        input=(figures / "tutorial.txt").read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert drawn.stdout == (figures / "tutorial.svg").read_bytes()
