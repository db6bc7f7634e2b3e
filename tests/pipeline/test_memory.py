"""The memory that is predicted before a run adds up, and open keys are chosen to fit in it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gearshift.cli.main import main
from gearshift.engine import EngineConfig
from gearshift.errors import ConfigError
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.models.tiny import tiny_model
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.machine import GIB, Machine
from gearshift.pipeline.memory import (
    _SAMPLED_BYTES,
    Shape,
    fit,
    micro_batch,
    parts_of,
    passing,
    shortage,
    with_total,
)
from gearshift.runtime import distributed
from gearshift.runtime.distributed import World
from gearshift.runtime.free_memory import free_bytes, of_control_groups
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.peak_memory import peak_memory
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.sft import SFTConfig

CPU, GPU = Machine(torch.device("cpu")), Machine(torch.device("cuda"))
LLAMA_1B = Shape(1_200_000_000, 16, 2048, 8192, 48, 64, 2 * 16 * 8 * 64 * 2, 128_256, 2)


class Told(Activations):
    """So many bytes a token as they are in a Llama of 1.2e9 weights."""

    def __init__(self) -> None:
        pass

    def bytes(self, tokens: int, recompute: bool) -> float:
        return tokens * (50_000.0 if recompute else 250_000.0)


def total(config: SFTConfig | RLConfig, engine: EngineConfig, free: float) -> float:
    parts = parts_of(config.memory_needs(), engine, LLAMA_1B, LLAMA_1B.parameters, GPU)
    tokens, again = micro_batch(config.memory_needs(), engine, Told(), parts, free)
    parts["activations"] = Told().bytes(tokens, again)
    return with_total(parts)["total"]


def test_the_shape_of_a_model() -> None:
    model = tiny_model()
    shape = Shape.of(model, torch.float32)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.hidden, shape.heads, shape.item) == (2, 32, 8, 4)
    assert shape.cache(rows=3, length=10) == 2 * 2 * 2 * 8 * 3 * 10 * 4  # k and v, layers, heads, D


def test_as_many_tokens_as_fit_and_no_more() -> None:
    config = SFTConfig(micro_batch_tokens=0, batch_size=512, max_length=4096)
    engine = EngineConfig()
    used = [total(config, engine, free) for free in (40 * GIB, 80 * GIB)]
    assert used[0] == pytest.approx(0.9 * 40 * GIB, rel=0.01)
    assert 38 * GIB < used[1] <= 72 * GIB * 1.01


def test_a_micro_batch_is_no_larger_than_the_update() -> None:
    config = RLConfig(
        update={"micro_batch_tokens": 0},
        rollout={"prompts": 2, "group_size": 2, "max_new_tokens": 16},
    )
    parts = parts_of(config.memory_needs(), EngineConfig(), LLAMA_1B, LLAMA_1B.parameters, CPU)
    tokens, again = micro_batch(config.memory_needs(), EngineConfig(), Told(), parts, 1e15)
    assert tokens == config.memory_needs().update_tokens == 2 * (128 + 2 * 16) and not again


def test_layers_are_computed_again_only_where_they_would_not_fit() -> None:
    config = SFTConfig(micro_batch_tokens=32_768, batch_size=64)
    for engine, free, wanted in (
        (EngineConfig(), 200 * GIB, False),
        (EngineConfig(), 30 * GIB, True),
        (EngineConfig(recompute=False), 30 * GIB, False),
        (EngineConfig(recompute=True), 200 * GIB, True),
    ):
        parts = parts_of(config.memory_needs(), engine, LLAMA_1B, LLAMA_1B.parameters, GPU)
        assert micro_batch(config.memory_needs(), engine, Told(), parts, free) == (32_768, wanted)


def test_what_adapters_offload_and_8_bits_save() -> None:
    plain, engine = RLConfig(), EngineConfig()
    everything = sum(
        parts_of(plain.memory_needs(), engine, LLAMA_1B, LLAMA_1B.parameters, GPU).values()
    )
    adapters = sum(
        parts_of(plain.memory_needs(), engine, LLAMA_1B, 10_000_000, GPU, adapters=True).values()
    )
    for change in ({"moments": "8bit"}, {"offload": "always"}):
        config = RLConfig(update={"optimizer": OptimizerConfig.model_validate(change)})
        less = sum(
            parts_of(config.memory_needs(), engine, LLAMA_1B, LLAMA_1B.parameters, GPU).values()
        )
        assert adapters < less < everything


@pytest.mark.parametrize("split", [1, 4])
def test_ranks_share_masters_and_moments_and_where_they_are_split_the_gradients(split: int) -> None:
    needs, count = SFTConfig(micro_batch_tokens=8).memory_needs(), LLAMA_1B.parameters
    machine = Machine(torch.device("cuda"), ranks=4, split=split)
    parts = parts_of(needs, EngineConfig(), LLAMA_1B, count, machine)
    assert parts["weights"] == 2 * count
    assert parts["fp32 masters"] + parts["moments"] == 12 * count / 4
    assert parts["sums of gradients"] == 4 * count / split
    own = passing(needs, LLAMA_1B, count, 0.0, split > 1)["gradients"]
    assert own == (0 if split > 1 else 2 * count), "LLAMA_1B names no tables"
    with_adapters = parts_of(needs, EngineConfig(), LLAMA_1B, 8, machine, adapters=True)
    assert with_adapters["fp32 masters"] == 4 * 8 / 4, "adapters are not split"


def test_each_rank_has_its_part_of_a_step() -> None:
    """An update that one micro-batch of each rank covers needs no sums in fp32."""
    config = RLConfig(update={"micro_batch_tokens": 4 * (128 + 8 * 64)})
    needs, count = config.memory_needs(), LLAMA_1B.parameters
    assert needs.rollout == (64, 192)
    for ranks, sums, rows in ((1, 4 * count, 64), (2, 0, 32), (4, 0, 16)):
        machine = Machine(torch.device("cpu"), ranks=ranks)
        found = fit(needs, EngineConfig(), LLAMA_1B, count, machine, Told(), False)
        assert found.parts["sums of gradients"] == sums
        assert f"KV cache of {rows} rows x 192 tokens" in found.parts


def test_a_freed_cache_counts_only_beyond_what_training_takes() -> None:
    needs, count = RLConfig().memory_needs(), LLAMA_1B.parameters
    machine = Machine(torch.device("cuda"), 79 * GIB, 80 * GIB)
    kept, freed = (
        fit(needs, EngineConfig.model_validate(keys), LLAMA_1B, count, machine, Told(), False)
        for keys in ({}, {"free_cache_while_training": True})
    )
    cache = kept.parts["KV cache (engine.gpu_memory_utilization)"]
    assert freed.parts["total"] < kept.parts["total"]
    over = freed.parts["cache, where it takes more than training"]
    assert 0 < over < cache


def test_another_machine_is_named() -> None:
    whole, fsdp = ScaleConfig(), ScaleConfig(strategy="fsdp")
    node = Machine.named("1x8x79", fsdp)
    assert (node.ranks, node.split, node.total) == (8, 8, 79 * GIB)
    assert Machine.named("8x8x139", fsdp).split == 8, "models are split inside a node"
    for asked, split in ((64, 64), (16, 16), (7, 64)):
        wider = ScaleConfig(strategy="fsdp", split=asked)
        assert Machine.named("8x8x139", wider).split == split
    assert Machine.named("8x8x139", whole).split == 1
    assert Machine.named("1x1x24", fsdp).split == 1
    for name in ("8", "8x8", "axbxc", "0x8x80", "1x8x-1", "1.5x1x80"):
        with pytest.raises(ConfigError, match="nodes x GPUs"):
            Machine.named(name, whole)


def test_ranks_on_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_bytes(CPU.device)
    monkeypatch.setattr(distributed, "_world", World(size=8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU.device) == pytest.approx(alone / 4, rel=0.2)


def test_gradients_are_summed_in_fp32_where_there_are_several_micro_batches() -> None:
    def gradients(**changes: int) -> float:
        config = SFTConfig(batch_size=4, max_length=1024, **changes)
        parts = parts_of(config.memory_needs(), EngineConfig(), LLAMA_1B, LLAMA_1B.parameters, GPU)
        own = passing(config.memory_needs(), LLAMA_1B, LLAMA_1B.parameters, 0.0)
        return (parts["sums of gradients"] + own["gradients"]) / LLAMA_1B.parameters

    assert [gradients(micro_batch_tokens=n) for n in (4096, 4095, 0)] == [2, 6, 6]
    wide = Shape(*(6, 2, 8, 8, 3, 8, 128, 259), item=4)
    parts = parts_of(SFTConfig(micro_batch_tokens=8).memory_needs(), EngineConfig(), wide, 6, GPU)
    assert parts["sums of gradients"] == 4 * 6
    assert passing(SFTConfig(micro_batch_tokens=8).memory_needs(), wide, 6, 0.0)["gradients"] == 0
    both = passing(SFTConfig().memory_needs(), LLAMA_1B, 7, 1e9)
    assert both == {"gradients": 14, "activations": 1e9 - 14}, "they come as these go"


def test_a_recipe_that_leaves_it_open_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
    overrides = [
        "sft.micro_batch_tokens=0",
        "rl.update.micro_batch_tokens=0",
        "reward=null",
        "rl.steps=1",
    ]
    main(["run", recipe, "--dry-run", *overrides])
    out = capsys.readouterr().out
    assert "sft: " in out and "GiB  total" in out and "activations of" in out
    main(["run", recipe, f"run.dir={tmp_path / 'run'}", *overrides])
    assert (tmp_path / "run" / "summary.json").exists()


def group(folder: Path, second: bool, most: str, used: int, cache: int) -> None:
    """A control group as the kernel shows it, in the second version or in the first."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current", "") if second else ("limit_in_bytes", "usage_in_bytes", "total_")
    (folder / f"memory.{names[0]}").write_text(f"{most}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]}inactive_file {cache}\n")


def test_a_control_group_leaves_its_limit_less_what_is_held(tmp_path: Path) -> None:
    listed = tmp_path / "cgroup"
    listed.write_text("0::/jobs/one\n")
    assert of_control_groups(listed, tmp_path / "two") == float("inf")
    group(tmp_path / "two" / "jobs" / "one", True, "max", 900, 0)
    assert of_control_groups(listed, tmp_path / "two") == float("inf")
    group(tmp_path / "two" / "jobs", True, "1000", 900, 300)
    assert of_control_groups(listed, tmp_path / "two") == 400, "the group above counts"
    group(tmp_path / "two" / "jobs" / "one", True, "500", 450, 30)
    assert of_control_groups(listed, tmp_path / "two") == 80
    group(tmp_path / "inside", True, "200", 50, 0)
    assert of_control_groups(listed, tmp_path / "inside") == 150, "a container's own is the top"
    listed.write_text("3:cpu,cpuacct:/x\n7:memory:/docker/abc\n")
    group(tmp_path / "one" / "memory" / "docker" / "abc", False, "700", 800, 200)
    assert of_control_groups(listed, tmp_path / "one") == 100
    assert of_control_groups(tmp_path / "none") == float("inf")


def test_the_limits_of_the_process_count() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 36, before[1]))
    try:
        assert free_bytes(CPU.device) < 1 << 36
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_what_is_not_there_is_told_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not shortage(2 * GIB, 2 * GIB, "sft.micro_batch_tokens")
    assert "may take 3.00 GiB and 2.00 GiB are free" in shortage(
        3 * GIB, 2 * GIB, "sft.micro_batch_tokens"
    )
    recipe = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
    main(["run", recipe, "--dry-run"])
    assert "NOT ENOUGH" not in capsys.readouterr().out
    main(["run", recipe, "--dry-run", "--on", "2x4x79", "rl.steps=1"])
    out = capsys.readouterr().out
    assert "on cuda, 8 ranks (replicate)" in out and "78.00 GiB are free" in out
    with pytest.raises(SystemExit):
        main(["run", recipe, "--on", "2x4x79"])
    assert "add --dry-run" in capsys.readouterr().err
    monkeypatch.setattr("gearshift.pipeline.machine.free_bytes", lambda device: -1e12)
    main(["run", recipe, "--dry-run"])
    assert "NOT ENOUGH MEMORY for " in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_by_tensor_functions_takes_what_is_counted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gearshift.runtime.peak_memory._LARGE", 1 << 40)  # compute all of it
    B, V = 16, 8000
    logits, tokens = torch.randn(B, V).to(dtype), torch.zeros(B, dtype=torch.int64)
    with peak_memory(CPU.device) as peak:
        uniforms = torch.full((B,), 0.5, dtype=torch.float64)
        ChunkedKernels().sample(logits, torch.ones(B), uniforms, tokens, torch.zeros(B))
        assert 0.9 * _SAMPLED_BYTES < peak() / (B * V) < 1.05 * _SAMPLED_BYTES


def test_the_cache_takes_what_the_engine_gives_it() -> None:
    """On a CPU what is written; on a GPU its share of the memory, beside the weights."""
    needs = RLConfig().memory_needs()
    assert needs.rollout is not None
    needed = LLAMA_1B.cache(*needs.rollout)

    def cache(kind: Machine, total: float, **keys: float) -> float:
        config, machine = EngineConfig.model_validate(keys), replace(kind, total=total)
        parts = parts_of(needs, config, LLAMA_1B, 1, machine)
        return next(size for name, size in parts.items() if name.startswith("KV cache"))

    assert cache(CPU, 80 * GIB) == cache(GPU, 0) == needed < 8 * GIB
    assert cache(GPU, 80 * GIB) == pytest.approx(0.3 * (80 * GIB - LLAMA_1B.weights))
    assert cache(GPU, 80 * GIB, gpu_memory_utilization=0.25) == 20 * GIB - LLAMA_1B.weights
    assert cache(GPU, 80 * GIB, max_length=64, max_num_seqs=64) <= needed
    assert cache(CPU, 80 * GIB, kv_cache_tokens=1024) == LLAMA_1B.cache(1, 1024)
    assert cache(CPU, 80 * GIB, kv_cache_tokens=1 << 20) == needed
    assert cache(GPU, 80 * GIB, kv_cache_tokens=1 << 20) == LLAMA_1B.cache(1, 1 << 20)
