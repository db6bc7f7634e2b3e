"""`scale.strategy: deepspeed`: DeepSpeed keeps the optimizer, and one process's run comes out. The
checks are in `zero.py`.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import load
from gearshift.runtime.deepspeed_config import DeepSpeedConfig, require_deepspeed
from gearshift.runtime.deepspeed_engines import engine_settings
from tests.scale.test_fsdp import ROOT, SMOKE
from tests.scale.zero import CHECKS

needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is missing")
CHOSEN = "scale.strategy=deepspeed"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "tests.scale.zero", str(tmp_path_factory.mktemp("ranks")),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    return done.stdout + ("" if done.returncode == 0 else done.stderr[-6000:])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks_do_what_one_process_does(name: str, printed: str) -> None:
    assert f"{name}: same\n" in printed, printed


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'gearshift\[deepspeed\]'"):
        require_deepspeed()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["scale.deepspeed.stage=0", CHOSEN], "take stage 1, or strategy=replicate"),
        (["scale.deepspeed.stage=1"], "strategy is not deepspeed"),
        (["rl.update.optimizer.offload=always", CHOSEN], "scale.strategy=deepspeed"),
        (["sft.optimizer.moments=8bit", CHOSEN], "scale.strategy=deepspeed"),
    ],
)
def test_what_is_not_built_is_refused_with_the_recipe(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(Recipe, SMOKE, words)


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "counts gradients twice"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.lr, .* decide this"),
        ({"gradient_clipping": 1.0}, "optimizer.max_grad_norm decides this"),
        ({"fp16": {"enabled": True}}, "model.dtype decides this"),
        ({"hybrid_engine": {"enabled": True}}, "does not support it"),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm"),
        ({"zero_optimization": {"stage": 3}}, "scale.deepspeed.stage decides this"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "scale.deepspeed.offload decides this",
        ),
        ([], "is not a DeepSpeed file"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_setting_that_cannot_be_merged_is_refused_by_name(
    tree: Any, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=why):
        load(Recipe, SMOKE, [CHOSEN, f"scale.deepspeed.config={path}"])


def test_a_file_is_merged_in(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    offload = {"device": "cpu", "pin_memory": True}
    given = {"stage": 1, "reduce_bucket_size": 1000, "offload_optimizer": offload}
    path.write_text(json.dumps({"communication_data_type": "fp32", "zero_optimization": given}))
    config = DeepSpeedConfig.model_validate({"stage": 1, "offload": "cpu", "config": str(path)})
    settings = engine_settings(torch.bfloat16, config, 1)
    assert settings["communication_data_type"] == "fp32"
    assert settings["bf16"] == {"enabled": True}
    assert given.items() <= settings["zero_optimization"].items()
