"""Parameters that are used together are stored together: the model's own parameters are slices of
one buffer.

So the generation gear reads what an optimizer writes in place. What breaks the aliasing (`.to()`,
`.data =`) is found when the gears shift, and restored. Where a CPU multiplies faster by weights in
a layout of its own, a prepacked copy is a cache of one version of the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gearshift.errors import ModelError
from gearshift.kernels.autograd import SlicedLinear
from gearshift.kernels.reference import Kernels, PrepackedLinear
from gearshift.kernels.specs import Linear
from gearshift.models.describe import Plan, base_layer


class FusedLinear:
    """Several linear layers of one input as one: weights (and biases) are slices of one buffer.

    Weights that already lie end to end, as DeepSpeed lays them, are adopted where they are; others
    are copied into one buffer. A layer may carry an adapter (LoRA), which is added to the layer's
    slice of the output. A layer may be GPT-2's `Conv1D`, whose weight is the transpose.
    """

    def __init__(self, modules: Sequence[nn.Module], fuse: bool = True) -> None:
        """`fuse=False` leaves the weights where they are, and concatenates them at each call: a
        sharded layer has its whole weights only while it runs.
        """
        self.modules, self.fused = tuple(modules), fuse
        self.linears: list[Any] = [base_layer(module) for module in modules]
        self.transposed = isinstance(self.linears[0], Conv1D)
        self.product: PrepackedLinear | None = None
        """Multiplies by the prepacked copy, where there is one."""
        self._stamp: tuple[object, ...] = ()
        self.weight, self.bias = self._fuse() if fuse else (torch.empty(0), None)
        ends = torch.tensor([self._out(linear) for linear in self.linears]).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        each = zip(modules, self.slices, strict=True)
        self.adapted: list[tuple[Any, slice]] = [
            (module, part) for module, part in each if base_layer(module) is not module
        ]

    def __call__(self, x: Tensor, multiply: Linear = F.linear) -> Tensor:
        """[T, in] -> [T, sum of outs]; without a graph by the prepacked copy, if it is there."""
        if not self.fused:
            y = self._unfused(x)
        elif torch.is_grad_enabled():
            weights = [linear.weight for linear in self.linears]
            biases = [] if self.bias is None else [linear.bias for linear in self.linears]
            sizes = [part.stop - part.start for part in self.slices]
            y = SlicedLinear.apply(
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

    def prepack(self, kernels: Kernels, version: int, rows: int) -> None:
        """Copy this version's weight into the layout in which products of about `rows` rows are
        fastest. A weight that is not trained and was not written keeps the copy that it has.
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
            else:  # in its place: captured steps read it there
                self.product.prepack(weight)

    def drop_prepacked(self) -> None:
        """Free the prepacked copy."""
        self.product, self._stamp = None, ()

    def is_aliased(self) -> bool:
        """Whether each parameter still lies where its slice of the buffer does."""
        if not self.fused:
            return True
        for linear, part in zip(self.linears, self.slices, strict=True):
            for parameter, buffer in ((linear.weight, self.weight), (linear.bias, self.bias)):
                if buffer is None or parameter is None:
                    continue
                place = buffer if len(self.linears) == 1 else buffer[part]
                if parameter.dtype != buffer.dtype or parameter.data_ptr() != place.data_ptr():
                    return False
        return True

    def realias(self) -> None:
        """Alias again. The parameters keep their values, and stay the same `Parameter` objects."""
        self.weight, self.bias = self._fuse()
        self._stamp = ()  # the prepacked copy is of what was there before

    def _unfused(self, x: Tensor) -> Tensor:
        if len(self.linears) == 1:
            [linear] = self.linears
            return F.linear(x, linear.weight.t() if self.transposed else linear.weight, linear.bias)
        biases = [linear.bias for linear in self.linears if linear.bias is not None]
        weight = torch.cat([linear.weight for linear in self.linears])
        return F.linear(x, weight, torch.cat(biases) if biases else None)

    def _fuse(self) -> tuple[Tensor, Tensor | None]:
        weight = _end_to_end([linear.weight for linear in self.linears])
        if self.linears[0].bias is None:
            return weight, None
        return weight, _end_to_end([linear.bias for linear in self.linears])

    def _out(self, linear: Any) -> int:
        return int(linear.weight.shape[1 if self.transposed else 0])


def _end_to_end(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of which the parameters are slices, end to end: where they lie, if they lie so;
    else a copy, to which they are pointed.
    """
    first = parameters[0].data
    if _lie_end_to_end(parameters):
        rows = sum(map(len, parameters))
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    if len(parameters) == 1:
        return first
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([*map(len, parameters)]), strict=True):
        parameter.data = part
    return whole


def _lie_end_to_end(parameters: Sequence[nn.Parameter]) -> bool:
    first = parameters[0].data
    storage, place = first.untyped_storage().data_ptr(), first.storage_offset()
    for parameter in parameters:
        part = parameter.data
        lies_next = part.untyped_storage().data_ptr() == storage and part.storage_offset() == place
        if not (lies_next and part.is_contiguous() and part.dtype == first.dtype):
            return False
        place += part.numel()
    return True


def _require_movable(layers: Iterable[Sequence[nn.Module]]) -> None:
    """Raises `ModelError` if parameters that must be moved together lie in one buffer with others:
    who laid them there, as DeepSpeed does, would go on writing where nothing reads.
    """
    groups = []
    for modules in layers:
        linears: list[Any] = [base_layer(module) for module in modules]
        groups.append([linear.weight for linear in linears])
        if linears[0].bias is not None:
            groups.append([linear.bias for linear in linears])
    held: dict[int, set[int]] = defaultdict(set)
    """By storage: the parameters that lie there."""
    for parameter in chain.from_iterable(groups):
        held[parameter.untyped_storage()._cdata].add(id(parameter))
    for group in groups:
        here, stays = set(map(id, group)), len(group) == 1 or _lie_end_to_end(group)
        if not stays and any(held[p.untyped_storage()._cdata] - here for p in group):
            raise ModelError(
                "Another library, such as DeepSpeed, keeps the weights in a buffer of its own, in "
                "an order that the engine cannot use; train without it, or give each parameter its "
                "own storage (`p.data = p.data.clone()`)."
            )


class AliasedWeights:
    """The linear layers of a plan's decoder layers, and the head."""

    def __init__(self, plan: Plan, head: nn.Module, fuse: bool = True) -> None:
        """For `fuse` see `FusedLinear`."""
        if fuse:
            _require_movable(each for layer in plan.layers for each in (layer.qkv, layer.up))
        self.qkv = [FusedLinear(layer.qkv, fuse) for layer in plan.layers]
        self.out = [FusedLinear([layer.out], fuse) for layer in plan.layers]
        self.up = [FusedLinear(layer.up, fuse) for layer in plan.layers]
        self.down = [FusedLinear([layer.down], fuse) for layer in plan.layers]
        self.head = FusedLinear([head], fuse)

    def __iter__(self) -> Iterator[FusedLinear]:
        yield from (*self.qkv, *self.out, *self.up, *self.down, self.head)

    def restore(self) -> int:
        """Alias again the parameters that lost their aliasing; returns in how many buffers there
        were any. Raises `ModelError` if another library moved them into a buffer of its own.
        """
        broken = [linear for linear in self if not linear.is_aliased()]
        if broken:
            _require_movable(linear.modules for linear in self)
        for linear in broken:
            linear.realias()
        return len(broken)

    def prepack(self, kernels: Kernels, version: int, rows: int) -> None:
        """Make prepacked copies of this version of the weights, if there are none."""
        for linear in self:
            linear.prepack(kernels, version, rows)

    def drop_prepacked(self) -> None:
        """Free the prepacked copies."""
        for linear in self:
            linear.drop_prepacked()

    def bytes(self) -> int:
        """Bytes of the fused buffers. They are the model's own storage, not a copy."""
        fused = [linear for linear in self if len(linear.linears) > 1]
        return sum(
            t.nbytes for linear in fused for t in (linear.weight, linear.bias) if t is not None
        )

    def prepacked_bytes(self) -> int:
        """Bytes of the prepacked copies."""
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
