"""No test reaches for a network, and every test starts from the same generator. Tests run on the
device that GEARSHIFT_TEST_DEVICE names; without it on the CPU, also where there is a GPU.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("GEARSHIFT_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `auto` is the CPU, in the processes of tests too
    # Before anything imports Triton, for which there is no other time.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.device import ON_CPU
from tests.device import device as device_of_tests

# A shell has what it starts in the background ignore this, and so would the runs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # Threads that spin cost a tiny model more than they compute for it.
    torch.set_num_threads(2 if request.node.get_closest_marker("slow") else 1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that tests run on."""
    return device_of_tests()


@pytest.fixture(scope="module")
def made_on_device(device: torch.device) -> Iterator[None]:
    """Tensors that name no device are made on the device of the tests. It is for functions of
    tensors only: in an engine it would hide a tensor that is made on the wrong device.
    """
    with nullcontext() if ON_CPU else device:
        yield
