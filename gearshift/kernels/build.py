"""Functions compiled for this CPU, on bare memory: `kernels.cpp`, built at first use.

It takes a C++ compiler (g++ or clang++) and some seconds, once for each machine and source; the
library lies in the cache folder, and is loaded from there if it is whole and nobody else can have
written it. Without a compiler tensor functions run instead, slower and equally right. A function
here checks nothing: its callers give contiguous tensors of one type.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}
_ARGUMENTS = {
    "add_norm": "PPPPPPqqdqq",
    "rotate_and_write": "PPPPPqqqqq",
    "attend": "PqPPPPPqqqqqdqd",
    "gate": "PPqqq",
    "draw": "PPPPPqq",
    "norm_backward": "PPPPPqqdq",
    "gate_backward": "PPPqqq",
    "rotate": "PPPqqqqqd",
    "score": "PPPPPqqd",
    "score_backward": "PPPPPPqqd",
    "packed_attend": "PPPPPPPPqqqqqqqdq",
    "packed_attend_backward": "PPPPPPPPPPPPqqqqqqqdq",
    "pack": "PPqq",
    "multiply": "PPPPqqq",
    "multiply_rows": "PPPPqqqqq",
}
"""Of each function, as `struct` spells them: pointers, integers, floats, eight bytes each."""

_DIGEST_SIZE = 32

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where things that are made once for a machine lie: `$GEARSHIFT_CACHE`, or
    `~/.cache/gearshift`.
    """
    return Path(os.environ.get("GEARSHIFT_CACHE", Path.home() / ".cache" / "gearshift"))


def usable(tensor: Tensor) -> bool:
    """Whether functions for tensors of this type and place are there."""
    return tensor.device.type == "cpu" and tensor.dtype in _SUFFIX and library() is not None


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether this CPU has the function for that type, which not all have."""
    return dtype in _SUFFIX and hasattr(library(), f"{name}_{_SUFFIX[dtype]}")


def call(name: str, dtype: torch.dtype, *arguments: float) -> None:
    """Run the function of that name for that type."""
    function, slots = prepared(name, dtype, *arguments)
    function(slots)


def prepared(name: str, dtype: torch.dtype, *arguments: float) -> tuple[Any, bytes]:
    """The function, and its arguments as it takes them."""
    return _function(name, dtype), struct.pack(_ARGUMENTS[name], *arguments)


def replay() -> Any:
    """The function that runs a table of (function, arguments)."""
    return library().replay  # type: ignore[union-attr]


def pointer(tensor: Tensor | None) -> int:
    """Where its memory begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache
def _function(name: str, dtype: torch.dtype) -> Any:
    found = getattr(library(), f"{name}_{_SUFFIX[dtype]}")
    found.argtypes, found.restype = [ctypes.c_char_p], None
    return found


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None (and one warning) where they cannot be had."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or platform.system() != "Linux":
        log.warning("No C++ compiler here: tensor functions run instead of compiled ones, slower.")
        return None
    # The processor is part of the name: a home folder may be shared by machines that differ.
    built_for = f"{_FLAGS}{compiler}{_processor()}".encode() + _SOURCE.read_bytes()
    path = cache_folder() / f"kernels-{hashlib.blake2b(built_for, digest_size=8).hexdigest()}.so"
    try:
        return _cached(compiler, path) or _for_this_process(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        log.warning("kernels.cpp could not be compiled, tensor functions run instead: %s", told)
        return None


def _cached(compiler: str, path: Path) -> ctypes.CDLL | None:
    """The library in the cache folder, built there if it is missing or damaged; None where the
    folder cannot be used.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not all(map(_only_ours, filter(Path.exists, (folder, path)))):
            log.warning(
                "Others may write to %s, so the kernels there are not loaded; they are built for "
                "this process alone. Make it your own (chown, chmod go-w), or set GEARSHIFT_CACHE.",
                folder,
            )
            return None
        if not _whole(path):
            if path.exists():
                log.warning("%s is damaged and is built anew.", path)
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "The kernels cannot be kept in %s (%s); they are built for this process alone.",
            folder,
            " ".join(str(error).split()),
        )
        return None


def _for_this_process(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.so")
        _compile(compiler, path)
        return ctypes.CDLL(str(path))  # what is mapped stays when its file goes


def _only_ours(path: Path) -> bool:
    """Whether nobody but this user and root can have written there."""
    status = path.stat()
    # A group that has the user's number is the user's own, on most systems.
    shared = stat.S_IWOTH | (0 if status.st_gid == status.st_uid else stat.S_IWGRP)
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & shared


def _whole(path: Path) -> bool:
    """Whether the library is what was built: it ends with the digest of all before. To load a
    damaged one ends the process.
    """
    if not path.is_file():
        return False
    built = path.read_bytes()
    return _digest(built[:-_DIGEST_SIZE]) == built[-_DIGEST_SIZE:]


def _digest(built: bytes) -> bytes:
    return hashlib.blake2b(built, digest_size=_DIGEST_SIZE).digest()


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [compiler, *_FLAGS, "-o", str(built), str(_SOURCE)],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        with built.open("r+b") as file:
            digest = _digest(file.read())
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        built.chmod(0o755)
        os.replace(built, path)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line for line in text.split("\n") if line.startswith(("flags", "Features"))), "")
