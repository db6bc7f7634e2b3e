"""No test reaches for a network, and every test starts from the same generator."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports Triton, for which there is no other time.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# A shell has what it starts in the background ignore this, and so would the runs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # Threads that spin cost a tiny model more than they compute for it.
    torch.set_num_threads(2 if request.node.get_closest_marker("slow") else 1)
