"""One storage: parameters that are used together are stored together, and the model's own are views
of it.

So an optimizer that writes in place has already told the generation gear. What breaks the aliasing
(`.to()`, `.data =`) is found at a shift and mended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gearshift.models.describe import Plan


class FusedRows:
    """Several linear layers of one input, their weights (and biases) row slices of one buffer."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = tuple(linears)
        self.weight, self.bias = self._fuse()

    def is_aliased(self) -> bool:
        """Whether each parameter still lies where its slice of the buffer does."""
        row = 0
        for linear in self.linears:
            for parameter, buffer in ((linear.weight, self.weight), (linear.bias, self.bias)):
                if buffer is None:
                    continue
                if (
                    parameter.dtype != buffer.dtype
                    or parameter.data_ptr() != buffer[row].data_ptr()
                ):
                    return False
            row += linear.out_features
        return True

    def mend(self) -> None:
        """Alias again; the parameters' present values win, in the same `Parameter` objects."""
        self.weight, self.bias = self._fuse()

    def _fuse(self) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            weight = torch.cat([linear.weight for linear in self.linears])
            has_bias = self.linears[0].bias is not None
            bias = torch.cat([linear.bias for linear in self.linears]) if has_bias else None
            row = 0
            for linear in self.linears:
                rows = slice(row, row + linear.out_features)
                linear.weight.data = weight[rows]
                if bias is not None:
                    linear.bias.data = bias[rows]
                row += linear.out_features
        return weight, bias


class AliasedWeights:
    """The fused buffers of every layer of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.qkv = [FusedRows(layer.qkv) for layer in plan.layers]
        self.gate_up = [FusedRows(layer.gate_up) for layer in plan.layers]

    def check(self) -> int:
        """Mend whatever lost its aliasing; returns how many buffers had."""
        broken = [rows for rows in (*self.qkv, *self.gate_up) if not rows.is_aliased()]
        for rows in broken:
            rows.mend()
        return len(broken)

    def bytes(self) -> int:
        """Bytes of all buffers. They are the model's own storage, not a copy."""
        tensors = (t for rows in (*self.qkv, *self.gate_up) for t in (rows.weight, rows.bias))
        return sum(t.nbytes for t in tensors if t is not None)
