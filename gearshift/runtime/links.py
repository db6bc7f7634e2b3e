"""What a run on several ranks needs of its machines: versions, clocks, memory, disks and the links
between ranks; measured before a run, by `gearshift doctor --links`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch

from gearshift.runtime.distributed import World
from gearshift.runtime.free_memory import free_bytes

SMALL, LARGE = 8, 16 * 2**20
"""Bytes that are sent to measure the time of a message, and the speed of a link."""
SLOWER = 5.0
"""A link that is so many times slower than the median of its kind is bad."""
CLOCK = 1.0
"""So many seconds between two clocks are bad."""
LEAST = 2**30
"""Free bytes of memory and of disks below which a rank is bad."""
_EACH_PAIR = 16
"""Up to so many ranks, each pair is measured; with more, each rank with two others."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank has."""

    host: str
    versions: dict[str, str]
    threads: int
    free: dict[str, float]
    """Bytes that are free: `memory`, and the folders of this process."""

    @staticmethod
    def mine(version: str) -> Machine:
        """This rank's; `version` is gearshift's."""
        names = ("torch", "transformers")
        versions = {name: importlib.metadata.version(name) for name in names}
        disks = {
            name: shutil.disk_usage(name).free for name in (tempfile.gettempdir(), os.getcwd())
        }
        return Machine(
            socket.gethostname(),
            {"python": platform.python_version(), "gearshift": version, **versions},
            len(os.sched_getaffinity(0)),
            {"memory": free_bytes(torch.device("cpu")), **disks},
        )


@dataclass(frozen=True, slots=True)
class Link:
    """Two ranks, and how fast they send to each other."""

    ranks: tuple[int, int]
    kind: str
    """Which links it is compared with: those in one machine, or between two; by which device."""
    bytes_a_second: float
    seconds: float
    """How long a message of a few bytes takes."""

    def __str__(self) -> str:
        return (
            f"rank {self.ranks[0]} - rank {self.ranks[1]} ({self.kind}): "
            f"{self.bytes_a_second / 2**20:,.0f} MiB/s, {self.seconds * 1e6:,.0f} microseconds"
        )


def preflight(world: World, version: str) -> tuple[list[str], str]:
    """What was found, a line each; and all that is bad, in one line, or "" if nothing is."""
    machines = world.gather(Machine.mine(version), "the machines")
    world.gather(None, "the clocks")
    times = world.gather(time.time(), "the times")
    offsets = [each - times[0] for each in times]
    links = [*_links(world, machines, "cpu")]
    if torch.cuda.is_available():
        links += _links(world, machines, "cuda")
    lines = [_line(i, *each) for i, each in enumerate(zip(machines, offsets, strict=True))]
    faults = [*_versions(machines), *_clocks(offsets), *_space(machines), *_slow(links)]
    return [*lines, *map(str, links)], "; ".join(faults)


def _line(rank: int, machine: Machine, offset: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    free = ", ".join(f"{size / 2**30:.1f} GiB of {name}" for name, size in machine.free.items())
    return (
        f"rank {rank} on {machine.host}: {versions}; {machine.threads} threads; "
        f"free: {free}; clock {offset:+.2f} s"
    )


def _links(world: World, machines: Sequence[Machine], device: str) -> list[Link]:
    size = world.size
    pairs = set(combinations(range(size), 2))
    if size > _EACH_PAIR:
        pairs = {(i, (i + step) % size) for i in range(size) for step in (1, size // 2)}
    small, large = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (SMALL, LARGE))
    links = []
    for first, second in sorted(pairs):
        took = []
        for tensor in (small, large):
            rounds = [world.round_trip(first, second, tensor) for _ in range(4)]
            took.append(min(rounds[1:]) / 2)  # the first one connects
        mine = world.gather(took, "the speed of a link")[first]
        together = machines[first].host == machines[second].host
        kind = f"{'one machine' if together else 'two machines'}, {device}"
        links.append(Link((first, second), kind, LARGE / mine[1], mine[0]))
    return links


def _versions(machines: Sequence[Machine]) -> list[str]:
    faults = []
    for name in machines[0].versions:
        found = [machine.versions[name] for machine in machines]
        usual = Counter(found).most_common(1)[0][0]
        faults += [
            f"rank {rank} on {machines[rank].host} has {name} {other}, and others have {usual}"
            for rank, other in enumerate(found)
            if other != usual
        ]
    return faults


def _clocks(offsets: Sequence[float]) -> list[str]:
    usual = median(offsets)
    return [
        f"the clock of rank {rank} is off by {offset - usual:+.1f} s"
        for rank, offset in enumerate(offsets)
        if abs(offset - usual) > CLOCK
    ]


def _space(machines: Sequence[Machine]) -> list[str]:
    return [
        f"rank {rank} on {machine.host} has {size / 2**30:.1f} GiB of {name} free"
        for rank, machine in enumerate(machines)
        for name, size in machine.free.items()
        if size < LEAST
    ]


def _slow(links: Sequence[Link]) -> list[str]:
    faults = []
    for link in links:
        alike = [other for other in links if other.kind == link.kind]
        speed = median(other.bytes_a_second for other in alike)
        message = median(other.seconds for other in alike)
        if link.bytes_a_second * SLOWER < speed or link.seconds > SLOWER * message:
            faults.append(
                f"{link} is slow: the median is {speed / 2**20:,.0f} MiB/s, "
                f"{message * 1e6:,.0f} microseconds"
            )
    return faults
