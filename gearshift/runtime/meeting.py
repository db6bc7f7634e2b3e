"""How the processes that torchrun has started find each other. It must not import `distributed`,
which holds what they send to each other then.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from gearshift.errors import RankError
from gearshift.runtime.terminal import one_line

_meetings = count()
_known: list[tuple[Any, int, int]] = []


def _store(patience: timedelta) -> tuple[Any, int, int]:
    """The store by which the processes meet, this rank, and the number of ranks. A process has one
    for all its runs. `patience`: how long to look for it, where the agent may have ended.
    """
    if not _known:
        _known.append(next(iter(rendezvous("env://", timeout=patience))))
    return _known[0]


@cache
def _start(patience: timedelta) -> str:
    """A name that all ranks of this start have, and none of an earlier one: torchrun starts
    processes again with the same store, which still has the addresses of those that ended.

    Each rank asks with a word of its own, and rank 0 answers until all have its answer, because it
    may first find words of ranks that have ended.
    """
    store, rank, size = _store(patience)
    if rank:
        own = uuid4().hex
        store.set(f"asks/{rank}", own)
        name = store.get(f"answers/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    name, until = uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    missing = set(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answers/{store.get(f'asks/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/{other}"])}
        if missing and time.monotonic() > until:
            raise RuntimeError(f"rank {min(missing)} did not come")
        time.sleep(0.01)
    return name


def meet(timeout: float) -> None:
    """Make the process group of this run; `timeout` is in seconds. Raises `RankError`."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = _store(patience)
        store.set_timeout(patience)
        # A program may do several runs, and each meets under a name of its own too.
        own = dist.PrefixStore(f"{_start(patience)}/{next(_meetings)}", store)  # type: ignore[attr-defined]
        # Objects and flags go by gloo in any case.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"Rank {os.environ.get('RANK', '?')} on {socket.gethostname()} could not meet the "
            f"others ({one_line(str(error), 200)}); start all of them with one torchrun command."
        ) from error
