"""Step 3: captured decode steps are the steps that were captured, are never lost, and give their
memory back.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_with, llama, model_of, prompts_of
from benchmarks.gpu_check.probe import Probe
from gearshift.engine import Engine
from gearshift.types import Completion, SamplingParams

Written = list[list[Completion]]
ROWS = 12
"""Completions of a call of `written`."""


class Captures:
    """Counts the captures of all kernels inside `counted`: how many there were, how many failed."""

    def __init__(self) -> None:
        self.made, self.failed, self.seconds = 0, 0, 0.0

    @contextmanager
    def counted(self, probe: Probe, engine: Engine) -> Iterator[Captures]:
        kind = type(engine.runner.kernels)
        real = kind.capture

        def capture(*arguments: Any, **more: Any) -> Any:
            found = None
            self.made += 1
            try:

                def run() -> None:
                    nonlocal found
                    found = real(*arguments, **more)

                self.seconds += probe.wall(run)
            finally:
                self.failed += found is None
            return found

        kind.capture = capture  # type: ignore[method-assign]
        try:
            yield self
        finally:
            kind.capture = real  # type: ignore[method-assign]


def small_model(probe: Probe) -> PreTrainedModel:
    """A few layers, as wide as those of a model of 135M weights."""
    return model_of(probe, llama(probe, "135M", num_hidden_layers=probe.size(4, 2)))


def small(
    probe: Probe, seed: int = 0, model: PreTrainedModel | None = None, **config: Any
) -> Engine:
    """An engine of such a model."""
    sizes = {"max_length": probe.size(1024, 96), "max_num_seqs": ROWS}
    return engine_with(model or small_model(probe), seed, **sizes, **config)


def written(engine: Engine, length: int, new: int = 24, prompts: int = 3) -> Written:
    """Completions of a few groups."""
    with engine.generating():
        asked = prompts_of(engine, prompts, length, seed=length)
        return engine.generate(asked, SamplingParams(n=4, max_new_tokens=new))


def plain(probe: Probe, seed: int = 0, model: PreTrainedModel | None = None) -> Engine:
    """The same engine without captures."""
    return small(probe, seed, model, capture_steps=False)


def same_tokens(probe: Probe) -> None:
    """Captured steps against plain ones, as the cache is used further and the weights change."""
    counts = Captures()
    one, other = small(probe), plain(probe)
    with counts.counted(probe, one):
        for length in probe.size((20, 200, 600), (5, 40)):
            same = written(one, length) == written(other, length)
            probe.holds(f"prompts of {length}: captured steps are the plain ones, bit by bit", same)
        for engine in (one, other):
            with torch.no_grad():
                engine.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
            engine.weights_changed()
        same = written(one, 20) == written(other, 20)
        probe.holds("after a change of the weights, too", same)
    if probe.cuda:
        probe.holds("every capture came about", counts.failed == 0 < counts.made, counts.made)
        stream = torch.cuda.current_stream() == torch.cuda.default_stream()
        probe.holds("the current stream is the default one", stream)
        each = 1 / max(1, counts.made)
        memory = one.memory()["steps"] * each / 1e6
        probe.shows("a capture takes", {"ms": 1e3 * counts.seconds * each, "MB": memory})
    else:
        found = {"made": counts.made, "failed": counts.failed}
        probe.shows("captures", found)


def forgotten(probe: Probe) -> None:
    """Captures that are forgotten leave no memory behind; an engine may be dropped at any time."""
    engine = small(probe)
    written(engine, 20, new=4)
    before = probe.allocated()
    reserved = torch.cuda.memory_reserved() if probe.cuda else 0
    counts = Captures()
    with counts.counted(probe, engine):
        rounds = 0
        while rounds < probe.size(40, 2) and probe.left > 3:
            engine.loop.forget_captures()
            written(engine, 20, new=4)
            rounds += 1
    grown = probe.allocated() - before
    probe.at_most(
        f"growth after captures were forgotten {rounds} times", grown / 2**20, 64.0, "MiB"
    )
    if probe.cuda:
        reserved = torch.cuda.memory_reserved() - reserved
        probe.shows("growth of reserved memory", reserved / 2**20, "MiB")
        probe.holds("every capture came about", counts.failed == 0 < counts.made, counts.made)


def several(probe: Probe) -> None:
    """Two engines, one of which is dropped while no garbage is collected; a busy thread."""
    one, two, exact = small(probe, seed=1), small(probe, seed=2), plain(probe, seed=1)
    expected = written(exact, 20), written(exact, 50)
    with Captures().counted(probe, one) as counts:
        first = written(one, 20)
        written(two, 20)
        probe.holds("two engines in turn", (first, written(one, 50)) == expected)
        gc.disable()
        del two
        try:
            third = small(probe, seed=1)
            probe.holds("one is dropped, another one captures", written(third, 20) == expected[0])
        finally:
            gc.enable()
        fourth = small(probe, seed=1)
        with computing(probe):
            probe.holds("beside a thread that computes", written(fourth, 20) == expected[0])
        if probe.cuda:
            probe.holds("every capture came about", counts.failed == 0 < counts.made, counts.made)


@contextmanager
def computing(probe: Probe) -> Iterator[None]:
    """A thread multiplies and allocates, as a user's reward may do."""
    end, errors = threading.Event(), []

    a = probe.randn(256, 256)  # torch draws no random numbers beside a capture

    def work() -> None:
        try:
            while not end.is_set():
                float((a @ a).sum())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(10)
    probe.holds("that thread has no error", not errors, str(errors[0])[:200] if errors else "none")


def adapters(probe: Probe) -> None:
    """Adapters that are switched off must be off in captured steps, too."""
    from gearshift.models.adapters import AdapterConfig, adapters_off, add_adapter

    def adapted() -> PreTrainedModel:
        model = small_model(probe)
        add_adapter(model, AdapterConfig(rank=4))
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.5)
        return model

    def both(engine: Engine) -> tuple[Written, Written, Written]:
        on = written(engine, 20)
        with adapters_off(engine.model):
            off = written(engine, 20)
        return on, off, written(engine, 20)

    one, other = both(small(probe, model=adapted())), both(plain(probe, model=adapted()))
    probe.holds("adapters on, off, on: captured steps are the plain ones", one == other)
    tokens = [[[c.token_ids for c in group] for group in groups] for groups in one]
    probe.holds("adapters make a difference", tokens[0] != tokens[1] and tokens[0] == tokens[2])


def given_back(probe: Probe) -> None:
    """The cache's memory is back while the policy trains, and no garbage was collected."""
    engine = small(probe, free_cache_while_training=True)
    written(engine, 20)
    with engine.training():
        before = probe.allocated()  # libraries have their workspaces now
    gc.collect()
    gc.disable()
    try:
        written(engine, 20)
        cache = engine.memory()["cache"]
        with engine.training():
            kept = probe.allocated() - before
        probe.holds("engine.memory() has no cache then", engine.memory()["cache"] == 0)
        if probe.cuda:
            share = 1 - kept / max(1, cache)
            probe.holds("share of the cache's bytes that are back", share >= 0.9, share, ">= 0.9")
        probe.holds("it writes again", len(written(engine, 20)) == 3)
    finally:
        gc.enable()


def _cases(*runs: Callable[[Probe], None]) -> Callable[[Probe], None]:
    def run(probe: Probe) -> None:
        for one in runs:
            with probe.case(one.__name__):
                one(probe)

    run.__name__ = runs[0].__name__
    return run


PARTS = (
    Part(same_tokens, 8),
    Part(_cases(forgotten, given_back), 7),
    Part(several, 5),
    Part(adapters, 5),
)
