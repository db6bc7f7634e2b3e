"""The operations of `kernels.py` compiled for this CPU: `kernels.cpp`, built at first use.

It takes a C++ compiler (g++ or clang++) and a few seconds, once for each machine and source; the
library lies in the cache folder. Without a compiler the tensor functions run instead, slower and
equally right. A function here checks nothing: its callers give contiguous tensors of one type.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.engine.kernels import Kernels, Places, Product
from gearshift.models.attention import AttentionOptions
from gearshift.models.describe import Gate, Norm
from gearshift.models.load import cache_folder

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}
_SIGNATURES: dict[str, list[Any]] = {
    "add_norm": [*[c_void_p] * 5, c_int64, c_int64, c_float, c_int, c_int],
    "rotate_and_write": [*[c_void_p] * 5, *[c_int64] * 5],
    "attend": [
        c_void_p, c_int64, *[c_void_p] * 5, *[c_int64] * 5, c_float, c_int64, c_float,
    ],
    "gate": [c_void_p, c_void_p, c_int64, c_int64, c_int],
    "draw": [*[c_void_p] * 5, c_int64, c_int64],
    "pack": [c_void_p, c_void_p, c_int64, c_int64],
    "multiply": [*[c_void_p] * 4, *[c_int64] * 3],
}  # fmt: skip

log = logging.getLogger(__name__)


class NativeKernels(Kernels):
    """The same operations on tensors of one type (fp32 or bf16) in a CPU's memory."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._dtype = dtype

        def function(name: str, suffix: str = _SUFFIX[dtype]) -> Callable[..., None]:
            found: Any = getattr(library, f"{name}_{suffix}")
            found.argtypes, found.restype = _SIGNATURES[name], None
            return found

        self._add_norm, self._attend = function("add_norm"), function("attend")
        self._rotate_and_write, self._gate = function("rotate_and_write"), function("gate")
        # Where a CPU has AMX, PyTorch's own packed products use it and are faster than these.
        self._multiplies = (
            dtype == torch.bfloat16
            and hasattr(library, "multiply_bf16")
            and not torch.cpu._is_amx_tile_supported()
        )
        if self._multiplies:
            self._pack, self._multiply = function("pack"), function("multiply")
        self._draw = {d: function("draw", suffix) for d, suffix in _SUFFIX.items()}

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        own = norm.module._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None:
            return super().add_norm(x, delta, norm)
        out = torch.empty_like(x)
        self._add_norm(
            x.data_ptr(), _pointer(delta), weight.data_ptr(), _pointer(bias), out.data_ptr(),
            x.shape[0], x.shape[1], norm.eps, norm.center, norm.offset,
        )  # fmt: skip
        return x, out

    def rotate_and_write(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, store: Tensor, places: Places
    ) -> Tensor:
        T, heads, D = qkv.shape
        K = store.shape[2]
        cos, sin = rotary or (None, None)
        self._rotate_and_write(
            qkv.data_ptr(), _pointer(cos), _pointer(sin), store.data_ptr(),
            places.slots.data_ptr(), T, heads - 2 * K, K, D, 0 if cos is None else cos.shape[-1],
        )  # fmt: skip
        return qkv[:, : heads - 2 * K]

    def attend(
        self, query: Tensor, store: Tensor, places: Places, options: AttentionOptions
    ) -> Tensor:
        T, H, D = query.shape
        table = places.table
        out = torch.empty((T, H, D), dtype=query.dtype)
        self._attend(
            query.data_ptr(), query.stride(0), store.data_ptr(), table.data_ptr(),
            places.rows.data_ptr(), places.positions.data_ptr(), out.data_ptr(), T, H,
            store.shape[2], D, table.shape[1], options.scaling,
            options.window or 0, options.softcap or 0.0,
        )  # fmt: skip
        return out

    def gate(self, both: Tensor, gate: Gate) -> Tensor:
        T, F = both.shape[0], both.shape[1] // 2
        out = torch.empty((T, F), dtype=both.dtype)
        self._gate(both.data_ptr(), out.data_ptr(), T, F, gate == "gelu_tanh")
        return out

    def product(self, weight: Tensor, rows: int) -> Product | None:
        N, K = weight.shape
        if not self._multiplies or K % 2:
            return super().product(weight, rows)
        packed = torch.empty(-(-N // 16) * 16 * K, dtype=weight.dtype)
        weight = weight.contiguous()
        self._pack(weight.data_ptr(), packed.data_ptr(), N, K)

        def product(x: Tensor, bias: Tensor | None) -> Tensor:
            x = x.contiguous()
            out = torch.empty((x.shape[0], N), dtype=x.dtype)
            self._multiply(
                x.data_ptr(), packed.data_ptr(), _pointer(bias), out.data_ptr(), x.shape[0], N, K
            )
            return out

        return product

    def draw(self, logits: Tensor, temperature: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        B, V = logits.shape
        tokens = torch.empty(B, dtype=torch.int64)
        logprobs = torch.empty(B, dtype=torch.float32)
        self._draw[logits.dtype](
            logits.data_ptr(), temperature.data_ptr(), uniforms.data_ptr(), tokens.data_ptr(),
            logprobs.data_ptr(), B, V,
        )  # fmt: skip
        return tokens, logprobs


def kernels_for(weight: Tensor) -> Kernels:
    """The fastest kernels for a model with weights like this one."""
    if weight.device.type == "cpu" and weight.dtype in _SUFFIX and (library := _library()):
        return NativeKernels(library, weight.dtype)
    return Kernels()


@lru_cache(1)
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (and one warning) where they cannot be had."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or platform.system() != "Linux":
        log.warning("No C++ compiler here: the generation gear runs on tensor functions, slower.")
        return None
    # The processor is part of the name: a home folder may be shared by machines that differ.
    built_for = f"{_FLAGS}{compiler}{_processor()}".encode() + _SOURCE.read_bytes()
    path = cache_folder() / f"kernels-{hashlib.blake2b(built_for, digest_size=8).hexdigest()}.so"
    try:
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        log.warning("The kernels could not be compiled, tensor functions run instead: %s", told)
        return None


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [compiler, *_FLAGS, "-o", str(built), str(_SOURCE)],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        os.replace(built, path)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line for line in text.split("\n") if line.startswith(("flags", "Features"))), "")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
