"""The most memory that a piece of work holds at a time: measured on a GPU, and counted on a CPU,
where large tensors are not computed, so that the count takes little time. It knows no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

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


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: str) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def _form(x: Any) -> Any:
    """A tensor's form; of anything else its type too, because 1, 1.0 and True are equal."""
    return _Form(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)


def _uncomputed(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory for what an operation gives, by shapes alone; None where it has to be computed."""
    leaves, tree = tree_flatten((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor)]
    if not given or not all(map(_on_host, given)):
        return None
    forms = tuple(map(_form, leaves))
    try:
        made = _made(func, tree, forms)
    except TypeError:  # an argument that cannot be a key
        made = _made.__wrapped__(func, tree, forms)
    if made is None or max((form.shape.numel() for form in made[0]), default=0) < _LARGE:
        return None
    return tree_unflatten([form.empty("cpu") for form in made[0]], made[1])


@lru_cache(maxsize=1 << 14)  # layers, and the steps of a loop, repeat the same operations
def _made(func: Any, tree: TreeSpec, forms: tuple[Any, ...]) -> tuple[list[_Form], TreeSpec] | None:
    """The forms of the tensors that an operation gives; None where they depend on the values, or
    where anything but tensors of floats is given.
    """
    args, kwargs = tree_unflatten(
        [form.empty("meta") if isinstance(form, _Form) else form[1] for form in forms], tree
    )
    try:
        made, tree = tree_flatten(func(*args, **kwargs))
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in made):
        return None
    return [_form(x) for x in made], tree
