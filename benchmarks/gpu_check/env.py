"""Step 0: what the card can do at best. These figures turn the others into fractions."""

from __future__ import annotations

import torch

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.probe import Probe

NODES = 1000


def ceilings(probe: Probe) -> None:
    """Bandwidth, products, launches and copies from the host."""
    if probe.cuda:
        card = torch.cuda.get_device_properties(probe.device)
        told = f"sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors"
        probe.shows("card", f"{card.name}, {told}, {card.total_memory / 2**30:.1f} GiB")
    with probe.case("cuDNN"):
        probe.shows("cuDNN", torch.backends.cudnn.version())
    copy(probe)
    for dtype, least in ((torch.bfloat16, 600.0), (torch.float32, 30.0)):
        product(probe, dtype, least)
    launches(probe)
    from_host(probe)


def copy(probe: Probe) -> None:
    """Bytes read and written a second by a copy on the device."""
    source = probe.randn(probe.size(2**30, 2**16))
    target = torch.empty_like(source)
    seconds = probe.seconds(lambda: target.copy_(source))
    probe.fast("copy on the card", 2 * source.nbytes / seconds / 1e12, 2.5, "TB/s")


def product(probe: Probe, dtype: torch.dtype, least: float) -> None:
    """Products of large random matrices."""
    n = probe.size(8192, 64)
    a, b = probe.randn(n, n, dtype=dtype), probe.randn(n, n, dtype=dtype)
    seconds = probe.seconds(lambda: a @ b)
    name = str(dtype).removeprefix("torch.")
    probe.fast(f"product {n}^3 {name}", 2 * n**3 / seconds / 1e12, least, "TFLOP/s")


def launches(probe: Probe) -> None:
    """Microseconds of a small kernel: called by Python, and as a node of a CUDA graph."""
    x = probe.randn(32)

    def many() -> None:
        for _ in range(NODES):
            x.mul_(0.999)

    probe.shows("a small operation from Python", probe.wall(many) / NODES * 1e6, "us")
    if not probe.cuda:
        probe.omits("a node of a CUDA graph", "only a card has graphs")
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    probe.shows("a node of a CUDA graph", probe.seconds(graph.replay) / NODES * 1e6, "us")


def from_host(probe: Probe) -> None:
    """Bytes a second from the host's memory, pageable and pinned."""
    pageable = torch.randn(probe.size(2**26, 2**12))
    target = torch.empty_like(pageable, device=probe.device)
    pinned = pageable.pin_memory() if probe.cuda else pageable
    for name, source in (("pageable", pageable), ("pinned", pinned)):
        seconds = probe.seconds(lambda source=source: target.copy_(source, non_blocking=True))
        probe.shows(f"copy from {name} memory", source.nbytes / seconds / 1e9, "GB/s")


PARTS = (Part(ceilings, 12),)
