"""The memory that is told before a run adds up, and what is left open is chosen to fit in it."""

from pathlib import Path

import pytest
import torch

from gearshift.cli import main
from gearshift.engine import EngineConfig
from gearshift.models.tiny import tiny_model
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.trainers.memory import GIB, Shape, micro_batch, parts_of, tokens_of, with_total
from gearshift.trainers.rl import RLConfig
from gearshift.trainers.sft import SFTConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA_1B = Shape(1_200_000_000, 16, 2048, 8192, 48, 8, 64, 128_256, 2)


def total(config: SFTConfig | RLConfig, engine: EngineConfig, free: float) -> float:
    parts = parts_of(config, engine, LLAMA_1B, LLAMA_1B.parameters, GPU)
    tokens, again = micro_batch(config, engine, LLAMA_1B, parts, free)
    parts["activations"] = tokens * LLAMA_1B.token(again)
    return with_total(parts)["total"]


def test_the_shape_of_a_model() -> None:
    model = tiny_model()
    shape = Shape.of(model, torch.float32)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.heads, shape.item) == (2, 32, 8, 4)
    assert shape.cache(rows=3, length=10) == 2 * 2 * 2 * 8 * 3 * 10 * 4  # k and v, layers, heads, D


def test_as_many_tokens_as_fit_and_no_more() -> None:
    config = SFTConfig(max_tokens=0, batch_size=512, max_length=4096)
    engine = EngineConfig()
    used = [total(config, engine, free) for free in (40 * GIB, 80 * GIB)]
    assert used[0] == pytest.approx(0.9 * 40 * GIB, rel=0.01)
    assert 40 * GIB < used[1] <= 72 * GIB * 1.01


def test_a_micro_batch_is_no_larger_than_the_update() -> None:
    config = RLConfig(max_tokens=0, prompts=2, group_size=2, max_new_tokens=16)
    parts = parts_of(config, EngineConfig(), LLAMA_1B, LLAMA_1B.parameters, CPU)
    tokens, again = micro_batch(config, EngineConfig(), LLAMA_1B, parts, 1e15)
    assert tokens == tokens_of(config) == 2 * (128 + 2 * 16) and not again


def test_layers_are_computed_again_only_where_they_would_not_fit() -> None:
    config = SFTConfig(max_tokens=32_768, batch_size=64)
    for engine, free, wanted in (
        (EngineConfig(), 200 * GIB, False),
        (EngineConfig(), 30 * GIB, True),
        (EngineConfig(recompute=False), 30 * GIB, False),
        (EngineConfig(recompute=True), 200 * GIB, True),
    ):
        parts = parts_of(config, engine, LLAMA_1B, LLAMA_1B.parameters, GPU)
        assert micro_batch(config, engine, LLAMA_1B, parts, free) == (32_768, wanted)
    assert LLAMA_1B.token(recompute=True) < 0.3 * LLAMA_1B.token()


def test_what_adapters_offload_and_8_bits_save() -> None:
    plain, engine = RLConfig(), EngineConfig()
    everything = sum(parts_of(plain, engine, LLAMA_1B, LLAMA_1B.parameters, GPU).values())
    adapters = sum(parts_of(plain, engine, LLAMA_1B, 10_000_000, GPU, adapters=True).values())
    for change in ({"moments": "8bit"}, {"offload": "always"}):
        config = RLConfig(optimizer=OptimizerConfig.model_validate(change))
        less = sum(parts_of(config, engine, LLAMA_1B, LLAMA_1B.parameters, GPU).values())
        assert adapters < less < everything


def test_gradients_are_summed_in_fp32_where_there_are_several_micro_batches() -> None:
    def gradients(**changes: int) -> float:
        config = SFTConfig(batch_size=4, max_length=1024, **changes)
        parts = parts_of(config, EngineConfig(), LLAMA_1B, LLAMA_1B.parameters, GPU)
        return parts["gradients"] / LLAMA_1B.parameters

    assert [gradients(max_tokens=n) for n in (4096, 4095, 0)] == [2, 6, 6]
    wide = Shape(*(6, 2, 8, 8, 3, 1, 8, 259), item=4)
    parts = parts_of(SFTConfig(max_tokens=8), EngineConfig(), wide, 6, GPU)
    assert parts["gradients"] == 4 * 6


def test_a_recipe_that_leaves_it_open_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
    overrides = ["sft.max_tokens=0", "rl.max_tokens=0", "reward=null", "rl.steps=1"]
    main(["run", recipe, "--dry-run", *overrides])
    out = capsys.readouterr().out
    assert "sft: " in out and "GiB  total" in out and "activations of" in out
    main(["run", recipe, f"run.dir={tmp_path / 'run'}", *overrides])
    assert (tmp_path / "run" / "summary.json").exists()
