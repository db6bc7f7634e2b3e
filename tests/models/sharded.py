"""A described model under FSDP2. As a program under torchrun it compares the ranks' gradients with
one process's.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from gearshift.batch import pack_groups
from gearshift.models.runner import ModelRunner
from tests.zoo import random_model


def shard(runner: ModelRunner) -> None:
    """Split the weights of every unit over the ranks; gather them around the unit's `run`."""
    assert runner.plan is not None
    for unit in (*(layer.unit for layer in runner.plan.layers), runner.model):
        fully_shard(unit)
        unit.set_gradient_divide_factor(1.0)  # the ranks' gradients are added up
        unit.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(unit, "run")


def main(families: list[str]) -> None:
    """Each rank scores a group of its own; their gradients add up to those of both groups."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [([5 + i, 6, 7], [([8, 9 + i], [1, 1]), ([10], [1])]) for i in range(2)]
    for family in families:
        one = ModelRunner(random_model(family))
        one.logprobs(pack_groups(groups)).logprobs.sum().backward()
        many = ModelRunner(random_model(family), fuse=False)
        shard(many)
        many.logprobs(pack_groups(groups[rank : rank + 1])).logprobs.sum().backward()
        for (name, p), q in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
            whole = q.grad.full_tensor()
            assert torch.allclose(whole, p.grad, atol=1e-4 * float(p.grad.abs().max())), name
        if rank == 0:
            print(family, "same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
