"""The modules around which a distributed engine gathers weights: each decoder layer of Hugging
Face, and the whole model for what lies between its layers (the embedding, the last norm, the head).

Work on a unit's weights runs inside the unit's `run` method. On one process that is a plain call.
`torch.distributed.fsdp.register_fsdp_forward_method(unit, "run")` puts FSDP2's gathering around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")


def make_unit(module: nn.Module) -> None:
    """Give the module its `run` method, if it has none yet."""
    if "run" not in vars(module):
        vars(module)["run"] = _call


def run_in(unit: Any, work: Callable[..., Result], *args: Any) -> Result:
    """`work(*args)`, inside the unit."""
    result: Result = unit.run(work, *args)
    return result


def _call(work: Callable[..., Result], *args: Any) -> Result:
    return work(*args)
