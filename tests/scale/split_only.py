"""Checks of `scale.strategy: fsdp` where servers sample, so that no rank keeps the whole model.
They run in `tests.scale.sharded`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gearshift.batch import pack_groups
from gearshift.engine import Engine
from gearshift.errors import GearshiftError
from gearshift.models.load import ModelConfig, load_policy, save_model
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.vllm import GenerationConfig
from gearshift.runtime import checkpoint
from gearshift.runtime.distributed import Part, world
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.trainers.ema import MovingAverage
from gearshift.trainers.push import PolicyOnServers
from tests.scale.sharded import OPTIMIZER, TREES, alone, learn, model_of, near
from tests.trainers.rl_runs import small, trainer

SERVER = """
import sys
from tests.rollouts.fake_vllm import FakeVLLM, serving
with serving(FakeVLLM()) as [url]:
    print(url, flush=True)
    sys.stdin.read()
"""


def gradients(folder: Path, family: str, dtype: str = "float32", tolerance: float = 2e-6) -> None:
    """Two updates, scores without gradients, what is saved, and the average."""
    kind = getattr(torch, dtype)
    with alone():
        one = Engine(model_of(family).to(kind), tiny_tokenizer())
        wanted, _ = learn(one.runner)
    whole = model_of(family).to(kind)
    before = [weakref.ref(p) for p in whole.parameters()]
    many = Engine(whole, tiny_tokenizer(), generates=False)
    average = MovingAverage(many.runner.kept, 0.5)
    metrics, _ = learn(many.runner)
    many.weights_changed()
    with many.training():
        pass
    gc.collect()
    assert all(p.is_meta for p in whole.parameters()) and not any(p() for p in before)
    assert whole.dtype == kind and many.device.type == "cpu"
    for step, known in zip(metrics, wanted, strict=True):
        for name, value in known.items():
            assert abs(step[name] - value) <= tolerance * max(1.0, abs(value)), (name, step, known)
    theirs = dict(one.model.named_parameters())
    state = many.runner.whole_state()
    assert state is not None and set(state) == (set(theirs) if world().main else set())
    for name, weights in state.items():
        near(weights, theirs[name].data, tolerance, name)
        assert weights.dtype == kind
    uneven(one.runner, many.runner, tolerance)
    saved(folder, many, theirs, kind, tolerance)
    checkpoints(folder, many)
    try:
        with many.generating():
            raise AssertionError("no error")
    except GearshiftError as error:
        assert "servers sample" in str(error)
    del average


def uneven(one: ModelRunner, many: ModelRunner, tolerance: float) -> None:
    """Log-probs of three micro-batches, which no number of ranks here divides."""

    def scores(runner: ModelRunner) -> Tensor:
        def work(micros: Any) -> list[Tensor]:
            with torch.no_grad():
                return [runner.logprobs(micro).logprobs for micro in micros]

        return torch.cat(MicroBatchSize(8).run(pack_groups(TREES).split, work))

    with alone():
        wanted = scores(one)
    near(scores(many), wanted, tolerance, "log-probs")


def saved(
    folder: Path, many: Engine, theirs: dict[str, Any], kind: torch.dtype, tolerance: float
) -> None:
    """The folder holds a whole model in the precision that it runs in."""
    weights = many.runner.whole_state()
    if world().main:
        save_model(folder / "model", many.model, tiny_tokenizer(), "", weights=weights)
        with alone():
            name = str(kind).removeprefix("torch.")
            config = ModelConfig(name=str(folder / "model"), dtype=name, device="cpu")  # type: ignore[arg-type]
            again = load_policy(config)
        assert again.config.dtype == kind
        for name, p in again.named_parameters():
            near(p.data, theirs[name].data, tolerance, name)
    world().gather(None, "a saved model")


def checkpoints(folder: Path, many: Engine) -> None:
    """A checkpoint in parts gives back the same rows, and on one process the whole model."""
    stateful = many.runner.stateful
    state = stateful.state_dict()
    assert all(isinstance(part, Part) for part in state.values() if not _is_buffer(part))
    tensors, skeleton = checkpoint.flatten(dict(state))
    checkpoint.save(folder / "checkpoints", 1, tensors, {"model": skeleton})
    rows = [p.to_local().clone() for p in many.runner.kept.parameters() if isinstance(p, DTensor)]
    with torch.no_grad():
        for p in many.runner.kept.parameters():
            p.to_local().zero_()  # type: ignore[attr-defined]
    found, kept = checkpoint.load(folder / "checkpoints" / "step-000001")
    stateful.load_state_dict(checkpoint.unflatten(found, kept["model"]))
    kind = many.model.dtype
    for p, row in zip(many.runner.kept.parameters(), rows, strict=True):
        assert torch.equal(p.to_local(), row.to(kind).float())  # type: ignore[attr-defined]
    weights = many.runner.whole_state()
    if world().main:
        assert weights is not None
        with alone():
            found, kept = checkpoint.load(folder / "checkpoints" / "step-000001")
        again = checkpoint.unflatten(found, kept["model"])
        assert all(torch.equal(again[name], x) for name, x in weights.items())
    world().gather(None, "a checkpoint that was read")


def _is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def server() -> Iterator[str]:
    """The address of a server in a process of its own, which is no rank."""
    command, started = [sys.executable, "-c", SERVER], None
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if world().main:
        started = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
        )
    url = world().says(lambda: started.stdout.readline().strip(), "a server")  # type: ignore[union-attr]
    try:
        yield url
    finally:
        world().gather(None, "the end of a server")
        if started:
            started.communicate()


def rl(folder: Path, **changes: Any) -> None:
    """Weights, average, critic, and the episodes token by token; then a resumed run's."""
    episodes = []

    def train(url: str, place: Path, steps: int = 4) -> dict[str, Tensor]:
        def sampled(engine: Engine) -> PolicyOnServers:
            return PolicyOnServers(GenerationConfig(backend="vllm", servers=(url,)), engine, place)

        settings = {"rollout": {"prompts": 3}, "record_figures": False, "save_every": 2, **changes}
        sizes = {"micro_batch_tokens": 64, "optimizer": OPTIMIZER, "ema": 0.5}
        settings["update"] = {**sizes, **changes.get("update", {})}
        place.mkdir(exist_ok=True, parents=True)
        run = trainer(small(**settings, steps=steps), place, sampled_by=sampled)
        run.train()
        if world().main:
            episodes.append((place / "rollouts.jsonl").read_text())
        found = weights_of(run.engine.runner, "policy")
        if critic := run.models.critic:
            found |= weights_of(critic.runner, "critic")
        assert run.average is not None
        with run.average.applied():
            found |= weights_of(run.engine.runner, "average")
        return found

    with server() as url:
        many = train(url, folder)
        if world().main:
            with alone():
                one = train(url, Path(tempfile.mkdtemp()))
            assert episodes[0] == episodes[1] and set(many) == set(one)
            for name, weights in one.items():
                near(many[name], weights, 1e-6, name)
        world().gather(None, "one process's run")


def weights_of(runner: ModelRunner, of: str) -> dict[str, Tensor]:
    state = runner.whole_state()
    if state is None:
        state = {name: p.data.clone() for name, p in runner.model.named_parameters()}
    return {f"{of}.{name}": x.clone() for name, x in state.items()}


CHECKS: dict[str, Callable[[Path], None]] = {
    "split only: llama": partial(gradients, family="llama"),
    "split only: untied": partial(gradients, family="untied"),
    "split only: phi": partial(gradients, family="phi"),
    "split only: qwen3_moe": partial(gradients, family="qwen3_moe"),
    "split only: bf16": partial(gradients, family="llama", dtype="bfloat16", tolerance=2e-2),
    "split only: rl": partial(rl, advantage={"name": "grpo"}, kl={"beta": 0.05}),
    "split only: critic": partial(
        rl, advantage={"name": "gae"}, value={"kind": "critic", "optimizer": OPTIMIZER}
    ),
}
