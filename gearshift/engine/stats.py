"""What generation did and how long it took, beside how fast this machine could decode: its measured
bandwidth and product rate against the bytes and products that a step needs at least (Williams et
al. 2009, the roofline model).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from statistics import median

import torch
from transformers import PreTrainedModel

from gearshift.runtime.allocator import short_of_memory
from gearshift.runtime.free_memory import free_bytes

_READ = 2**29
"""Bytes that are read at a time to measure the bandwidth: more than any cache holds."""


@dataclass(slots=True)
class GenerationStats:
    """What was done since these figures were last taken."""

    shift_seconds: float = 0.0
    """Shifts from one gear to the other."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_tokens: int = 0
    """Prompt tokens computed; those whose keys were cached are not among them."""
    shared_tokens: int = 0
    """Prompt tokens that were not computed, because their keys were cached."""
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_positions: int = 0
    """Cached positions that decoding read, over all steps and rows."""
    preemptions: int = 0

    def take(self) -> GenerationStats:
        """Return a copy, and set these figures back to zero."""
        done = replace(self)
        for field in fields(self):
            setattr(self, field.name, field.default)
        return done

    def named(self, model: PreTrainedModel, position_bytes: float) -> dict[str, float]:
        """The figures by their names in the metrics."""
        return {
            "shift_seconds": self.shift_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_tokens / max(self.decode_seconds, 1e-9),
            "roofline_fraction": self.roofline_fraction(model, position_bytes),
            "shared_tokens": float(self.shared_tokens),
            "preemptions": float(self.preemptions),
        }

    def roofline_fraction(self, model: PreTrainedModel, position_bytes: float) -> float:
        """The time that decoding must take on this machine over the time it took: weights and
        cached positions read once a step, or their products, whichever takes longer.
        """
        if not self.decode_steps:
            return float("nan")
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        # Of an input embedding that is not the head too, decoding reads a few rows.
        unread = None if head is None or head.weight is embedding else embedding
        used = [p for p in model.parameters() if p is not unread]
        weights, elements = sum(p.nbytes for p in used), sum(p.numel() for p in used)
        read = self.decode_steps * weights + self.decode_positions * position_bytes
        roofline = measure_if_it_fits(next(model.parameters()).device, model.dtype)
        if roofline is None:
            return float("nan")
        return roofline.seconds(read, 2.0 * elements * self.decode_tokens) / self.decode_seconds


_TERAFLOPS = {
    r"B200": 2250, r"H200": 989, r"H100 PCIe": 756, r"H100 NVL": 835, r"H100": 989, r"A100": 312,
    r"L40S": 362, r"L4": 121, r"A10": 125, r"RTX A6000": 155, r"RTX 4090": 165, r"RTX 3090": 71,
}  # fmt: skip
"""Dense products in bf16 with sums in fp32 by the makers' data sheets, in 1e12 operations a second.
The first name that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that the maker promises for this GPU in bf16; where that is not known,
    those that `measure_if_it_fits` finds, and NaN if there is no memory for that.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(device)
        for name, tera in _TERAFLOPS.items():
            if re.search(rf"\b{name}\b", card) and "Laptop" not in card:
                return tera * 1e12
    measured = measure_if_it_fits(device, dtype)
    return measured.flops_per_second if measured else float("nan")


@dataclass(frozen=True)
class Roofline:
    """What one device reaches in one precision."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, bytes_read: float, flops: float) -> float:
        """The time that so much must take: reading or computing, whichever is longer."""
        return max(bytes_read / self.bytes_per_second, flops / self.flops_per_second)


@lru_cache(4)
def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Read much more than caches hold, and multiply large matrices; medians of several rounds. It
    takes up to 512 MiB.
    """
    return Roofline(_bytes_per_second(device), _flops_per_second(device, dtype))


def measure_if_it_fits(device: torch.device, dtype: torch.dtype) -> Roofline | None:
    """The same; None where less than 2 GiB are free, as a figure must not end a run. A later call
    tries again.
    """
    if free_bytes(device) < 4 * _READ:
        return None
    try:
        return measure(device, dtype)
    except (MemoryError, RuntimeError) as error:
        if short_of_memory(error):
            return None
        raise


def _bytes_per_second(device: torch.device) -> float:
    big = torch.ones(_READ // 4, dtype=torch.float32, device=device)
    return big.nbytes / _seconds(big.sum, device)


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


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
