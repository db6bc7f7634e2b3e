"""`gearshift ray`: a run on Ray's workers has the bits of one under torchrun; a worker that ends is
started again. `make test-beside` installs Ray.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gearshift.cli.main import main

SMALL = Path(__file__).parents[1] / "smoke" / "tiny.yaml"
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")
REWARD = """
import os
calls = []
def dies(prompts, completions, **columns):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3 and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(9)
    return [len(set(text)) / 10 for text in completions]
"""
WORDS = ["sft=null", "reward=null", "rl.steps=4", "rl.save_every=1", "run.dir=run"]


def command(place: Path, *words: str) -> str:
    """Run it in this folder, and give what it prints; it must end well."""
    place.mkdir(exist_ok=True)
    (place / "reward.py").write_text(REWARD)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=place, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_without_ray_the_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as exit:
        main(["ray", str(SMALL), f"run.dir={tmp_path}", "--workers", "2"])
    assert exit.value.code == 1
    assert "pip install 'gearshift[ray]'." in capsys.readouterr().err


def test_a_number_of_workers_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ray", str(SMALL), "--workers", "0"])
    assert "--workers is 0; give at least 1." in capsys.readouterr().err


@needs_ray
@pytest.mark.slow
def test_a_worker_that_ends_is_started_again_and_the_bits_are_torchruns(tmp_path: Path) -> None:
    rewards = 'rl.rewards=[{source: "reward.py:dies"}]'
    hurt, whole = tmp_path / "hurt", tmp_path / "whole"
    ray = ["gearshift", "ray", str(SMALL), *WORDS, rewards, "--workers", "2"]
    printed = command(hurt, *ray, "--max-failures", "1")
    assert (hurt / "died").exists() and "talk to it: gearshift chat run" in printed
    whole.mkdir()
    (whole / "died").touch()
    ranks = ["--standalone", "--nproc-per-node=2", "-m", "gearshift", "run"]
    command(whole, "torch.distributed.run", *ranks, str(SMALL), *WORDS, rewards)
    one, other = (load_file(place / "run/rl/model.safetensors") for place in (hurt, whole))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
