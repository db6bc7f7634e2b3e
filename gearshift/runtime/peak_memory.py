"""The most memory that a piece of work holds at a time: measured on a GPU, and counted on a CPU,
where large tensors are not computed, so that the count takes little time. It knows no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_DRAWS = {_aten.normal_.default, _aten.uniform_.default}
_FILLS = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor}
_LARGE = 1 << 16
"""Tensors of fewer numbers are computed."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Inside, gives a function that tells the most bytes that were allocated at a time since the
    start, on a GPU or in the host's memory, over what was there before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - before)
    else:
        with Counted() as counted:
            yield lambda: float(counted.peak)


class NoDraws(TorchDispatchMode):
    """Inside, large new weights are not written, and hold anything. The host has no memory for what
    nobody writes, so the model may be larger than the host. Small weights are zeros.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS | _FILLS and _idle(args[0]):
            return args[0]
        return args[0].zero_() if func in _DRAWS else func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Inside, the memory of new tensors in the host's memory is counted while they live, those of
    backward passes too. Large tensors of floats are not computed: they hold anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:  # it writes in place
            return args[0] if func not in _FILLS and _idle(args[0]) else func(*args, **kwargs)
        if any(result.alias_info for result in func._schema.returns):  # a view
            return func(*args, **kwargs)
        out = _uncomputed(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _on_host(x)}
        for x in tree_leaves(out):
            if _on_host(x) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.live -= size


def _on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


def _idle(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() >= _LARGE


def _uncomputed(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory for what an operation gives, by shapes alone; None where it has to be computed."""

    def meta(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def room(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")

    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not given or not all(map(_on_host, given)):
        return None
    try:
        shapes = func(*tree_map_only(Tensor, meta, args), **tree_map_only(Tensor, meta, kwargs))
    except (NotImplementedError, RuntimeError, TypeError):  # what it gives depends on the values
        return None
    made = tree_leaves(shapes)
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in made):
        return None
    return tree_map_only(Tensor, room, shapes) if any(map(_idle, made)) else None
