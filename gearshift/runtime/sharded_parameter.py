"""A parameter that FSDP2 has split over the ranks, as the optimizer sees it. It must not import the
optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gearshift.runtime.distributed import Part, world


class ShardedParameter:
    """This rank's rows of a parameter, in fp32 and end to end. FSDP's own memory is the master
    weight: an update writes it in place, and no copy exists.

    It has the interface of the optimizer's flat buffers.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameters = [parameter]
        self.master = own_rows(parameter).detach().view(-1).requires_grad_()
        self.sums: Tensor | None = None
        """This rank's rows of the gradient, which FSDP has summed over the ranks."""
        mesh = self._split.device_mesh
        self.copies = mesh.size() // mesh.size(mesh.ndim - 1)
        """How many ranks hold these same rows."""

    def accumulate(self) -> None:
        """FSDP itself adds up the gradients of micro-batches in fp32."""

    def share(self) -> None:
        """Take the gradient's rows from FSDP."""
        [parameter] = self.parameters
        grad, parameter.grad = parameter.grad, None
        self.sums = torch.zeros_like(self.master) if grad is None else own_rows(grad).view(-1)

    def gather(self, scale: float) -> Tensor:
        """The gradient's rows times `scale`; afterwards there are none."""
        sums, self.sums = self.sums, None
        assert sums is not None
        return sums.mul_(scale) if scale != 1.0 else sums

    def scatter(self) -> None:
        """FSDP reads the master weight itself."""

    def saved(self, own: Tensor) -> Part:
        """What a checkpoint holds of a tensor like `master`: rows of one like the parameter."""
        p = self._split
        rows = own.view(p.to_local().shape)
        if self.copies > 1:  # a node has all rows, and a checkpoint has them once
            whole = DTensor.from_local(
                rows, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            ).full_tensor()
            rows = whole[world().part_of(len(whole))]
        return Part(rows, p.shape[0])

    def loaded(self, rows: Tensor) -> Tensor:
        """The inverse of `saved`: of a checkpoint's part, or of all rows."""
        if self.copies > 1 and len(rows) < self._split.shape[0]:
            rows = torch.cat(world().gather(rows, "the rows of a parameter"))
        if rows.numel() != self.master.numel():
            mesh = self._split.device_mesh
            of, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
            each = -(-len(rows) // ranks)  # as torch.chunk cuts them
            rows = rows[of * each :][:each]
        return rows.reshape(-1)

    @property
    def _split(self) -> DTensor:
        [parameter] = self.parameters
        assert isinstance(parameter, DTensor)
        return parameter


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows of a tensor that is split over the ranks; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x
