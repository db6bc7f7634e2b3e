"""Pages that show a whole example work as they are written: files, commands, what is printed."""

from pathlib import Path

import pytest

from tests.pages import DOCS, programs, run_page


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    printed = run_page(DOCS / "tutorial.md", tmp_path, programs(tmp_path / "bin"))
    assert len(printed) > 5
    assert (tmp_path / "runs/dates/report.html").exists()
    assert (tmp_path / "runs/dates/rl/model.safetensors").exists()


@pytest.mark.slow
def test_an_environment_of_ones_own_runs(tmp_path: Path) -> None:
    run_page(DOCS / "environments.md", tmp_path, programs(tmp_path / "bin"))
    assert (tmp_path / "runs/backwards/rl/model.safetensors").exists()
