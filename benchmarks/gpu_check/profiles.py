"""Where a device's time goes: kernels by class, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.probe import Probe

CLASSES = {
    "attention": ("_own_part", "_shared_part", "fmha", "flash", "attention", "cudnn_generated"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "gemv", "::mm", "addmm", "linear"),
    "sampling": ("softmax", "scan", "searchsorted", "arg", "cumsum", "logsumexp"),
    "norms": ("norm", "rsqrt", "mean"),
    "copies": ("memcpy", "memset", "copy", "cat", "index", "gather", "scatter"),
}
"""Parts of the names of kernels, looked for in this order; on a CPU of torch's operations."""


@dataclass
class Profile:
    """What one call of a function did on the device."""

    milliseconds: float
    kernels: int
    classes: dict[str, float]
    """Milliseconds by class."""


def profiled(probe: Probe, run: Callable[[], object]) -> Profile:
    """Run it once. On a CPU operations take the place of kernels."""
    kind = ProfilerActivity.CUDA if probe.cuda else ProfilerActivity.CPU
    probe.sync()
    with profile(activities=[kind]) as watched:
        run()
        probe.sync()
    classes, kernels = dict.fromkeys((*CLASSES, "others"), 0.0), 0
    for event in watched.key_averages():
        if probe.cuda and event.device_type != DeviceType.CUDA:
            continue  # a call of the host
        micro = event.self_device_time_total if probe.cuda else event.self_cpu_time_total
        name = event.key.lower()
        found = (kind for kind, words in CLASSES.items() if any(word in name for word in words))
        classes[next(found, "others")] += micro / 1e3
        kernels += event.count
    return Profile(sum(classes.values()), kernels, {k: x for k, x in classes.items() if x})
