"""How much memory this process can still take, of the machine or of a device."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

from gearshift.runtime.distributed import world


def free_bytes(device: torch.device) -> float:
    """Bytes that are free: of the device, with those that this process's allocator keeps of tensors
    that are gone; or of the machine, of the control groups that this process is in (containers,
    batch jobs), and of its own limits, whichever is least. Ranks on one host share its memory.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    shared = min(_of_machine(), of_control_groups(Path("/proc/self/cgroup")))
    return min(shared / world().local, _of_limits())


def total_bytes(device: torch.device) -> float:
    """Bytes that a device has, free or not. A CPU's count as those that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return free_bytes(device)


def _of_machine() -> float:
    return _kilobytes(Path("/proc/meminfo")).get("MemAvailable", math.inf)


def of_control_groups(listed: Path, root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the least of the process's control groups leaves, each of which is within those
    above it: its limit, less what it holds that cannot be given back. `listed` names them.
    """
    least = math.inf
    with suppress(OSError, ValueError):
        for line in listed.read_text(encoding="utf-8").splitlines():
            number, kinds, path = line.split(":", 2)
            if number == "0":  # the second version
                top, limit, usage, cache = root, "max", "current", "inactive_file"
            elif "memory" in kinds.split(","):
                top, limit, usage = root / "memory", "limit_in_bytes", "usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            here = top / path.strip("/")
            # A container sees its own group as the top one, under whatever path it has outside.
            for group in (here, *here.parents, top):
                if group.is_relative_to(top):
                    least = min(least, _left(group, limit, usage, cache))
    return least


def _left(group: Path, limit: str, usage: str, cache: str) -> float:
    try:
        most = (group / f"memory.{limit}").read_text(encoding="ascii").strip()
        used = int((group / f"memory.{usage}").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return math.inf
    held = dict(zip(stat[::2], stat[1::2], strict=False))
    return math.inf if most == "max" else max(0.0, float(most) - used + int(held.get(cache, 0)))


def _of_limits() -> float:
    """What `ulimit -v` and `ulimit -d` leave."""
    try:
        import resource
    except ImportError:
        return math.inf
    used, least = _kilobytes(Path("/proc/self/status")), math.inf
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            least = min(least, max(0.0, soft - used.get(name, 0.0)))
    return least


def _kilobytes(path: Path) -> dict[str, float]:
    """Bytes by name, of a file of the kernel with lines `Name: 12 kB`; {} if there is none."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {x[0].rstrip(":"): float(x[1]) * 1024 for x in lines if len(x) == 3 and x[2] == "kB"}
