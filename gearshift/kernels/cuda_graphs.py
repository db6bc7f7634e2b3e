"""Captured steps of a GPU: CUDA graphs on one stream, in one pool of memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.errors import KernelError
from gearshift.kernels.specs import Prepare, Run

log = logging.getLogger(__name__)


class CudaGraphs:
    """Captures steps. All graphs have one stream, as long as this object lives: cuBLAS keeps one
    workspace a stream, and a graph reads the workspace of the stream that it was captured on. Live
    graphs share one pool, for no two of them run at the same time.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._newest: ref[_Graph] | None = None
        """A graph of the pool. A pool whose graphs are all gone cannot be opened again."""

    def capture(self, prepare: Prepare, run: Run) -> Run | None:
        """See `Kernels.capture`. It is None if the host must wait for the device in a step, which a
        graph cannot hold. Raises `KernelError` if a capture fails.
        """
        self._stream = stream = self._stream or torch.cuda.Stream()
        caller = torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream), _named_errors(), HostWaits() as waits:
                prepare()  # here kernels are compiled, and cuBLAS gets its workspace
                run()
            if waits.found:
                log.warning(
                    "Decode steps run without CUDA graphs, slower: %s waits for the GPU.",
                    waits.found,
                )
                return None
            if self._live() is None:
                gc.collect()  # graphs of an earlier set that nothing uses any more
            torch.cuda.synchronize()
            with torch.cuda.stream(stream), _named_errors(), _no_collection():
                graph = self._captured(prepare, run)
        finally:
            caller.wait_stream(stream)
        self._newest = ref(graph)
        return graph

    def bytes(self) -> int:
        """Bytes of the pool, which holds what the graphs write to."""
        newest = self._live()
        if newest is None:
            return 0
        pool = tuple(newest.graph.pool())
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)

    def _live(self) -> _Graph | None:
        return self._newest() if self._newest else None

    def _captured(self, prepare: Prepare, run: Run) -> _Graph:
        newest = self._live()
        pool = newest.graph.pool() if newest else torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` gives the allocator's memory back each time; this does not. Other
        # threads may use the device meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            prepare()
            out = run()
        except BaseException:
            with suppress(RuntimeError):  # the first error is the one that names the cause
                graph.capture_end()
            raise
        graph.capture_end()
        return _Graph(graph, out, (prepare, run))


class _Graph:
    """A captured step. It holds the functions that were captured, because the graph reads and
    writes their tensors by address.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, out: Tensor, step: tuple[Prepare, Run]) -> None:
        self.graph, self._out, self._step = graph, out, step

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self._out


class HostWaits(TorchDispatchMode):
    """Notices operations after which a host waits for its device."""

    found: str | None = None
    """The first such operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None and _waits(func, args, out):
            self.found = str(func)
        return out


_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.bincount, _aten.masked_select, _aten._unique2,
    _aten.unique_dim, _aten.unique_consecutive, _aten.equal,
}  # fmt: skip


def _waits(func: Any, args: Any, out: Any) -> bool:
    kind = func.overloadpacket
    if kind in _WAITS or func is _aten.repeat_interleave.Tensor:
        return True
    if kind in (_aten.index, _aten.index_put, _aten.index_put_):
        masks = (torch.bool, torch.uint8)
        place = args[0].device  # an index on another device is copied first
        return any(i is not None and (i.dtype in masks or i.device != place) for i in args[1])
    if func is _aten._to_copy.default:
        return bool(args[0].device != out.device)
    return func is _aten.copy_.default and bool(args[0].device != args[1].device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside: a graph that dies there would invalidate the capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _named_errors() -> Iterator[None]:
    """PyTorch's errors become a `KernelError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise KernelError(
            "The GPU has no memory left to capture the decode steps; lower "
            "engine.gpu_memory_utilization or engine.max_num_seqs."
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise KernelError(
            f"A decode step cannot be captured as a CUDA graph ({reason}); set "
            "engine.capture_steps=false."
        ) from error
