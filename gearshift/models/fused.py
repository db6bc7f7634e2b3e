"""One storage: parameters that are used together are stored together, and the model's own are views
of it.

So an optimizer that writes in place has already told the generation gear. What breaks the aliasing
(`.to()`, `.data =`) is found at a shift and mended. Where a CPU multiplies faster by weights in a
layout of its own, a packed copy is a cache of one weights version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gearshift.kernels.autograd import SlicedLinear
from gearshift.kernels.reference import Kernels, PrepackedLinear
from gearshift.kernels.specs import Linear
from gearshift.models.describe import Plan, own


class FusedLinear:
    """Several linear layers of one input as one: weights (and biases) are slices of one buffer.

    A layer may carry an adapter (LoRA); it is added to the layer's slice of the output. GPT-2's
    `Conv1D`, whose weight is the transpose, is one too.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.linears: list[Any] = [own(module) for module in modules]
        self.transposed = isinstance(self.linears[0], Conv1D)
        self.product: PrepackedLinear | None = None
        """Of the packed copy, where there is one."""
        self._stamp: tuple[object, ...] = ()
        self.weight, self.bias = self._fuse()
        ends = torch.tensor([self._out(linear) for linear in self.linears]).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        each = zip(modules, self.slices, strict=True)
        self.adapted: list[tuple[Any, slice]] = [
            (module, part) for module, part in each if own(module) is not module
        ]

    def __call__(self, x: Tensor, multiply: Linear = F.linear) -> Tensor:
        """[T, in] -> [T, sum of outs]; without a graph by the packed copy, else by `multiply`."""
        if torch.is_grad_enabled():
            weights = [linear.weight for linear in self.linears]
            biases = [] if self.bias is None else [linear.bias for linear in self.linears]
            sizes = [part.stop - part.start for part in self.slices]
            y: Tensor = SlicedLinear.apply(
                x, self.weight, self.bias, sizes, self.transposed, *weights, *biases
            )
        elif self.product is not None:
            y = self.product(x, self.bias)
        else:
            y = multiply(x, self.weight.t() if self.transposed else self.weight, self.bias)
        if torch.is_grad_enabled():
            multiply = F.linear
        for module, part in self.adapted:
            for down, up, scaling in adapters(module):
                low = multiply(x.to(down.weight.dtype), down.weight, down.bias)
                y[:, part] += (multiply(low, up.weight, up.bias) * scaling).to(y.dtype)
        return y

    def pack(self, kernels: Kernels, version: int, rows: int) -> None:
        """Have a copy of this version's weight in the layout that products of about `rows` rows are
        fastest in. A weight that is not trained and was not written keeps the copy that it has.
        """
        trained = any(linear.weight.requires_grad for linear in self.linears)
        merged = [tuple(module.merged_adapters) for module, _ in self.adapted]
        stamp = (
            version if trained else 0, *(linear.weight._version for linear in self.linears), *merged
        )  # fmt: skip
        if self._stamp != stamp:
            self._stamp = stamp
            weight = (self.weight.t() if self.transposed else self.weight).detach()
            if self.product is None:
                self.product = kernels.prepacked_linear(weight, rows)
            else:  # in its place: recorded steps read it there
                self.product.prepack(weight)

    def unpack(self) -> None:
        """Give the packed copy back."""
        self.product, self._stamp = None, ()

    def is_aliased(self) -> bool:
        """Whether each parameter still lies where its slice of the buffer does."""
        for linear, part in zip(self.linears, self.slices, strict=True):
            for parameter, buffer in ((linear.weight, self.weight), (linear.bias, self.bias)):
                if buffer is None or parameter is None:
                    continue
                place = buffer if len(self.linears) == 1 else buffer[part]
                if parameter.dtype != buffer.dtype or parameter.data_ptr() != place.data_ptr():
                    return False
        return True

    def mend(self) -> None:
        """Alias again; the parameters' present values win, in the same `Parameter` objects."""
        self.weight, self.bias = self._fuse()
        self._stamp = ()  # a packed copy is of what was there before

    def _fuse(self) -> tuple[Tensor, Tensor | None]:
        if len(self.linears) == 1:
            [linear] = self.linears
            return linear.weight.data, None if linear.bias is None else linear.bias.data
        with torch.no_grad():
            weight = torch.cat([linear.weight for linear in self.linears])
            has_bias = self.linears[0].bias is not None
            bias = torch.cat([linear.bias for linear in self.linears]) if has_bias else None
            row = 0
            for linear in self.linears:
                rows = slice(row, row + len(linear.weight))
                linear.weight.data = weight[rows]
                if bias is not None:
                    linear.bias.data = bias[rows]
                row = rows.stop
        return weight, bias

    def _out(self, linear: Any) -> int:
        return int(linear.weight.shape[1 if self.transposed else 0])


class AliasedWeights:
    """Every product of a plan's layers, and of the head."""

    def __init__(self, plan: Plan, head: nn.Module) -> None:
        self.qkv = [FusedLinear(layer.qkv) for layer in plan.layers]
        self.out = [FusedLinear([layer.out]) for layer in plan.layers]
        self.up = [FusedLinear(layer.up) for layer in plan.layers]
        self.down = [FusedLinear([layer.down]) for layer in plan.layers]
        self.head = FusedLinear([head])

    def __iter__(self) -> Iterator[FusedLinear]:
        yield from (*self.qkv, *self.out, *self.up, *self.down, self.head)

    def check(self) -> int:
        """Mend whatever lost its aliasing; returns how many buffers had."""
        broken = [linear for linear in self if not linear.is_aliased()]
        for linear in broken:
            linear.mend()
        return len(broken)

    def pack(self, kernels: Kernels, version: int, rows: int) -> None:
        """Have packed copies of this weights version."""
        for linear in self:
            linear.pack(kernels, version, rows)

    def unpack(self) -> None:
        """Give the packed copies back."""
        for linear in self:
            linear.unpack()

    def bytes(self) -> int:
        """Bytes of the fused buffers. They are the model's own storage, not a copy."""
        fused = [linear for linear in self if len(linear.linears) > 1]
        return sum(
            t.nbytes for linear in fused for t in (linear.weight, linear.bias) if t is not None
        )

    def packed_bytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(linear.weight.nbytes for linear in self if linear.product is not None)


def adapters(module: Any) -> list[tuple[nn.Linear, nn.Linear, float]]:
    """(down, up, scaling) of each LoRA adapter that is switched on in this layer."""
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    return [
        (module.lora_A[name], module.lora_B[name], module.scaling[name])
        for name in module.active_adapters
        if name in module.lora_A
    ]
