"""The device that tests of the engine, the invariants and the kernels run on, and what it promises.

GEARSHIFT_TEST_DEVICE names it: `cpu` (the default) or a GPU, such as `cuda`.
"""

import os

import pytest
import torch

from gearshift.kernels import build

ON_CPU = os.environ.get("GEARSHIFT_TEST_DEVICE", "cpu") == "cpu"
on_card = pytest.mark.skipif(ON_CPU, reason="needs GEARSHIFT_TEST_DEVICE=cuda")


def device() -> torch.device:
    """The device of this run of the tests."""
    here = torch.empty(0, device=os.environ.get("GEARSHIFT_TEST_DEVICE", "cpu")).device
    if here.type == "cuda":
        torch.cuda.set_device(here)
    return here


def bits(dtype: torch.dtype = torch.float32) -> bool:
    """Whether what is computed beside a row leaves its bits as they are. Compiled kernels of a CPU
    promise that; a GPU chooses kernels by the number of rows, and does not.
    """
    name = "linear" if dtype == torch.float32 else "prepacked_linear"
    return ON_CPU and build.has(name, dtype)
