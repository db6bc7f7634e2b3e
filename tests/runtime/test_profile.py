"""`--profile` writes a Chrome trace of two steps, and leaves the run as it is."""

import json
from pathlib import Path

import pytest
import torch

from gearshift.cli.main import main
from gearshift.runtime.profile import profiled

RECIPE = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")


def names(path: Path) -> list[str]:
    return [str(event.get("name")) for event in json.loads(path.read_text())["traceEvents"]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_the_second_and_third_step_are_recorded(count: int, tmp_path: Path) -> None:
    path, steps = tmp_path / "profile.json", range(4, 4 + count)
    seen = []
    for step in profiled(steps, path):
        with torch.profiler.record_function(f"step {step}"):
            seen.append(step)
    assert seen == list(steps)
    assert path.exists() == (count > 0)
    if count:
        recorded = steps[1:3] if count > 2 else steps
        found = [s for s in steps if f"step {s}" in names(path)]
        assert found == list(recorded)


def test_a_run_writes_its_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", RECIPE, f"run.dir={tmp_path}", "reward=null", "--profile"]
    main(words)
    for stage in ("sft", "rl"):
        path = tmp_path / stage / "profile.json"
        assert str(path) in capsys.readouterr().out or stage == "rl"
        assert any(name.startswith("aten::") for name in names(path))
    main([word for word in words if word != "--profile"])  # the same run: nothing is done again
