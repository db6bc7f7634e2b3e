"""The C library's allocator, told to keep what it has freed.

A training step frees gigabytes of activations and asks for them again in the next one. By default
glibc gives them back to the system each time, and every page is faulted in anew: on a CPU that
was a third of the step.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearshift.errors import GearshiftError, ModelError

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Have glibc serve large blocks from a heap that never shrinks; False where it is not glibc.

    For the whole process, so it is for programs (the command line), not for libraries, to call.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, 2**26)
    )


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory is kept as `keep_freed_memory` says; after it glibc's own limits hold
    again.
    """
    kept = keep_freed_memory()
    try:
        yield
    finally:
        if kept:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_MAX, 65536)
            mallopt(_M_TRIM_THRESHOLD, 128 << 10)
            mallopt(_M_TOP_PAD, 128 << 10)
            give_back_freed_memory()


def give_back_freed_memory() -> None:
    """What has been freed goes back to the system; without glibc it only collects garbage."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def short_of_memory(error: BaseException) -> str:
    """The reason in words, if an error says that there was no memory left; else nothing."""
    text = " ".join(str(error).split())
    said = any(words in text.lower() for words in _NO_MEMORY)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return text or "it was refused"
    # Of torch, CUDA and safetensors; their classes are not one.
    other = isinstance(error, GearshiftError) and not isinstance(error, ModelError)
    return text[:200] if isinstance(error, Exception) and said and not other else ""


_NO_MEMORY = ("out of memory", "not enough memory", "t allocate memory", "cannot allocate memory",
              "bad_alloc", "bad allocation")  # fmt: skip


class HeapGuard:
    """Gives freed memory back where the heap has grown by `growth` since the second look.

    Batches of ever new sizes leave holes that the next one does not fit in, and a heap that never
    shrinks grows by a third in fifty steps. Giving back costs a step a tenth of its time; so it is
    done every few steps, not at each.
    """

    def __init__(self, growth: float = 0.15) -> None:
        self._growth, self._looks, self._limit = growth, 0, float("inf")

    def look(self) -> None:
        """Call once a step."""
        held, self._looks = resident_bytes(), self._looks + 1
        if self._looks == 2:
            self._limit = (1 + self._growth) * held
        elif held > self._limit:
            give_back_freed_memory()


def resident_bytes() -> float:
    """What this process holds of the host's memory; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    [line] = [x for x in status.read_text(encoding="ascii").split("\n") if x.startswith("VmRSS")]
    return float(line.split()[1]) * 1024
