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
        return _part(self._split, own)

    def loaded(self, rows: Tensor) -> Tensor:
        """The inverse of `saved`: of a checkpoint's part, or of all rows."""
        return loaded_rows(self._split, rows).reshape(-1)

    @property
    def _split(self) -> DTensor:
        [parameter] = self.parameters
        assert isinstance(parameter, DTensor)
        return parameter


def own_rows(x: Tensor) -> Tensor:
    """This rank's rows of a tensor that is split over the ranks; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def saved_rows(like: Tensor, own: Tensor) -> Tensor | Part:
    """What a checkpoint holds of a tensor of which this rank has the rows that it has of `like`."""
    return _part(like, own) if isinstance(like, DTensor) else own


def loaded_rows(like: Tensor, rows: Tensor) -> Tensor:
    """The inverse of `saved_rows`: of a checkpoint's part, or of all rows."""
    if not isinstance(like, DTensor):
        return rows
    mesh = like.device_mesh
    of, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    if mesh.size() > ranks and len(rows) < like.shape[0]:
        rows = torch.cat(world().gather(rows, "the rows of a parameter"))
    if rows.numel() != like.to_local().numel():
        each = -(-len(rows) // ranks)  # as torch.chunk cuts them
        rows = rows[of * each :][:each]
    return rows


def _part(like: DTensor, own: Tensor) -> Part:
    rows, mesh = own.view(like.to_local().shape), like.device_mesh
    if mesh.size() > mesh.size(mesh.ndim - 1):  # a node has all rows, and a checkpoint once
        whole = DTensor.from_local(
            rows.to(like.to_local().device), mesh, like.placements,
            shape=like.shape, stride=like.stride(),
        ).full_tensor()  # fmt: skip
        rows = whole[world().part_of(len(whole))]
    return Part(rows, like.shape[0])
