"""What ranks hold is what the plan says.

    torchrun --standalone --nproc-per-node=2 -m tests.scale.memory FOLDER

The main rank prints `STRATEGY: same` after each, and then the plan of the smoke recipe.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from gearshift.batch import pack_groups
from gearshift.engine import EngineConfig
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_model
from gearshift.pipeline.machine import Machine
from gearshift.pipeline.memory import Shape, parts_of
from gearshift.pipeline.plan import plan
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime import distributed
from gearshift.runtime.config import load
from gearshift.runtime.distributed import joined, world
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.trainers.needs import MemoryNeeds, Tree
from gearshift.trainers.update import update
from tests.scale.sharded import TREES, loss_of

SMOKE = Path(__file__).parents[1] / "smoke" / "tiny.yaml"


def check() -> None:
    """Masters and moments of all ranks after an update, and those that the plan gives each."""
    runner, config = ModelRunner(tiny_model()), OptimizerConfig()
    optimizer = MasterAdamW(runner.trained_parameters(), config, 1)
    batch = pack_groups(TREES)
    update(batch.split, MicroBatchSize(20), partial(loss_of, runner), optimizer)
    # Zeros up to a whole block, and a count of steps, for each buffer.
    own = [len(flat.master.flatten()) for flat in optimizer.flats]
    used = [getattr(flat, "_own", size) for flat, size in zip(optimizer.flats, own, strict=True)]
    extra = 12 * (sum(own) - sum(used)) + 4 * len(own)
    held = world().gather(optimizer.nbytes() - extra, "bytes")
    needs = MemoryNeeds(config, 20, 40, Tree(4, 2, 4))
    shape = Shape.of(runner.model, torch.float32)
    machine = Machine.here(torch.device("cpu"))
    parts = parts_of(needs, EngineConfig(), shape, shape.parameters, machine)
    told = parts["fp32 masters"] + parts["moments"]
    assert sum(held) == told * world().size, (held, told)


def main() -> None:
    """Check both strategies; then all ranks must make one plan, though they have other memory."""
    with joined(ScaleConfig(), Path(sys.argv[1])):
        for strategy in ("replicate", "fsdp"):
            ranks = replace(world(), sharded=strategy == "fsdp")
            with patch.object(distributed, "_world", ranks):
                check()
            if world().main:
                print(f"{strategy}: same", flush=True)
        recipe = load(
            Recipe, SMOKE, ["sft.micro_batch_tokens=0", "sft.max_length=65536", "rl=null"]
        )
        free = 2.0**30 if world().main else 2.0**29
        with patch("gearshift.pipeline.machine.free_bytes", lambda device: free):
            sizes = [line for line in plan(recipe).splitlines() if "activations of" in line]
        told = [
            [line.split("of ")[1] for line in found] for found in world().gather(sizes, "plans")
        ]
        assert told[0] == told[1] and told[0], told
        if world().main:
            print("plan: same", flush=True)


if __name__ == "__main__":
    main()
