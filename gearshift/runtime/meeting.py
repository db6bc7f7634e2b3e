"""How the processes that torchrun has started find each other. It must not import `distributed`,
which holds what they send to each other then.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from gearshift.errors import RankError
from gearshift.runtime.terminal import one_line

_meetings = count()


@cache
def _store() -> tuple[Any, int, int]:
    """The store by which the processes meet, this rank, and the number of ranks."""
    store, rank, size = next(iter(rendezvous("env://")))
    return store, rank, size


def meet(timeout: float) -> None:
    """Make the process group of this run; `timeout` is in seconds. Raises `RankError`."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = _store()
        store.set_timeout(patience)
        # A program may do several runs. Each meets under a name of its own, because the store still
        # has the addresses of the meeting before.
        own = dist.PrefixStore(f"meeting/{next(_meetings)}", store)  # type: ignore[attr-defined]
        # Objects and flags go by gloo in any case.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"Rank {os.environ.get('RANK', '?')} on {socket.gethostname()} could not meet the "
            f"others ({one_line(str(error), 200)}); start all of them with one torchrun command."
        ) from error
