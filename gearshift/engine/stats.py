"""How fast this machine could decode: its measured bandwidth and product rate against the bytes and
products that a step cannot do without (Williams et al. 2009, the roofline model).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch


@dataclass(frozen=True)
class Roofline:
    """Of one device and type."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, bytes_read: float, flops: float) -> float:
        """The time that so much must take: reading or computing, whichever is longer."""
        return max(bytes_read / self.bytes_per_second, flops / self.flops_per_second)


@lru_cache(4)
def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Read much more than caches hold, and multiply large matrices; medians of several rounds."""
    big = torch.ones(2**27, dtype=torch.float32, device=device)  # 512 MiB
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    bandwidth = big.nbytes / _seconds(big.sum, device)
    return Roofline(bandwidth, 2 * size**3 / _seconds(lambda: a @ b, device))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    samples = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - began)
    return median(samples[2:])
