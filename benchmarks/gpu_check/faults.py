"""Step 12, the last: faults in the middle of things. Each has a process of its own, for an error of
the device would end the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GPT2Config

from benchmarks.gpu_check.graphs import small, written
from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_with, model_of, prompts_of
from benchmarks.gpu_check.probe import Probe, described
from gearshift.engine import Engine
from gearshift.types import SamplingParams


def longest(probe: Probe) -> None:
    """Learned positions have an end: rows that have ended run on for some steps."""
    config = GPT2Config(
        vocab_size=320, n_embd=probe.size(256, 32), n_layer=2, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = []
    for steps in (1, 8):
        engine = engine_with(model_of(probe, config), decode_steps_per_sync=steps)
        params = [SamplingParams(max_new_tokens=n) for n in (44, 41, 30, 44)]
        with engine.generating():
            prompts = prompts_of(engine, 4, 20)
            found.append([g[0].token_ids for g in engine.generate(prompts, params)])
        probe.sync()
    probe.holds("GPT-2 at its longest: 8 steps ahead are as 1", found[0] == found[1])


def nan_logits(probe: Probe) -> None:
    """Weights that became NaN, and came back."""
    engine, expected = usable(probe)
    weight = engine.model.model.norm.weight
    before = weight.detach().clone()

    def broken() -> None:
        with torch.no_grad():
            weight.fill_(float("nan"))
        engine.weights_changed()
        try:
            written(engine, 10)
        finally:
            with torch.no_grad():
                weight.copy_(before)
            engine.weights_changed()

    told(probe, "NaN logits", engine, expected, broken, "NumericalError")


def no_memory(probe: Probe) -> None:
    """Memory that runs out in the middle of the first generation."""
    engine, expected = usable(probe)
    engine.loop.release()

    def broken() -> None:
        if not probe.cuda:
            with failing(engine, torch.OutOfMemoryError("no memory")):
                written(engine, 10)
            return
        probe.tidy()
        total = torch.cuda.get_device_properties(probe.device).total_memory
        torch.cuda.set_per_process_memory_fraction((probe.allocated() + 2**24) / total)
        try:
            written(engine, 10)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    names = ("OutOfMemoryError", "KernelError", "CapacityError")
    told(probe, "no memory left", engine, expected, broken, *names)


def interrupted(probe: Probe) -> None:
    """Ctrl-C in the middle of a capture."""
    engine, expected = usable(probe)
    engine.loop.release()

    def broken() -> None:
        with failing(engine, KeyboardInterrupt()):
            written(engine, 10)

    told(probe, "an interrupt in a capture", engine, expected, broken, "KeyboardInterrupt")


def usable(probe: Probe) -> tuple[Engine, Any]:
    """An engine that has written, and the tokens."""
    engine = small(probe)
    return engine, tokens(engine)


def tokens(engine: Engine) -> list[list[list[int]]]:
    """What the engine writes."""
    return [[one.token_ids for one in group] for group in written(engine, 10)]


def told(
    probe: Probe, name: str, engine: Engine, expected: Any, broken: Callable[[], None], *errors: str
) -> None:
    """The error's name, and whether the engine writes the same afterwards."""
    found = "none"
    try:
        broken()
    except BaseException as error:
        found = type(error).__name__
        probe.shows(f"{name}: the error", described(error)[:200])
    probe.holds(f"{name}: the error's name", found in errors, found, " or ".join(errors))
    probe.holds(f"{name}: the engine writes the same afterwards", tokens(engine) == expected)


@contextmanager
def failing(engine: Engine, error: BaseException) -> Iterator[None]:
    """The sampling that fails is in the first capture: on a card after a plain step and a warm-up,
    on a CPU after a prefill.
    """
    kind, calls = type(engine.runner.kernels), 0
    real, last = kind.sample, 3 if engine.device.type == "cuda" else 2

    def sample(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise error
        real(*arguments)

    kind.sample = sample  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.sample = real  # type: ignore[method-assign]


PARTS = (Part(longest, 4), Part(nan_logits, 3), Part(no_memory, 4), Part(interrupted, 4))
