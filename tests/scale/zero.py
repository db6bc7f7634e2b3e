"""Named checks of `scale.strategy: deepspeed`, each against what one process computes.

    torchrun --standalone --nproc-per-node=2 -m tests.scale.zero FOLDER [NAME ...]

The main rank prints `NAME: same` after each.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gearshift.batch import PackedBatch, pack_groups
from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.errors import CheckpointError, ModelError, NumericalError
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.deepspeed import DeepSpeedAdamW
from gearshift.runtime.deepspeed_config import DeepSpeedConfig
from gearshift.runtime.distributed import joined, world
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import optimizer_for, update
from tests.scale import sharded, supervised
from tests.scale.sharded import CRITIC, GAE, OPTIMIZER, TREES, alike, alone, loss_of, near


def learner(
    family: str = "llama", dtype: torch.dtype = torch.float32, recompute: bool = False
) -> tuple[ModelRunner, Any]:
    runner = ModelRunner(sharded.model_of(family).to(dtype), recompute=recompute)
    return runner, optimizer_for(runner.trained_parameters(), OPTIMIZER, 4, runner)


def learn(runner: ModelRunner, optimizer: Any, steps: int = 3) -> list[dict[str, float]]:
    """Updates of several micro-batches; on two ranks one of them has two."""
    batch = pack_groups(TREES)
    cut = partial(PackedBatch.split, batch, 12)
    assert len(list(cut(1))) == 3
    return [
        update(lambda _, ranks: cut(1), MicroBatchSize(12), partial(loss_of, runner), optimizer)
        for _ in range(steps)
    ]


def updates(
    folder: Path,
    family: str,
    dtype: str = "float32",
    recompute: bool = False,
    tolerance: float = 2e-6,
) -> None:
    """Metrics and weights, which stay where DeepSpeed has laid them."""
    kind = getattr(torch, dtype)
    with alone():
        one, optimizer = learner(family, kind)
        wanted = learn(one, optimizer)
    many, optimizer = learner(family, kind, recompute)
    assert isinstance(optimizer, DeepSpeedAdamW)
    places = [p.data_ptr() for p in many.model.parameters()]
    found = learn(many, optimizer)
    if world().sharded:
        assert all(p.grad is None for p in many.learner.model.parameters())
        assert any(p.numel() == 0 for p in many.learner.model.parameters())
    many.weights_changed()
    assert [p.data_ptr() for p in many.model.parameters()] == places
    assert many.weights is None or many.weights.restore() == 0
    alike(found, wanted, tolerance / 2)
    for (name, p), q in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
        near(q.data, p.data, tolerance, name)


def broken(folder: Path) -> None:
    """A loss or a gradient that is not finite on one rank is an error on both; nothing is updated,
    and the next update is as if nothing had been.
    """
    with alone():
        wanted = learn(*learner())
    runner, optimizer = learner()
    before = [p.clone() for p in runner.model.parameters()]

    def loss_with(factor: Callable[[Tensor], Tensor], micro: PackedBatch) -> Any:
        loss, metrics = loss_of(runner, micro)
        return factor(loss) if world().rank else loss, metrics

    batch = pack_groups(TREES)
    for factor in (lambda x: x * torch.nan, lambda x: x + 0 * (x - x.detach()).sqrt()):
        try:
            update(batch.split, MicroBatchSize(20), partial(loss_with, factor), optimizer)
        except NumericalError as error:
            assert "nothing was updated" in str(error)
        else:
            raise AssertionError("no error")
        for p, q in zip(before, runner.model.parameters(), strict=True):
            assert torch.equal(p, q)
    alike(learn(runner, optimizer), wanted, 1e-6)


def resumed(folder: Path) -> None:
    """A run that goes on from its checkpoint ends with the same bits; another number of ranks
    cannot take it up.
    """
    ids = [[1, 5 + i, 9, 7 + 2 * i, 11, 3 + i][: 3 + i % 4] for i in range(16)]
    rows = [(row, [0, *[1] * (len(row) - 1)]) for row in ids]
    settings = {"batch_size": 4, "micro_batch_tokens": 12, "optimizer": OPTIMIZER, "save_every": 2}
    config = SFTConfig.model_validate(settings)

    def train() -> Any:
        engine = Engine(tiny_model(), tiny_tokenizer())
        train_sft(config, engine, Mixture([rows], [1.0], 0), Stage("sft", folder, 4, 0, config))
        return engine.model

    wanted = train()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    done = DeepSpeedAdamW.step
    with patch.object(DeepSpeedAdamW, "step", autospec=True, side_effect=done) as step:
        again = train()
    assert step.call_count == 2
    for p, q in zip(wanted.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    with alone():
        try:
            train()
        except CheckpointError as error:
            assert "state of 2 ranks, which only as many can take up" in str(error)
        else:
            raise AssertionError("no error")
        state = learner()[1].state_dict()
    try:
        learner()[1].load_state_dict(state)
    except CheckpointError as error:
        assert "is that of 1 rank, and DeepSpeed's parts fit no other" in str(error)
    else:
        raise AssertionError("no error")


def process(folder: Path) -> None:
    """The reward model of steps, a token classifier that runs by its own forward pass."""
    folder.mkdir(parents=True, exist_ok=True)
    many = supervised.process(folder)
    with alone(), tempfile.TemporaryDirectory() as place:
        one = supervised.process(Path(place))
    for name, weights in one.weights.items():
        near(many.weights[name], weights, 2e-6, name)


def refused(folder: Path) -> None:
    """A model whose weights cannot be laid end to end in the order of its parameters."""
    model = tiny_model()
    attention: Any = model.model.layers[0].self_attn  # type: ignore[operator, union-attr, index]
    attention.k_proj = attention._modules.pop("k_proj")  # now the last
    runner = ModelRunner(model)
    try:
        optimizer_for(runner.trained_parameters(), OPTIMIZER, 1, runner)
    except ModelError as error:
        assert "in an order that the engine cannot use" in str(error)
    else:
        raise AssertionError("no error")


Check = tuple[Callable[[Path], None], dict[str, Any]]
ONE, TWO, CPU = {"stage": 1}, {"stage": 2}, {"stage": 2, "offload": "cpu"}
THREE, THREE_CPU = {"stage": 3}, {"stage": 3, "offload": "cpu"}
GRPO = partial(sharded.rl, advantage={"name": "grpo"}, kl={"beta": 0.05}, update={"minibatches": 2})
CHECKS: dict[str, Check] = {
    "ZeRO-1": (partial(updates, family="llama"), ONE),
    "ZeRO-2": (partial(updates, family="llama"), TWO),
    "ZeRO-2 on the host": (partial(updates, family="llama"), CPU),
    "ZeRO-1 on the host": (partial(updates, family="llama"), {"stage": 1, "offload": "cpu"}),
    "ZeRO-1 in bf16": (partial(updates, family="llama", dtype="bfloat16", tolerance=2e-2), ONE),
    "ZeRO-2 in bf16": (partial(updates, family="llama", dtype="bfloat16", tolerance=2e-2), TWO),
    "biases": (partial(updates, family="qwen2"), TWO),
    "gpt2": (partial(updates, family="gpt2"), TWO),
    "sft": (sharded.sft, TWO),
    "rl": (GRPO, TWO),
    "critic": (partial(sharded.rl, **GAE, value=CRITIC), TWO),
    "value head": (partial(sharded.rl, **GAE, value={"optimizer": OPTIMIZER, "warmup": 1}), CPU),
    "what is not finite": (broken, TWO),
    "what is not finite on the host": (broken, CPU),
    "resumed": (resumed, TWO),
    "resumed on the host": (resumed, CPU),
    "another order": (refused, TWO),
    "process": (process, TWO),
    "ZeRO-3 process": (process, THREE),
    "ZeRO-3": (partial(updates, family="llama"), THREE),
    "ZeRO-3 on the host": (partial(updates, family="llama"), THREE_CPU),
    "ZeRO-3 in bf16": (partial(updates, family="llama", dtype="bfloat16", tolerance=2e-2), THREE),
    "ZeRO-3 of gpt2": (partial(updates, family="gpt2"), THREE),
    "ZeRO-3 of experts": (partial(updates, family="qwen3_moe"), THREE),
    "ZeRO-3 of experts that get no token": (
        partial(updates, family="longcat_flash", tolerance=1e-5),
        THREE,
    ),
    "ZeRO-3 that computes layers again": (partial(updates, family="llama", recompute=True), THREE),
    "ZeRO-3 sft": (sharded.sft, THREE),
    "ZeRO-3 rl": (GRPO, THREE),
    "ZeRO-3 critic": (partial(sharded.rl, **GAE, value=CRITIC), THREE),
    "ZeRO-3 value head": (
        partial(sharded.rl, **GAE, value={"optimizer": OPTIMIZER, "warmup": 1}),
        THREE_CPU,
    ),
    "ZeRO-3 resumed": (resumed, THREE),
    "ZeRO-3 of what is not finite": (broken, THREE),
}


def main(folder: Path, *names: str) -> None:
    """Do the checks of these names; all if none is given."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with joined(ScaleConfig(strategy="deepspeed", timeout=280), folder):
        for name in names or CHECKS:
            check, settings = CHECKS[name]
            world().deepspeed = DeepSpeedConfig.model_validate(settings)
            world().sharded = settings["stage"] == 3
            check(folder / name.replace(" ", "_"))
            world().gather(None, name)
            if world().main:
                os.write(1, f"{name}: same\n".encode())  # the ranks' own lines are not printed


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
