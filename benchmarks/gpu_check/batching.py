"""Step 5: what a completion depends on besides its request: the rows beside it, the scheduler, the
device.
"""

from __future__ import annotations

import torch

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_of, prompts_of
from benchmarks.gpu_check.probe import Probe
from gearshift.engine import Engine
from gearshift.kernels import build
from gearshift.types import SamplingParams

NEW = 48
Tokens = list[list[int]]


def beside_others(probe: Probe) -> None:
    """The same requests alone, among others, put back, and with more steps between two looks."""
    for dtype in (torch.float32, torch.bfloat16):
        with probe.case(str(dtype)):
            compared(probe, dtype)


def compared(probe: Probe, dtype: torch.dtype) -> None:
    """Shares of equal completions. Only the number of steps must not matter: it changes no sum."""
    name = str(dtype).removeprefix("torch.")
    rows, longest = probe.size(64, 8), probe.size(512, 128)
    engine = engine_of(probe, "135M", dtype, seed=1, max_length=longest, max_num_seqs=rows)
    prompts = prompts_of(engine, rows, probe.size(100, 12))
    new = probe.size(NEW, 6)
    among = written(engine, prompts, new)
    alone = [written(engine, [prompt], new, i)[0] for i, prompt in enumerate(prompts[:8])]
    probe.shows(f"{name}: alone and among {rows}", equal(alone, among[:8]), "equal")
    if not probe.cuda:
        probe.holds(f"{name}: alone and among {rows} on a CPU", alone == among[:8])
    for steps in (1, 8):
        other = engine_of(
            probe, "135M", dtype, seed=1, max_length=longest, max_num_seqs=rows,
            decode_steps_per_sync=steps,
        )  # fmt: skip
        same = written(other, prompts, new) == among
        probe.holds(f"{name}: {steps} steps between two looks", same)
        del other
        probe.tidy()
    cache = max(longest, rows * (len(prompts[0]) + new // 4))
    tight = engine_of(
        probe, "135M", dtype, seed=1, max_length=longest, max_num_seqs=rows, kv_cache_tokens=cache
    )
    again = written(tight, prompts, new)
    put_back = tight.take_stats().preemptions
    probe.shows(f"{name}: {put_back} were put back", equal(again, among), "equal")


def on_a_cpu(probe: Probe) -> None:
    """The same requests on the card and on the CPU, in fp32."""
    engine = engine_of(probe, "135M", torch.float32, seed=1, max_length=probe.size(512, 128))
    prompts, new = prompts_of(engine, 4, 20), probe.size(16, 4)
    ours = written(engine, prompts, new)
    with engine.generating():
        logprobs = [group[0].logprobs for group in engine.generate(prompts, params(new))]
    engine.model.to("cpu")
    build.library = lambda: None  # type: ignore  the CPU's kernels take a minute to compile
    theirs = Engine(engine.model, engine.tokenizer, engine.config, engine.seed)
    theirs.end_tokens = frozenset()
    with theirs.generating():
        groups = theirs.generate(prompts, params(new))
    probe.shows("card and CPU, fp32", equal(ours, [g[0].token_ids for g in groups]), "equal")
    firsts = zip(logprobs, groups, strict=True)
    most = max(abs(mine[0] - group[0].logprobs[0]) for mine, group in firsts)
    probe.shows("card and CPU, fp32: log-prob of the first token", most, "nat")


def written(engine: Engine, prompts: list[list[int]], new: int, first_id: int = 0) -> Tokens:
    """One completion of each prompt, all of one length, so that all rows leave together."""
    ids = range(first_id, first_id + len(prompts))
    with engine.generating():
        return [group[0].token_ids for group in engine.generate(prompts, params(new), ids)]


def params(new: int) -> SamplingParams:
    """One completion of this length."""
    return SamplingParams(max_new_tokens=new)


def equal(ours: Tokens, theirs: Tokens) -> float:
    """The share of completions that are the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


PARTS = (Part(beside_others, 11), Part(on_a_cpu, 4))
