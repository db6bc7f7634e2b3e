"""Step 7: how fast the training gear learns, what it waits for, and whether it takes the memory
that was predicted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import (
    engine_of,
    groups_batch,
    llama,
    model_of,
    quick_limits,
    rows_batch,
)
from benchmarks.gpu_check.probe import GIB, Probe
from benchmarks.gpu_check.profiles import profiled
from gearshift.batch import PackedBatch
from gearshift.engine import stats
from gearshift.models.logprobs import token_logprobs
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.machine import Machine
from gearshift.pipeline.memory import Shape, parts_of, passing
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.needs import MemoryNeeds, Tree
from gearshift.trainers.sft import supervised_loss
from gearshift.trainers.update import update

MICRO = (4096, 16_384)
LARGE = (2048,)
"""Micro-batches of 3B weights, whose optimizer leaves little room."""


def of_135m(probe: Probe) -> None:
    """Everything."""
    Learner(probe, "135M").everything()


def of_1b(probe: Probe) -> None:
    """Everything."""
    Learner(probe, "1B").everything()


def of_3b(probe: Probe) -> None:
    """Everything, in small micro-batches."""
    Learner(probe, "3B").everything(LARGE)


class Learner:
    """One model with its optimizer, which is measured."""

    def __init__(self, probe: Probe, name: str) -> None:
        self.probe, self.name = probe, name
        quick_limits(probe)
        self.engine = engine_of(probe, name, max_length=probe.size(2048, 128))
        self.optimizer = MasterAdamW(self.engine.model.parameters(), OptimizerConfig(lr=1e-4), 1000)
        self.reached = product_rate(probe)
        """Products a second of large matrices in this process."""

    def everything(self, micro_batches: tuple[int, ...] = MICRO) -> None:
        """Measure it all, the most important first."""
        probe, name = self.probe, self.name
        with probe.case(f"{name}: supervised rows"):
            self.supervised(micro_batches[-1])
        for tokens in micro_batches:
            with probe.case(f"{name}: ragged, {tokens}"):
                self.ragged(tokens)
        with probe.case(f"{name}: parts"):
            self.parts()
        with probe.case(f"{name}: recompute"):
            self.recomputed(micro_batches[-1])

    def rows(self, seed: int) -> PackedBatch:
        """8 rows of 1,024 tokens."""
        shape = self.probe.size((8, 1024), (2, 12))
        return rows_batch(self.probe, self.engine, *shape, seed=seed)

    def groups(self, seed: int) -> PackedBatch:
        """8 prompts with 8 completions each, of 64 to 512 tokens."""
        shape = self.probe.size((8, 8, 128, (64, 512)), (2, 2, 6, (2, 9)))
        return groups_batch(self.probe, self.engine, *shape, seed=seed)

    def learn(self, batch: PackedBatch, micro: int) -> float:
        """One update; returns the loss."""
        with self.engine.training():
            done = update(batch.split, MicroBatchSize(micro), self.loss_of, self.optimizer)
        self.engine.weights_changed()
        return done["loss"]

    def loss_of(self, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The supervised loss of a micro-batch."""
        return supervised_loss(self.engine, batch)

    def timed(self, batch: PackedBatch, micro: int, case: str = "", times: int = 1) -> list[float]:
        """Do an update so many times; returns the losses. Of the fastest the case reports tokens a
        second and the share of what the card can multiply.
        """
        losses, seconds, work = [], [], self.engine.runner.work
        for _ in range(times):
            work.take()
            seconds.append(self.probe.wall(lambda: losses.append(self.learn(batch, micro))))
        if case:
            flops = work.take()[1] / min(seconds)
            promised = stats.peak_flops(self.engine.device, self.engine.model.dtype)
            found = {"tokens/s": len(batch) / min(seconds), "MFU": flops / promised}
            self.probe.shows(f"{self.name}: {case}", {**found, "of measured": flops / self.reached})
        return losses

    def supervised(self, micro: int) -> None:
        """A shape that is seen again at each step; the loss of the same rows must fall."""
        batch = self.rows(0)
        losses = self.timed(batch, micro)
        losses += self.timed(batch, micro, f"{len(batch)} tokens of rows", 4)
        falls = losses[-1] < losses[0]
        self.probe.holds(f"{self.name}: the loss falls", falls, [losses[0], losses[-1]])

    def ragged(self, tokens: int) -> None:
        """Batches of a rollout, each of which has new shapes; and one of them again."""
        micro, case = self.probe.size(tokens, 40), f"ragged, micro-batches of {tokens}"
        self.timed(self.groups(10), micro)
        batch = self.groups(11)
        self.timed(batch, micro, f"{case}, new shapes")
        self.timed(batch, micro, f"{case}, the same shapes", 2)

    def parts(self) -> None:
        """Forward, backward, head and optimizer alone; kernels, and waits of the host."""
        probe, name = self.probe, self.name
        batch = next(iter(self.groups(12).split(probe.size(MICRO[0], 40))))
        with self.engine.training():
            forward = probe.seconds(lambda: self.loss_of(batch), 3, 1)
            both = probe.seconds(lambda: self.loss_of(batch)[0].backward(), 3, 1)
            with waits(probe) as counted:
                update(batch.split, MicroBatchSize(len(batch)), self.loss_of, self.optimizer)
        self.engine.weights_changed()
        parts = {"forward": forward, "backward": both - forward, "head": self.head(batch)}
        parts["optimizer"] = self.optimize()
        probe.shows(f"{name}: parts of {len(batch)} tokens", ms(parts), "ms")
        probe.shows(f"{name}: waits for the device in an update", len(counted))
        with probe.case(f"{name}: profile"), self.engine.training():
            found = profiled(probe, lambda: self.loss_of(batch)[0].backward())
            probe.shows(f"{name}: kernels of forward and backward", found.kernels)
            probe.shows(f"{name}: device's time by class", found.classes, "ms")
        self.optimizer.drop_gradients()

    def head(self, batch: PackedBatch) -> float:
        """Seconds of the head alone, forward and backward."""
        head = self.engine.head
        targets, width = batch.targets, head.linear.in_features
        hidden = self.probe.randn(len(targets), width, dtype=torch.bfloat16).requires_grad_()

        def run() -> None:
            scores = token_logprobs(head, hidden, targets)
            (scores.logprobs.sum() + scores.entropy.sum()).backward()

        seconds = self.probe.seconds(run, 3, 1)
        self.optimizer.drop_gradients()
        return seconds

    def optimize(self) -> float:
        """Seconds of an update's last part, with gradients that are there."""

        def gradients() -> None:
            for parameter in self.engine.model.parameters():
                parameter.grad = torch.randn_like(parameter)

        gradients()
        self.optimizer.step()
        gradients()
        seconds = self.probe.wall(self.optimizer.step)
        self.engine.weights_changed()
        return seconds

    def recomputed(self, micro: int) -> None:
        """Layers that are computed again in the backward pass."""
        batch = self.rows(1)
        self.engine.runner.recompute = True
        try:
            self.timed(batch, micro)
            self.timed(batch, micro, "rows, layers computed again")
        finally:
            self.engine.runner.recompute = False


@contextmanager
def waits(probe: Probe) -> Iterator[list[object]]:
    """What made the host wait for the device."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if probe.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        found: list[object] = []
        try:
            yield found
        finally:
            if probe.cuda:
                torch.cuda.set_sync_debug_mode("default")
    found += [w for w in seen if "synchroniz" in str(w.message)]


def product_rate(probe: Probe) -> float:
    """Products a second of large matrices in this process."""
    n = probe.size(8192, 64)
    a, b = probe.randn(n, n, dtype=torch.bfloat16), probe.randn(n, n, dtype=torch.bfloat16)
    return 2 * n**3 / probe.seconds(lambda: a @ b)


def ms(seconds: dict[str, float]) -> dict[str, float]:
    """Milliseconds."""
    return {name: 1e3 * x for name, x in seconds.items()}


def reference(probe: Probe) -> None:
    """Hugging Face's own forward with causal attention, as it is and compiled; no optimizer."""
    model = model_of(probe, llama(probe, "1B"), attention="sdpa").train()
    rows, length = probe.size((8, 1024), (2, 12))
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=probe.device)

    def learned(run: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            run(ids).backward()
            model.zero_grad()

        return once

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    forms = {"eager": loss, "compiled": torch.compile(loss)} if probe.cuda else {"eager": loss}
    for name, run in forms.items():
        with probe.case(f"Hugging Face {name}"):
            first = probe.wall(learned(run))
            seconds = probe.seconds(learned(run), 3, 1)
            told = {"tokens/s": ids.numel() / seconds, "first call, s": first}
            probe.shows(f"1B: Hugging Face, forward and backward, {name}", told)


def predicted(probe: Probe) -> None:
    """The memory of an update against what `--dry-run` predicts for it."""
    for name in probe.size(("135M", "1B"), ("135M",)):
        for kind in ("rows", "ragged"):
            with probe.case(f"{name}: memory of {kind}"):
                learner = Learner(probe, name)
                batch = learner.rows(0) if kind == "rows" else learner.groups(0)
                bytes_ = prediction(learner, batch)
                probe.tidy()
                if probe.cuda:
                    torch.cuda.reset_peak_memory_stats()
                learner.learn(batch, len(batch))
                case = f"{name}: memory of {len(batch)} tokens ({kind}) over the prediction"
                if probe.cuda:
                    share = torch.cuda.max_memory_allocated() / bytes_
                    probe.holds(case, 0.9 <= share <= 1.1, share, "0.9 to 1.1")
                else:
                    probe.shows(f"{case}: predicted", bytes_ / GIB, "GiB")
                del learner


def prediction(learner: Learner, batch: PackedBatch) -> float:
    """Bytes of an update of one micro-batch, without what the allocator loses."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    first, end = batch.prompt_groups()[0]
    alone = end - first == 1
    tree = Tree(0 if alone else lengths[first], 1 if alone else end - first - 1, max(lengths))
    engine, tokens = learner.engine, len(batch)
    model = engine.model
    needs = MemoryNeeds(learner.optimizer.config, tokens, tokens, tree)
    shape = Shape.of(model, model.dtype)
    machine = Machine(model.device)
    parts = parts_of(needs, engine.config, shape, shape.parameters, machine)
    taken = Activations(model.config, needs, model.dtype, model.device).bytes(tokens, False)
    passes = passing(needs, shape, shape.parameters, taken)
    return sum(parts.values()) + sum(passes.values())


PARTS = (
    Part(of_1b, 30),
    Part(of_135m, 15, tiny=False),
    Part(predicted, 15),
    Part(of_3b, 25, tiny=False),
    Part(reference, 25),
)
