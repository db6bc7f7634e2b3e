"""Captured steps of a CPU: a series of kernel calls that is made once, kept as a table, and made
again by one call. Those of a GPU are in `cuda_graphs.py`.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.kernels import build
from gearshift.kernels.specs import Prepare, Run


class KernelCalls:
    """Calls the compiled kernels for one type of numbers, and captures such calls."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._workspace = _Workspace()
        self._captured: list[tuple[int, bytes]] | None = None
        """Each kernel's address and arguments, while a step is captured."""

    def call(self, name: str, *arguments: float, dtype: torch.dtype | None = None) -> None:
        """Run the kernel of that name."""
        function, slots = build.prepared(name, dtype or self._dtype, *arguments)
        if self._captured is not None:
            self._captured.append((ctypes.cast(function, c_void_p).value or 0, slots))
        function(slots)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a kernel's result."""
        if self._captured is not None:
            return self._workspace.empty(shape, dtype or self._dtype)
        return torch.empty(shape, dtype=dtype or self._dtype)

    def bytes(self) -> int:
        """Bytes that captured steps write to."""
        return self._workspace.bytes()

    def free(self) -> None:
        """Free the memory that captured steps write to. None of them is used again."""
        self._workspace = _Workspace()

    def capture(self, prepare: Prepare, run: Run) -> Run | None:
        """See `Kernels.capture`. It is None if `run` computes anything outside the kernels."""
        prepare()
        calls = self._captured = []
        watch = _OnlyKernels()
        try:
            with watch:
                out = run()
        finally:
            self._captured = None
        if watch.missed:
            self._workspace = _Workspace()
            return None
        result = self._workspace.at(out)
        del out
        table = (c_void_p * (2 * len(calls)))()
        for i, (function, slots) in enumerate(calls):
            table[2 * i] = function
            table[2 * i + 1] = ctypes.cast(ctypes.c_char_p(slots), c_void_p).value

        def again() -> Tensor:
            prepare()
            build.replay()(table, c_int64(len(calls)))  # the table points into `calls`
            return result()

        return again


class _Workspace:
    """The memory that captured calls write to. It is kept, for a captured step may write there at
    any time. Memory that no tensor uses any more serves the next call, of any captured step.
    """

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, torch.UntypedStorage]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        free = [
            whole
            for whole, storage in self._all
            if whole.dtype == dtype
            and whole.numel() >= numel
            and torch._C._storage_Use_Count(storage._cdata) == 2  # both are in this list
        ]
        if not free:
            free.append(torch.empty(numel, dtype=dtype))
            self._all.append((free[0], free[0].untyped_storage()))
        return min(free, key=Tensor.numel)[:numel].view(shape)

    def at(self, tensor: Tensor) -> Run:
        """A function that gives that tensor of this workspace again, and does not hold its memory
        until then.
        """
        shape, pointer = tensor.shape, tensor.data_ptr()
        [whole] = [whole for whole, _ in self._all if whole.data_ptr() == pointer]
        return lambda: whole[: shape.numel()].view(shape)

    def bytes(self) -> int:
        return sum(whole.nbytes for whole, _ in self._all)


class _OnlyKernels(TorchDispatchMode):
    """Notices tensor operations that compute something: a captured step would not repeat them."""

    missed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.missed |= not (func.is_view or func in _ALLOCATES)
        return func(*args, **(kwargs or {}))


_ALLOCATES = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
