"""Compiles the C++ kernels of `cpp/` for this CPU at first use, loads them, and calls them.

The build takes a C++ compiler (g++ or clang++) and some seconds, once for each machine and source.
The library lies in the cache folder, and is loaded from there if it is whole and only this user can
have written it. Without a compiler tensor functions run instead, slower and equally right. A kernel
gets bare addresses and checks nothing: its callers give contiguous tensors of one type.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.errors import KernelError
from gearshift.kernels.specs import BLOCK, VOCABULARY_BLOCK
from gearshift.runtime.files import cache_folder

_SOURCES = Path(__file__).with_name("cpp")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fopenmp", "-fPIC", f"-DBLOCK_SIZE={BLOCK}",
    f"-DVOCABULARY_BLOCK={VOCABULARY_BLOCK}",
)  # fmt: skip
_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}
_ARGUMENTS = {
    "add_norm": "PPPPPPqqdqq",
    "add_norm_backward": "PPPPPqqdq",
    "apply_rotary": "PPPqqqqqd",
    "apply_rotary_and_write": "PPPPPqqqqq",
    "act_and_mul": "PPqqq",
    "act_and_mul_backward": "PPPqqq",
    "attend": "PqPPPPPqqqqqdqd",
    "packed_attend": "PPPPPPPPqqqqqqqdq",
    "packed_attend_backward": "PPPPPPPPPPPPqqqqqqqdq",
    "linear": "PPPPqqqqq",
    "prepack": "PPqq",
    "prepacked_linear": "PPPPqqq",
    "token_logprobs": "PPPPPqqd",
    "token_logprobs_backward": "PPPPPPqqd",
    "sample": "PPPPPqq",
}
"""The arguments of each kernel, as `struct` names them: pointers (P), integers (q) and floats (d),
eight bytes each. The library names its own, and `_load` compares them."""

_DIGEST_SIZE = 32

log = logging.getLogger(__name__)


def usable(tensor: Tensor) -> bool:
    """Whether there are compiled kernels for tensors of this type and device."""
    return tensor.device.type == "cpu" and tensor.dtype in _SUFFIX and library() is not None


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether this CPU has the kernel for that type. Some kernels need instructions that not every
    CPU has.
    """
    return dtype in _SUFFIX and hasattr(library(), f"{name}_{_SUFFIX[dtype]}")


def call(name: str, dtype: torch.dtype, *arguments: float) -> None:
    """Run the kernel of that name for that type."""
    if _running:
        function, slots = prepared(name, dtype, *arguments)
        function(slots)


_running = True


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Inside, `call` does nothing, for those who count memory and need no numbers."""
    global _running
    before, _running = _running, False
    try:
        yield
    finally:
        _running = before


def prepared(name: str, dtype: torch.dtype, *arguments: float) -> tuple[Any, bytes]:
    """The kernel, and its arguments in the form that it takes."""
    return _function(name, dtype), struct.pack(_ARGUMENTS[name], *arguments)


def replay() -> Any:
    """The function that runs a table of (kernel, arguments)."""
    return library().replay  # type: ignore[union-attr]


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache
def _function(name: str, dtype: torch.dtype) -> Any:
    found = getattr(library(), f"{name}_{_SUFFIX[dtype]}")
    found.argtypes, found.restype = [ctypes.c_char_p], None
    return found


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (and one warning) where they cannot be had. Raises
    `KernelError` if they take other arguments than this module gives them.
    """
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or platform.system() != "Linux":
        log.warning("No C++ compiler here: tensor functions run instead of compiled ones, slower.")
        return None
    # The processor is part of the name: a home folder may be shared by machines that differ.
    built_for = f"{_FLAGS}{compiler}{_processor()}".encode()
    for source in sorted(_SOURCES.iterdir()):
        built_for += source.name.encode() + source.read_bytes()
    path = cache_folder() / f"kernels-{hashlib.blake2b(built_for, digest_size=8).hexdigest()}.so"
    try:
        return _cached(compiler, path) or _for_this_process(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning(
            "The C++ kernels could not be compiled, so tensor functions run instead: %s", reason
        )
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
        return _load(path)
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
        return _load(path)  # what is mapped stays when its file goes


def _load(path: Path) -> ctypes.CDLL:
    """The library, once its kernels take what `_ARGUMENTS` says; with other arguments they would
    read and write anywhere.
    """
    loaded = ctypes.CDLL(str(path))
    loaded.signatures.restype = ctypes.c_char_p
    for line in loaded.signatures().decode().splitlines():
        function, arguments = line.split(" ")
        given = _ARGUMENTS.get(function.rpartition("_")[0])
        if given != arguments:
            raise KernelError(
                f"The compiled kernel {function} takes the arguments {arguments}, but build.py "
                f"gives {given}: {_SOURCES} and build.py are of different versions, so install "
                "Gearshift again."
            )
    return loaded


def _only_ours(path: Path) -> bool:
    """Whether only this user and root can have written there."""
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
    """One library of all sources. They are compiled at the same time, for this takes long."""

    def run(*arguments: str) -> None:
        subprocess.run(
            [compiler, *_FLAGS, *arguments], check=True, capture_output=True, text=True, timeout=300
        )

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = {str(s): str(Path(folder, s.stem + ".o")) for s in _SOURCES.glob("*.cpp")}
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(lambda of: run("-c", of, "-o", objects[of]), objects))
        built = Path(folder) / path.name
        run("-shared", *sorted(objects.values()), "-o", str(built))
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
