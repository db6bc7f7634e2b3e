"""A file of a run, or one that it is made from, that is not as it was stops the run: one line that
names it. Put back, the same command goes on.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gearshift.cli.main import main

TINY = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
pytestmark = pytest.mark.slow


def rows(path: Path, count: int) -> Path:
    some = [{"prompt": f"turn on lamp {i}", "completion": f"lamp {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def words(place: Path) -> list[str]:
    """SFT on the user's rows from a model in a folder, a reward model, RL under a function."""
    return [
        TINY, f"run.dir={place / 'run'}", f"model.name={place / 'base'}", "eval.limit=2",
        f"sft.data.sources=[{{path: '{place / 'rows.jsonl'}'}}]", "rl.steps=2", "rl.save_every=1",
        f"rl.rewards=[{{source: model}}, {{source: '{place / 'rewards.py'}:one'}}]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reinforcement learning has a checkpoint, of its first step, and no end."""
    place = tmp_path_factory.mktemp("changed") / "place"
    place.mkdir()
    rows(place / "rows.jsonl", 12)
    base = [TINY, f"run.dir={place / 'first'}", "task=null", "reward=null", "rl=null"]
    main(["sft", *base, f"sft.data.sources=[{{path: '{place / 'rows.jsonl'}'}}]"])
    shutil.copytree(place / "first" / "sft", place / "base")
    shutil.rmtree(place / "first")
    for other in ("done.json", "metrics.jsonl"):
        (place / "base" / other).unlink()
    one = "def one(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
    (place / "rewards.py").write_text(one)
    main(["run", *words(place)])
    (place / "run/rl/done.json").unlink()
    return place


def flipped(data: bytes) -> bytes:
    at = len(data) // 4
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 4],
    "flipped": flipped,
    "emptied": lambda data: b"",
}
FILES = [
    "run/data/train.jsonl", "run/data/done.json", "rows.jsonl", "run/sft/model.safetensors",
    "run/sft/config.json", "run/sft/done.json", "run/reward/model.safetensors", "run/run.json",
    "run/reward/tokenizer.json", "run/rl/checkpoints/step-000001/manifest.json",
    "run/rl/rollouts.jsonl", "run/validation/base.json", "base/model.safetensors",
    "run/sft/metrics.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_one_line_that_names_it(
    place: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / name
    before = path.read_bytes()
    path.write_bytes(CHANGES[how](before))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["run", *words(place)])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 1 and said.startswith("gearshift: "), said
        assert path.name in said and ("put it back" in said or "put that back" in said), said
        assert path.read_bytes() == CHANGES[how](before), "nothing is made of it"
    finally:
        path.write_bytes(before)


def test_it_goes_on_when_all_is_as_it_was(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    function = place / "rewards.py"
    before = (place / "run/rl/model.safetensors").read_bytes()
    function.write_text(function.read_text() + "# the same, said again\n")
    main(["run", *words(place)])
    out = capsys.readouterr().out
    assert "rewards.py changed since step 1; what comes is rewarded by it" in " ".join(out.split())
    assert (place / "run/rl/model.safetensors").read_bytes() == before
    unused = [place / name for name in ("base", "rows.jsonl", "run/data/train.jsonl")]
    for path in unused:
        path.rename(f"{path}.away")
    main(["run", *words(place), "rl.keep=5"])  # a finished run needs none of it for its table
    assert "rl: done before, kept" in capsys.readouterr().out
    for path in unused:
        Path(f"{path}.away").rename(path)


@pytest.mark.parametrize("command", ["generate", "serve", "eval"])
def test_who_uses_a_model_is_told_of_a_flipped_bit(
    place: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = place / "run" / ("reward" if command == "serve" else "rl")
    more = {"generate": ["on"], "serve": ["--port", "0"], "eval": ["--split", "test"]}[command]
    where = stage if command == "serve" else place / "run"
    weights = stage / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(flipped(before))
    try:
        with pytest.raises(SystemExit):
            main([command, str(where), *more])
    finally:
        weights.write_bytes(before)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{weights} is not as the run wrote it (its digest is wrong)" in said
