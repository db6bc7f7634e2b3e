"""A parameter that FSDP2 has split over the ranks, as the optimizer sees it. It must not import the
optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gearshift.runtime.distributed import Part


class ShardedParameter:
    """This rank's rows of a parameter, in fp32 and end to end. FSDP's own memory is the master
    weight: an update writes it in place, and no copy exists.

    It has the interface of the optimizer's flat buffers.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameters = [parameter]
        self.master = _own(parameter).detach().view(-1).requires_grad_()
        self.sums: Tensor | None = None
        """This rank's rows of the gradient, which FSDP has summed over the ranks."""
        self._numel = parameter.numel()
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        self.copies = mesh.size() // mesh.size(mesh.ndim - 1)
        """How many ranks hold these same rows."""

    def accumulate(self) -> None:
        """FSDP itself adds up the gradients of micro-batches in fp32."""

    def share(self) -> None:
        """Take the gradient's rows from FSDP."""
        [parameter] = self.parameters
        grad, parameter.grad = parameter.grad, None
        self.sums = torch.zeros_like(self.master) if grad is None else _own(grad).view(-1)

    def gather(self, scale: float) -> Tensor:
        """The gradient's rows times `scale`; afterwards there are none."""
        sums, self.sums = self.sums, None
        assert sums is not None
        return sums.mul_(scale) if scale != 1.0 else sums

    def scatter(self) -> None:
        """FSDP reads the master weight itself."""

    def saved(self, own: Tensor) -> Part:
        """What a checkpoint holds of a tensor like `master`."""
        return Part(own, self._numel)

    def loaded(self, part: Tensor) -> Tensor:
        """The inverse of `saved`: of the whole, or of this rank's part."""
        if len(part) == len(self.master):
            return part
        [parameter] = self.parameters
        rows, width = self._first_row(), self._numel // max(1, parameter.shape[0])
        return part[rows * width :][: len(self.master)]

    def _first_row(self) -> int:
        """The row of the whole parameter with which this rank's rows begin."""
        [parameter] = self.parameters
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        ranks = mesh.size(mesh.ndim - 1)
        return int(mesh.get_local_rank(mesh.ndim - 1)) * -(-int(parameter.shape[0]) // ranks)


def _own(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    return x.to_local()
