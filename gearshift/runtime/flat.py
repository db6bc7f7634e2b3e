"""Parameters end to end in fp32, of which each rank has a part: the buffers that the optimizer
updates. It must not import the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gearshift.runtime.distributed import Part, world
from gearshift.runtime.sharded_parameter import ShardedParameter
from gearshift.runtime.transfers import Staging

BLOCK = 256
"""How many numbers share a scale in 8-bit moments; the flat buffers consist of whole blocks."""
LARGEST = 1 << 25
"""How many numbers one flat buffer has at most, unless a single parameter has more."""
_SUMMED = 1 << 12
"""How many numbers are summed in float32."""


class Flat:
    """Parameters end to end in one fp32 buffer, or this rank's part of it: `ceil(n / ranks)`
    numbers, then zeros up to a whole block.
    """

    def __init__(
        self, parameters: list[nn.Parameter], device: torch.device, staging: Staging | None
    ) -> None:
        """`staging` is between a buffer on the host and parameters on a GPU."""
        self.parameters, self._device, self._staging = parameters, device, staging
        self.copies = 1
        sizes = [p.numel() for p in parameters]
        self._numel, ranks = sum(sizes), world().size
        self._own = -(-self._numel // ranks)
        width = -(-self._own // BLOCK) * BLOCK
        size = self._own * ranks if ranks > 1 else width
        self._sizes = [*sizes, size - self._numel]
        whole = torch.zeros(size, device=device)
        for parameter, part in zip(parameters, self._parts(whole), strict=False):
            part.copy_(parameter.detach().flatten())
        self.master = whole
        if ranks > 1:
            self.master = torch.zeros(width, device=device)
            self.master[: self._own] = whole[world().rank * self._own :][: self._own]
        self.master.requires_grad_()
        self.sums: Tensor | None = None
        """The sums of the gradients of the micro-batches so far, in fp32, for parameters of less
        precision.
        """

    def accumulate(self) -> None:
        """Add the parameters' gradients to the sums and clear them. Gradients in fp32 need no sums:
        torch itself adds them up.
        """
        if all(p.dtype.itemsize >= 4 for p in self.parameters):
            return
        if self.sums is None:
            self.sums = self._zeros()
        for grad, part in self._gradients(self.sums):
            part += grad

    def share(self) -> None:
        """Make `sums` this rank's part of the gradient, summed over the ranks."""
        whole = self.sums
        if whole is None:
            whole = self._zeros()
            for grad, part in self._gradients(whole):
                part.copy_(grad)
        self.sums = torch.zeros_like(self.master)
        self.sums[: self._own] = world().reduce_scatter(whole)

    def gather(self, scale: float) -> Tensor:
        """The gradients in fp32 times `scale`, end to end; afterwards the parameters have none."""
        flat, self.sums = self.sums, None
        if flat is None:
            flat = self._zeros()
            for grad, part in self._gradients(flat):
                part.copy_(grad)
        return flat.mul_(scale) if scale != 1.0 else flat

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the model's parameters in place."""
        whole = self.master.detach()
        if world().size > 1:
            # In the parameters' own precision, if it is one: half the bytes.
            kinds = {p.dtype for p in self.parameters}
            kind = kinds.pop() if len(kinds) == 1 else torch.float32
            whole = world().all_gather(whole[: self._own].to(kind))
        if self._staging:
            self._staging.write(self.parameters, self._parts(whole)[:-1])
            return
        for parameter, part in zip(self.parameters, self._parts(whole), strict=False):
            parameter.copy_(part.view_as(parameter))

    def saved(self, own: Tensor) -> Part:
        """What a checkpoint holds of a tensor like `master`: without the zeros at its end, so that
        it does not depend on the number of ranks.
        """
        mine = world().part_of(self._numel)
        return Part(own[: mine.stop - mine.start], self._numel)

    def loaded(self, part: Tensor | Part) -> Tensor:
        """The inverse of `saved`, also of what a checkpoint gives for it."""
        part = part.own if isinstance(part, Part) else part
        own = torch.zeros(self.master.shape, dtype=part.dtype)
        own[: len(part)] = part
        return own

    def _zeros(self) -> Tensor:
        return torch.zeros(sum(self._sizes), device=self._device)

    def _gradients(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each gradient, flattened, with its part of `flat`. Each parameter then has none."""
        pairs = zip(self.parameters, self._parts(flat), strict=False)
        known = [(p, part) for p, part in pairs if p.grad is not None]
        grads = [p.grad for p, _ in known if p.grad is not None]
        if self._staging:
            grads = self._staging.read(grads)
        for (parameter, part), grad in zip(known, grads, strict=True):
            yield grad.flatten(), part
            parameter.grad = None

    def _parts(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split_with_sizes(self._sizes)


def flats_of(
    parameters: list[nn.Parameter], device: torch.device, staging: Staging | None
) -> list[Flat | ShardedParameter]:
    """The parameters in order, in as few buffers as `LARGEST` allows; then those that are split
    over the ranks.
    """
    runs: list[list[nn.Parameter]] = []
    size = 0
    split = [ShardedParameter(p) for p in parameters if isinstance(p, DTensor)]
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if not runs or size + parameter.numel() > LARGEST:
            runs.append([])
            size = 0
        runs[-1].append(parameter)
        size += parameter.numel()
    return [*(Flat(run, device, staging) for run in runs), *split]


def squares(x: Tensor) -> Tensor:
    """The sum of the squares, in float64 over blocks of float32: one sum in float32 over millions
    of numbers loses its fourth digit, and so depends on how they are cut.
    """
    flat = x.reshape(-1)
    whole = len(flat) // _SUMMED * _SUMMED
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _SUMMED), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return norms.double().square().sum() + rest.double().square()
