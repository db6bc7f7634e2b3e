"""How the C library's allocator treats memory that this process has freed.

A training step frees gigabytes of activations and asks for them again in the next step. By default,
glibc gives them back to the system each time, and the system must then provide every page again: on
a CPU this was a third of a step's time.
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
    """Make glibc serve large blocks from a heap that never shrinks; returns False where the C
    library is not glibc.

    This changes the whole process, so programs (the command line) call it, and libraries do not.
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
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_MAX, 65536)
            library.mallopt(_M_TRIM_THRESHOLD, 128 << 10)
            library.mallopt(_M_TOP_PAD, 128 << 10)
            library.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Return freed memory to the system. Without glibc this only collects garbage."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def short_of_memory(error: BaseException) -> str:
    """The reason, if this error means that memory ran out; else an empty text."""
    text = " ".join(str(error).split())
    matches = any(words in text.lower() for words in _NO_MEMORY)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return text or "it was refused"
    # torch, CUDA and safetensors raise errors of different classes for this.
    other = isinstance(error, GearshiftError) and not isinstance(error, ModelError)
    return text[:200] if isinstance(error, Exception) and matches and not other else ""


_NO_MEMORY = ("out of memory", "not enough memory", "t allocate memory", "cannot allocate memory",
              "bad_alloc", "bad allocation", "alloc_failed")  # fmt: skip


class HeapGuard:
    """Returns freed memory to the system when the heap has grown by the share `growth` since the
    second call of `look`.

    Batches of ever new sizes leave holes that the next batch does not fit in, so a heap that never
    shrinks grows by a third in fifty steps. Returning memory costs a step a tenth of its time, so
    it happens every few steps only.
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
    """The host memory that this process holds, in bytes; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    [line] = [x for x in status.read_text(encoding="ascii").split("\n") if x.startswith("VmRSS")]
    return float(line.split()[1]) * 1024
