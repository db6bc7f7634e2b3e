"""Step 11: libraries that split a model over cards, here over one: they work, or are refused in
words, and never train nothing.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_with, llama, model_of, rows_batch
from benchmarks.gpu_check.probe import Probe, described
from gearshift.batch import PackedBatch
from gearshift.engine import Engine
from gearshift.errors import GearshiftError
from gearshift.trainers.sft import supervised_loss


def fsdp(probe: Probe) -> None:
    """FSDP2 around each layer and the model, then an engine."""
    from torch.distributed.fsdp import fully_shard

    with tempfile.TemporaryDirectory() as place:
        begin(probe, Path(place))
        model = model_of(probe, llama(probe, "135M", num_hidden_layers=2))
        for layer in (*model.model.layers, model):
            fully_shard(layer)
        refused_or_right(probe, "FSDP2", model, None)
        dist.destroy_process_group()


def flat_weights(probe: Probe) -> None:
    """What ZeRO-1 and ZeRO-2 do to weights, without their library: all lie in a buffer of their
    own, and updates are written there. It happens before the engine is made, or after.
    """
    for when in ("before", "after"):
        with probe.case(f"weights in another's buffer, {when} the engine is made"):
            model = model_of(probe, llama(probe, "135M", num_hidden_layers=2))
            try:
                if when == "before":
                    whole, engine = moved(model), engine_with(model, max_length=128)
                else:
                    engine, whole = engine_with(model, max_length=128), moved(model)
                batch = rows_batch(probe, engine, 2, 12)
                before = scores(engine, batch)
                with torch.no_grad():
                    whole.mul_(1.1)
                engine.weights_changed()
                changed = bool((scores(engine, batch) != before).any())
                found = "works" if changed else "frozen"
            except GearshiftError as error:
                changed, found = True, described(error)[:200]
            case = f"weights moved {when} the engine is made: works, or is refused"
            probe.holds(case, changed, found)


def moved(model: nn.Module) -> torch.Tensor:
    """A new buffer in which the model's weights lie end to end, in their order."""
    parameters = list(model.parameters())
    whole = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return whole


def zero(probe: Probe) -> None:
    """DeepSpeed's ZeRO-1, whose optimizer keeps the weights in memory of its own."""
    if find_spec("deepspeed") is None:
        probe.omits("DeepSpeed ZeRO-1", "the package deepspeed is not installed")
        return
    import deepspeed

    with tempfile.TemporaryDirectory() as place:
        begin(probe, Path(place))
        model = model_of(probe, llama(probe, "135M", num_hidden_layers=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config = {
            "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        }  # fmt: skip
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        refused_or_right(probe, "DeepSpeed ZeRO-1", model, wrapped)


def refused_or_right(probe: Probe, name: str, model: nn.Module, wrapped: object) -> None:
    """An engine around it: it is refused, or a step changes what the engine computes."""
    try:
        engine = engine_with(model, max_length=128)
        before, after = stepped(probe, engine, wrapped)
    except GearshiftError as error:
        probe.holds(f"{name}: works, or is refused in words", True, described(error)[:200])
        return
    changed = bool((before != after).any()) and bool(after.isfinite().all())
    probe.holds(f"{name}: works, or is refused in words", changed, "works" if changed else "frozen")


def stepped(probe: Probe, engine: Engine, wrapped: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs before and after an update."""
    batch = rows_batch(probe, engine, 2, 12)
    before = scores(engine, batch)
    with engine.training():
        loss = supervised_loss(engine, batch)[0]
        if wrapped is None:
            loss.backward()
            torch.optim.AdamW(engine.model.parameters(), lr=1e-3).step()
        else:
            wrapped.backward(loss)  # type: ignore[attr-defined]
            wrapped.step()  # type: ignore[attr-defined]
    engine.weights_changed()
    return before, scores(engine, batch)


def scores(engine: Engine, batch: PackedBatch) -> torch.Tensor:
    """Log-probs of the scored tokens."""
    with engine.training(), torch.no_grad():
        return engine.logprobs(batch).logprobs.cpu()


def begin(probe: Probe, folder: Path) -> None:
    """A process group of this process alone."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "nccl" if probe.cuda else "gloo", init_method=store, rank=0, world_size=1
    )


PARTS = (Part(fsdp, 13), Part(flat_weights, 5), Part(zero, 12))
