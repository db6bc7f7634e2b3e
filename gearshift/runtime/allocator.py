"""The C library's allocator, told to keep what it has freed.

A training step frees gigabytes of activations and asks for them again in the next one. By default
glibc gives them back to the system each time, and every page is faulted in anew: on a CPU that
was a third of the step.
"""

from __future__ import annotations

import ctypes
import gc
import platform

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


def give_back_freed_memory() -> None:
    """Between two stages: what the one has freed goes back to the system, so that the other's peak
    does not stand on its holes. Without glibc it only collects garbage.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
