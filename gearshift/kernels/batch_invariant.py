"""Tensor operations in fp32 on a CPU, whose result for a row does not depend on the rows beside it.
The generation gear runs a model's own modules with them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.kernels.specs import Linear

_aten = torch.ops.aten
_CURVED = {
    _aten.gelu.default, _aten.silu.default, _aten.tanh.default, _aten.sigmoid.default,
    _aten.exp.default, _aten.exp2.default, _aten.erf.default, _aten.log1p.default,
    _aten.softplus.default, _aten.mish.default, _aten.elu.default,
}  # fmt: skip
"""Functions of one element. PyTorch computes the last elements of a thread's share by another
formula than those that fill a register."""

_PIECE = 1 << 14
"""Elements that one thread computes: a multiple of `_REGISTERS`."""
_REGISTERS = 64
"""Elements that fill the registers of one step; a multiple of every CPU's number."""


class BatchInvariant(TorchDispatchMode):
    """Computes matrix products by `linear`, and activations in pieces of one size."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.mm.default:
            return self._linear(args[0], args[1].t(), None)
        if func is _aten.addmm.default and not kwargs and args[0].ndim == 1:
            return self._linear(args[1], args[2].t(), args[0])
        if func is _aten.bmm.default and len(args[0]):
            pairs = zip(*args, strict=True)
            return torch.stack([self._linear(x, y.t(), None) for x, y in pairs])
        if func is _aten._grouped_mm.default and args[0].ndim == 2 and len(args) == 3:
            return self._grouped(*args)
        if func in _CURVED and args[0].dtype == torch.float32:
            return _in_pieces(func, args, kwargs)
        return func(*args, **kwargs)

    def _grouped(self, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Multiplies runs of consecutive rows of x, each by its own weight."""
        runs = pairwise([0, *ends.tolist()])
        parts = [self._linear(x[a:b], w.t(), None) for (a, b), w in zip(runs, weights, strict=True)]
        return torch.cat([*parts, x.new_zeros(len(x) - sum(map(len, parts)), weights.shape[2])])


def _in_pieces(func: Any, args: Any, kwargs: Any) -> Tensor:
    x = args[0]
    flat = x.reshape(-1)
    filled = torch.nn.functional.pad(flat, (0, -len(flat) % _REGISTERS))
    pieces = [func(piece, *args[1:], **kwargs) for piece in filled.split(_PIECE)]
    return torch.cat(pieces)[: len(flat)].view(x.shape) if pieces else x
