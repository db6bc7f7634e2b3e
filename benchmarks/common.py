"""What the benchmarks share: timing in turn, the machine, where results go."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def in_turn(subjects: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject, one after the other in every round, after a warm-up of each. A
    subject that returns a number has timed itself.
    """
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name, run in subjects.items():
            began = now()
            returned = run()
            wait()
            seconds = returned if isinstance(returned, float) else time.perf_counter() - began
            if round_:
                samples[name].append(seconds)
    return samples


def wait() -> None:
    """Return when the GPU, where one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds of a clock, when what came before is done."""
    wait()
    return time.perf_counter()


def reset_peak() -> None:
    """Begin to count this process's peak memory anew: the GPU's where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gib() -> float:
    """The peak since the last reset."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.split("\n") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024**2


def skewed_lengths(count: int, longest: int, rng: random.Random) -> list[int]:
    """Log-normal lengths, cut at the longest, with a mean of 0.4 of it."""
    draws = [rng.gauss(0.0, 0.8) for _ in range(count)]
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(min(longest, math.exp(middle + d)) for d in draws) / count
        low, high = (middle, high) if mean < 0.4 * longest else (low, middle)
    return [max(1, min(longest, round(math.exp(low + d)))) for d in draws]


def ratio(samples: dict[str, list[float]], ours: str, theirs: str) -> float:
    """How many times faster we are, by medians."""
    return median(samples[theirs]) / median(samples[ours])


def machine() -> dict[str, Any]:
    """What this was measured on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        features = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]
    except (OSError, StopIteration):
        features = []
    return {
        "cpu": model,
        "features": features,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of what was compared."""
    found = {}
    for package in ("gearshift", "torch", "transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write(name: str, result: dict[str, Any]) -> Path:
    """Keep a result; returns where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
