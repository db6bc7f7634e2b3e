"""Quiet failures of training under DeepSpeed, which tests find where it is installed."""

from tests.mutations import Mutation

_TESTS = "tests/scale/test_deepspeed.py -k ZeRO"

MUTATIONS = (
    Mutation(
        "DeepSpeed averages gradients over the ranks",
        "runtime/deepspeed.py",
        "override_loss_scale(1.0 / (world().size * scale))",
        "override_loss_scale(1.0 / scale)",
        _TESTS,
        needs="deepspeed",
    ),
    Mutation(
        "DeepSpeed's gradients are clipped by the norm of a rank's own part",
        "runtime/deepspeed.py",
        "float(world().sum(torch.stack(parts).sum()).sqrt())",
        "float(torch.stack(parts).sum().sqrt())",
        _TESTS,
        needs="deepspeed",
    ),
    Mutation(
        "the whole model keeps the weights of before ZeRO-3's update",
        "models/zero.py",
        "target[id(p)].copy_(p)",
        "target[id(p)].copy_(target[id(p)])",
        _TESTS,
        needs="deepspeed",
    ),
    Mutation(
        "ZeRO-3 keeps the gradients of the last micro-batch only",
        "runtime/deepspeed_engines.py",
        "self.zero.micro_step_id += 1",
        "self.zero.micro_step_id = 0",
        _TESTS,
        needs="deepspeed",
    ),
)
