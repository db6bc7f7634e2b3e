"""Step 9: what is held, what is given back, and what fits."""

from __future__ import annotations

import gc
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_of, llama, model_of, prompts_of, quick_limits
from benchmarks.gpu_check.probe import GIB, Probe
from gearshift.models.from_pretrained import without_bars
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.types import SamplingParams


def held(probe: Probe) -> None:
    """Bytes by purpose after a rollout; the cache is there again while the policy trains."""
    rows = probe.size(64, 4)
    engine = engine_of(
        probe, "1B", max_length=probe.size(1024, 64), max_num_seqs=rows,
        free_cache_while_training=True,
    )  # fmt: skip
    gc.collect()
    before = probe.allocated()
    with engine.generating():
        prompts = prompts_of(engine, rows, probe.size(128, 8))
        engine.generate(prompts, SamplingParams(max_new_tokens=probe.size(32, 4)))
    parts = engine.memory()
    probe.shows("1B: held by the engine", {k: x / GIB for k, x in parts.items() if x}, "GiB")
    with engine.training():
        kept = probe.allocated() - before
    if probe.cuda:
        share = 1 - kept / max(1, parts["cache"])
        probe.holds("1B: share of the cache that is back", share >= 0.9, share, ">= 0.9")
    else:
        probe.holds("1B: the cache is given back", engine.memory()["cache"] == 0)


def long_prompt(probe: Probe) -> None:
    """A prompt of 32k tokens."""
    length, new = probe.size(32_768, 90), probe.size(8, 2)
    engine = engine_of(probe, "1B", max_length=length + 16, max_num_seqs=2)
    prompt = prompts_of(engine, 1, length)

    def write() -> None:
        with engine.generating():
            [[completion]] = engine.generate(prompt, SamplingParams(max_new_tokens=new))
        assert len(completion.token_ids) == new

    seconds = probe.wall(write)
    probe.holds(f"1B: a prompt of {length} tokens", True, length / seconds, "no error", "tokens/s")


def offloaded(probe: Probe) -> None:
    """The optimizer's state leaves the card while the policy generates, and comes back."""
    model = model_of(probe, llama(probe, "1B"))
    config = OptimizerConfig(offload="while_generating")
    optimizer = MasterAdamW(model.parameters(), config, 10)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    step()
    size, before = optimizer.nbytes(), probe.allocated()
    away = probe.wall(optimizer.offload_state)
    probe.tidy()
    freed = before - probe.allocated()
    back = probe.wall(step)
    told = {"away": away, "GB/s": size / away / 1e9, "back, with a step": back}
    probe.shows(f"1B: {size / GIB:.2f} GiB of the optimizer offloaded", told)
    if probe.cuda:
        probe.holds("1B: share that left the card", freed >= 0.9 * size, freed / size, ">= 0.9")


def crowded(probe: Probe) -> None:
    """A stage whose sizes are left open, on a quarter of the card: it may halve, and must end."""
    from gearshift import train_sft

    quick_limits(probe)
    if probe.cuda:
        torch.cuda.set_per_process_memory_fraction(0.25)
    rng = random.Random(0)
    texts = [
        "".join(rng.choice("abcdefghij ") for _ in range(probe.size(900, 20)))
        for _ in range(probe.size(96, 4))
    ]
    with tempfile.TemporaryDirectory() as place:
        model = model_of(probe, llama(probe, "135M"))
        folder = Path(place) / "model"
        with without_bars():
            model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        del model
        probe.tidy()
        result = train_sft(
            str(folder), texts, output=Path(place) / "run", verbose=False, epochs=1,
            batch_size=probe.size(48, 2), micro_batch_tokens=0, device=str(probe.device),
            dtype="bfloat16",
        )  # fmt: skip
    if probe.cuda:
        torch.cuda.set_per_process_memory_fraction(1.0)
    steps = result.metrics
    probe.holds("135M: micro_batch_tokens=0 on a quarter", len(steps) == 2, len(steps), "2 steps")


def narrow_moments(probe: Probe) -> None:
    """8-bit moments."""
    if find_spec("torchao") is None:
        probe.omits("8-bit moments", "the package torchao is not installed")
        return
    sizes = {}
    for moments in ("float32", "8bit"):
        model = model_of(probe, llama(probe, "135M"))
        config = OptimizerConfig.model_validate({"moments": moments})
        optimizer = MasterAdamW(model.parameters(), config, 10)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        seconds = probe.wall(optimizer.step)
        sizes[moments] = optimizer.nbytes()
        probe.shows(f"135M: first step, moments {moments}", seconds, "s")
    share = sizes["8bit"] / sizes["float32"]
    probe.holds("135M: bytes of the state, 8-bit over fp32", share < 0.6, share, "< 0.6")


PARTS = (
    Part(long_prompt, 8),
    Part(held, 5),
    Part(crowded, 8),
    Part(offloaded, 6),
    Part(narrow_moments, 3),
)
