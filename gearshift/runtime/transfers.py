"""Copies between a GPU and the host's memory that run beside the GPU's other work: from and to
pinned memory, on a stream of their own. It knows no optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gearshift.runtime.allocator import short_of_memory

_ALIGNED = 64
"""Each tensor in a buffer begins at a multiple of so many bytes."""


class Transfers:
    """A queue of copies for one GPU. Copies run in the order in which they are given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] in the host's memory: pinned, so that a copy need not wait; or plain memory, with
        slower copies, where no more memory can be pinned.
        """
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            if not short_of_memory(error):
                raise
            return torch.empty(size, dtype=dtype)

    @torch.no_grad()
    def copy(self, into: Tensor, source: Tensor) -> None:
        """Queue a copy, one of whose ends is on the GPU: it begins when the GPU has done what it
        was given before. The GPU's end may be freed at once; the host's end must not be read or
        written before `wait`.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        (source if source.is_cuda else into).record_stream(self._stream)

    def join(self) -> None:
        """What the GPU is given from now on begins after all copies."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def wait(self) -> None:
        """Return when all copies are done, so that the host may read and write its ends."""
        self._stream.synchronize()


class Staging:
    """Tensors of a GPU that are read and written on the host, a few at a time: they pass through
    one piece of the host's memory.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The values of these tensors on the host, until the next call."""
        parts = self._parts(tensors)
        for part, tensor in zip(parts, tensors, strict=True):
            self._transfers.copy(part, tensor)
        self._transfers.wait()
        return parts

    def write(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write values on the host into these tensors. What the GPU is given from now
        on begins after that.
        """
        parts = self._parts(tensors)
        for tensor, part, value in zip(tensors, parts, values, strict=True):
            part.copy_(value.view_as(part))
            self._transfers.copy(tensor, part)
        self._transfers.join()

    def _parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A part of the buffer for each tensor; what was copied from and to it is done."""
        places = [0, *accumulate(-(-x.nbytes // _ALIGNED) * _ALIGNED for x in tensors)]
        self._transfers.wait()
        if len(self._buffer) < places[-1]:
            self._buffer = self._transfers.host_buffer(places[-1], torch.uint8)
        return [
            self._buffer[place : place + x.nbytes].view(x.dtype).view(x.shape)
            for place, x in zip(places, tensors, strict=False)
        ]
