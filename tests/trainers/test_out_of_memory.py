"""Memory that runs out in a micro-batch: the work is done again by smaller ones, and the result is
that of a stage that has the smaller size from there on, to the bit.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.errors import CapacityError
from gearshift.models.load import ModelConfig, load_classifier, load_policy
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.metrics import MEASURED, read_metrics
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.judged import Judged
from gearshift.trainers.preference import PreferenceConfig, train_preference
from gearshift.trainers.process_reward_model import (
    ProcessRewardConfig,
    Steps,
    train_process_reward_model,
)
from gearshift.trainers.reward_model import Pair, RewardModelConfig, train_reward_model
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import update
from tests.trainers.rl_runs import small, trainer

TOKENS = 32
SETTINGS: dict[str, Any] = {
    "epochs": 1, "save_every": 0, "batch_size": 4, "micro_batch_tokens": TOKENS,
    "optimizer": {"lr": 1e-2},
}  # fmt: skip
IDS = [[1, 5 + i, 9, 7 + 2 * i, 11, 3, 8 + i][: 4 + i % 4] for i in range(8)]
Run = Callable[[Path], nn.Module]
ERRORS: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


def model(dtype: str = "float32") -> ModelConfig:
    return ModelConfig.model_validate({"name": "tiny", "dtype": dtype, "device": "cpu"})


def sft(folder: Path, dtype: str = "float32") -> nn.Module:
    config = SFTConfig.model_validate(SETTINGS)
    rows = Mixture([[(ids, [0, *[1] * (len(ids) - 1)]) for ids in IDS]], [1.0], 0)
    engine = Engine(load_policy(model(dtype)), tiny_tokenizer())
    train_sft(config, engine, rows, Stage("sft", folder, 2, 0, config))
    return engine.model


def sft_in_bf16(folder: Path) -> nn.Module:
    return sft(folder, "bfloat16")


def preference(folder: Path) -> nn.Module:
    config = PreferenceConfig.model_validate({**SETTINGS, "loss": "kto"})
    rows = [Judged(ids[:2], [ids[2:], [13, 15]], [True, False]) for ids in IDS]
    for row in rows:
        row.other = [4, 6]
    engine = Engine(load_policy(model()), tiny_tokenizer())
    stage = Stage("preference", folder, 2, 0, config)
    train_preference(config, engine, Mixture([rows], [1.0], 0), stage)
    return engine.model


def reward(folder: Path) -> nn.Module:
    config = RewardModelConfig.model_validate(SETTINGS)
    rows = Mixture([[Pair(ids, [*ids[:2], 13, 15]) for ids in IDS]], [1.0], 0)
    classifier = load_classifier(model())
    stage = Stage("reward", folder, 2, 0, config)
    train_reward_model(config, ModelRunner(classifier), rows, stage)
    return classifier


def process(folder: Path) -> nn.Module:
    config = ProcessRewardConfig.model_validate(SETTINGS)
    rows = Mixture([[Steps(ids, [1, len(ids) - 1], [True, False]) for ids in IDS]], [1.0], 0)
    classifier = load_classifier(model(), of_tokens=True)
    stage = Stage("process", folder, 2, 0, config)
    runner = ModelRunner(classifier, undescribed=OF_TOKENS)
    train_process_reward_model(config, runner, rows, stage)
    return classifier


def rl(folder: Path, **changes: Any) -> nn.Module:
    """The groups are larger than half a micro-batch: they are cut, with their prompt."""
    sizes = {"micro_batch_tokens": 64, "epochs": 2, "minibatches": 2, "optimizer": {"lr": 1e-2}}
    run = trainer(small(steps=1, update=sizes, **changes), folder)
    run.train()
    critic = run.models.critic.modules.values() if run.models.critic else ()
    return nn.ModuleList([run.engine.model, *critic])


def with_critic(folder: Path) -> nn.Module:
    return rl(folder, value={"kind": "critic", "optimizer": {"lr": 1e-2}})


def without_value(folder: Path) -> nn.Module:
    kl = {"beta": 0.1, "where": "loss", "estimator": "k3"}
    return rl(folder, advantage={"name": "rloo"}, loss={"name": "ppo_clip"}, kl=kl)


class Full(TorchDispatchMode):
    """Counts operations, those of backward passes too, and raises the error at one of them."""

    def __init__(self, at: int | None, error: Exception) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


class Driven:
    """A run whose memory ends at one operation of its micro-batches; or that has a smaller size
    from one of its works on.
    """

    def __init__(
        self, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, *,
        at: int | None = None, error: Exception = ERRORS[0], smaller: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        plain, self.works, self.failed = MicroBatchSize.run, 0, (-1, 0)
        full = Full(at, error)

        def cut_work(size: MicroBatchSize, cut: Any, work: Any, *undo: Any) -> Any:
            if smaller and self.works == smaller[0]:
                size.tokens = smaller[1]
            before = size.tokens

            def counted(micros: Any) -> Any:
                with full:
                    return work(micros)

            result = plain(size, cut, counted, *undo)
            if size.tokens != before:
                self.failed = (self.works, size.tokens)
            self.works += 1
            return result

        with monkeypatch.context() as patch:
            patch.setattr(MicroBatchSize, "run", cut_work)
            self.weights = run(folder).state_dict()
        self.operations = full.seen
        self.metrics = [
            {k: v for k, v in m.items() if not k.startswith(MEASURED)}
            for m in read_metrics(folder / "metrics.jsonl")
        ]


@pytest.mark.parametrize(
    "run", [sft, sft_in_bf16, preference, reward, process, with_critic, without_value]
)
def test_it_ends_as_if_the_size_had_been_smaller(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At random places: in forward and backward passes and between them."""
    whole = Driven(run, tmp_path / "whole", monkeypatch)
    places = random.Random(run.__name__).sample(range(1, whole.operations), 2)
    for nth, at in enumerate(places):
        error = ERRORS[(nth + at) % len(ERRORS)]
        capsys.readouterr()
        full = Driven(run, tmp_path / f"full{nth}", monkeypatch, at=at, error=error)
        [line] = [x for x in capsys.readouterr().out.split("\n") if "Memory ran out" in x]
        assert "micro_batch_tokens=" in line
        assert full.failed[0] >= 0 and full.works == whole.works
        less = Driven(run, tmp_path / f"less{nth}", monkeypatch, smaller=full.failed)
        assert full.metrics == less.metrics
        for name, weight in less.weights.items():
            assert torch.equal(weight, full.weights[name]), name
    assert any(not torch.equal(w, whole.weights[name]) for name, w in full.weights.items())


def test_gradients_and_random_numbers_begin_anew() -> None:
    """Dropout; and an error after some gradients of bf16 were added up."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)).bfloat16()
    x_RD, start = torch.randn(16, 8).bfloat16(), [p.detach().clone() for p in net.parameters()]

    def one(size: MicroBatchSize, fail: Callable[[int], bool]) -> list[Tensor]:
        torch.manual_seed(3)
        for parameter, value in zip(net.parameters(), start, strict=True):
            parameter.data.copy_(value)
        optimizer, calls = MasterAdamW(net.parameters(), OptimizerConfig(lr=0.1), 1), 0
        plain = optimizer.accumulate

        def accumulate() -> None:
            nonlocal calls
            calls += 1
            if fail(calls):
                optimizer.flats[0].accumulate()
                raise torch.OutOfMemoryError("out of memory")
            plain()

        optimizer.accumulate = accumulate  # type: ignore[method-assign]
        metrics = update(
            lambda n, _: x_RD.split(n), size, lambda x: (net(x).float().sum(), {}), optimizer
        )
        return [torch.tensor(metrics["grad_norm"]), *(p.detach().clone() for p in net.parameters())]

    size = MicroBatchSize(8)
    full, less = one(size, lambda n: n == 2), one(MicroBatchSize(4), lambda n: False)
    assert size.tokens == 4
    assert all(torch.equal(a, b) for a, b in zip(full, less, strict=True))


def test_what_cannot_be_cut_is_an_error_that_names_the_key() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([weight], OptimizerConfig(), 1)

    def loss_of(row: Tensor) -> Any:
        (weight.sum() * 2).backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    size = MicroBatchSize(4096, "sft.micro_batch_tokens")
    with pytest.raises(CapacityError, match=r"sft\.micro_batch_tokens=1: memory ran out"):
        update(lambda n, _: torch.ones(2).split(min(n, 2)), size, loss_of, optimizer)
    assert weight.grad is None and (weight == 1).all()


def test_another_error_is_not_tried_again() -> None:
    size = MicroBatchSize(8)
    with pytest.raises(RuntimeError, match="shapes"):
        size.run(
            lambda n, _: torch.ones(8).split(n),
            lambda _: (_ for _ in ()).throw(RuntimeError("shapes")),
        )
    assert size.tokens == 8


def test_a_resumed_stage_keeps_the_smaller_size(tmp_path: Path) -> None:
    def stage() -> Stage:
        config = SFTConfig(micro_batch_tokens=64, save_every=1)
        made = Stage("sft", tmp_path, 4, 0, config)
        made.track(micro_batch=made.micro_batch)
        return made

    first = stage()
    assert first.micro_batch.key == "sft.micro_batch_tokens"
    for step in first.steps():
        if step == 2:
            break
        first.micro_batch.tokens = 16
    second = stage()
    assert next(second.steps()) == 2 and second.micro_batch.tokens == 16
