"""Step 6: how fast the generation gear writes, against this card's limits and Hugging Face's
`generate`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from benchmarks.common import skewed_lengths
from benchmarks.gpu_check.graphs import Captures
from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_with, llama, model_of, prompts_of, quick_limits
from benchmarks.gpu_check.probe import Probe
from benchmarks.gpu_check.profiles import profiled
from gearshift.engine import Engine, stats
from gearshift.types import SamplingParams

GROUP = 8


def prompt_length(probe: Probe) -> int:
    """Tokens of each prompt."""
    return probe.size(128, 8)


def new_tokens(probe: Probe) -> int:
    """Tokens of each completion."""
    return probe.size(192, 6)


def of_135m(probe: Probe) -> None:
    """The smallest, which waits for launches; and Hugging Face's `generate` beside it."""
    ours = shape(probe, "135M", (64, 256))
    with probe.case("Hugging Face"):
        theirs = hugging_face(probe)
        probe.shows("135M, B=64: Hugging Face's generate", theirs, "tokens/s")
        ratio = ours.get(64, float("nan")) / theirs
        probe.fast("135M, B=64: over Hugging Face's generate", ratio, 5.0, "x")


def of_1b(probe: Probe) -> None:
    """Between the two."""
    shape(probe, "1B", (64, 256))


def of_8b(probe: Probe) -> None:
    """The largest, which waits for memory."""
    shape(probe, "8B", (1, 64, 256))


def shape(probe: Probe, name: str, rows: tuple[int, ...]) -> dict[int, float]:
    """Tokens a second by the number of rows."""
    longest, rates = prompt_length(probe) + new_tokens(probe) + 16, {}
    model = model_of(probe, llama(probe, name))
    quick_limits(probe)
    limits = stats.measure(probe.device, torch.bfloat16)
    found = {"GB/s": limits.bytes_per_second / 1e9, "TFLOP/s": limits.flops_per_second / 1e12}
    probe.shows(f"{name}: what this process reaches", found)
    for wanted in rows:
        B = probe.size(wanted, min(wanted, 8))
        with probe.case(f"{name}, B={wanted}"):
            engine = engine_with(model, max_num_seqs=B, max_length=longest)
            rates[wanted] = timed(probe, engine, f"{name}, B={wanted}", B)
            if wanted == 64:
                skewed(probe, engine, f"{name}, B={wanted}: skewed lengths", B)
            engine.loop.release()
            del engine
    return rates


def timed(probe: Probe, engine: Engine, name: str, B: int) -> float:
    """Tokens a second of B rows in groups, and where a step's time goes."""
    size = min(GROUP, B)
    prompts = prompts_of(engine, B // size, prompt_length(probe))
    new = new_tokens(probe)

    def write(tokens: int) -> None:
        with engine.generating():
            engine.generate(prompts, SamplingParams(n=size, max_new_tokens=tokens))

    counts = Captures()
    with counts.counted(probe, engine):
        first = probe.wall(lambda: write(new))
    if probe.cuda:
        probe.holds(f"{name}: captured", counts.failed == 0 < counts.made, counts.made)
    probe.shows(f"{name}: first call, of which captures", [first, counts.seconds], "s")
    engine.take_stats()
    seconds = probe.wall(lambda: write(new))
    done = engine.take_stats()
    step = 1e3 * done.decode_seconds / max(1, done.decode_steps)
    probe.shows(f"{name}: generation", B * new / seconds, "tokens/s")
    fraction = done.roofline_fraction(engine.model, engine.loop.position_bytes)
    probe.fast(f"{name}: of what this card can do", fraction, 0.35)
    with probe.case(f"{name}: profile"):
        located(probe, write, name, step)
    return B * new / seconds


def located(probe: Probe, write: Callable[[int], None], name: str, step: float) -> None:
    """Where the time of a step goes, which takes `step` milliseconds."""
    short = probe.size(16, 4)
    found = profiled(probe, lambda: write(short))
    device = found.milliseconds / short
    told = {"ms": step, "ms of the device": device, "kernels": found.kernels // short}
    probe.shows(f"{name}: a step (with the prefill's part)", told)
    probe.shows(f"{name}: share of the host", max(0.0, 1 - device / max(step, 1e-9)))
    probe.shows(f"{name}: ms by class", {k: x / short for k, x in found.classes.items()})


def skewed(probe: Probe, engine: Engine, name: str, B: int) -> None:
    """Requests of very different lengths, three times as many as rows."""
    lengths = skewed_lengths(3 * B, new_tokens(probe), random.Random(0))
    prompts = prompts_of(engine, 3 * B, prompt_length(probe), seed=1)
    params = [SamplingParams(max_new_tokens=n) for n in lengths]

    def write() -> None:
        with engine.generating():
            engine.generate(prompts, params)

    write()
    probe.shows(name, sum(lengths) / probe.wall(write), "tokens/s")


@torch.no_grad()
def hugging_face(probe: Probe) -> float:
    """Tokens a second of `generate` with 64 rows."""
    B, new = probe.size(64, 4), probe.size(64, 4)
    model = model_of(probe, llama(probe, "135M"), attention="sdpa")
    ids = torch.randint(3, model.config.vocab_size, (B, prompt_length(probe)), device=probe.device)

    def write(tokens: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip

    write(4)
    return B * new / probe.wall(lambda: write(new))


PARTS = (Part(of_135m, 25), Part(of_1b, 20, tiny=False), Part(of_8b, 35, tiny=False))
