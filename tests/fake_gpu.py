"""A GPU that is not there: tensors in the host's memory that say that they are on `cuda:0`, and an
error where a GPU would refuse to compute with tensors of both places. It finds tensors that were
left on the CPU; it runs no kernel of a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _device as device_contexts
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gearshift.engine import stats
from gearshift.kernels import attention, dispatch

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = {_aten.copy_, _aten._to_copy, _aten.set_, _aten.detach, _aten.lift_fresh}
_INDEXED = {_aten.index, _aten._unsafe_index, _aten.index_put, _aten.index_put_}
_there: dict[int, tuple[StorageWeakRef, int]] = {}
"""The storages on the GPU, with their bytes. A weak reference keeps the place of a dead one from
being used again.
"""
moves: list[torch.Size] = []
"""The shapes of what was copied from one place to the other."""


def on_gpu(x: Tensor) -> bool:
    """Whether the tensor says that it is on the GPU."""
    return x.untyped_storage()._cdata in _there


def gpu_bytes() -> int:
    """The bytes of the tensors on the GPU."""
    return sum(size for storage, size in _there.values() if not storage.expired())


def _put(x: Tensor) -> Tensor:
    if not x.is_meta and not on_gpu(x):
        storage = x.untyped_storage()
        _there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
    return x


def _copied(x: Tensor, to_gpu: bool) -> Tensor:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        copy = x.detach().clone()
    moves.append(x.shape)
    return _put(copy) if to_gpu else copy


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_gpu: bool) -> Tensor:
        ctx.came_from_gpu = on_gpu(x)
        return _copied(x, to_gpu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _copied(grad, ctx.came_from_gpu), None


def _moved(x: Tensor, to_gpu: bool) -> Tensor:
    if x.is_meta or on_gpu(x) == to_gpu:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return _Move.apply(x, to_gpu)
    return _copied(x, to_gpu).requires_grad_(x.requires_grad)


class _Computes(TorchDispatchMode):
    """What is computed from tensors on the GPU is there too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_meta]
        kind, there = func.overloadpacket, any(map(on_gpu, given))
        if there and kind not in _MOVES:
            # A GPU takes a number, and an index of its own tensors, from the host.
            if kind in _INDEXED:
                given = [args[0], *args[2:3]]
            strange = [tuple(x.shape) for x in given if x.dim() and not on_gpu(x)]
            assert not strange, f"{func} gets tensors of shapes {strange} on the CPU"
        out = func(*args, **(kwargs or {}))
        if there and kind is not _aten.copy_:
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    _put(x)
        return out


class _Says(TorchFunctionMode):
    """Where tensors are made, where they are moved to, and where they say that they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in _PROPERTIES and on_gpu(args[0]):
            return _PROPERTIES[func]
        if name in ("cpu", "cuda"):
            return _moved(args[0], name == "cuda")
        assert name not in ("numpy", "__array__") or not on_gpu(args[0]), "numpy of a GPU's tensor"
        if name == "_parse_to" or func is torch.device:
            return func(*args, **kwargs)
        wanted = _wanted(func, name, args, kwargs)
        if wanted is None:
            return func(*args, **kwargs)
        assert not (wanted and kwargs.get("generator")), f"{name} with a generator of the CPU"
        args = [_on_host(x) if isinstance(x, torch.device | str) else x for x in args]
        if name == "to" and any(isinstance(x, Tensor) for x in args[1:2]):
            args[1] = args[1].dtype
        elif name != "to" or "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
            args = [x for x in args if not isinstance(x, torch.device)]
        out = func(*args, **kwargs)
        if name == "to":
            return _moved(out, wanted)
        if not isinstance(out, Tensor):
            return out
        return _put(out) if wanted else _moved(out, False)


def _wanted(func: Any, name: str, args: Any, kwargs: Any) -> bool | None:
    """Whether the result is to be on the GPU; None where the call does not name a device."""
    named = [kwargs.get("device"), *args[int(name == "to") :]]
    if name == "to" and any(isinstance(x, Tensor) for x in args[1:2]):
        return on_gpu(args[1])
    for one in named:
        if isinstance(one, str) and one.partition(":")[0] in ("cuda", "cpu"):
            return one != "cpu"
        if isinstance(one, torch.device) and one.type in ("cuda", "cpu"):
            return one.type == "cuda"
    default = device_contexts.CURRENT_DEVICE
    makes = default is not None and func in device_contexts._device_constructors()
    return True if makes and default.type == "cuda" and not kwargs.get("device") else None


def _on_host(x: Any) -> Any:
    return torch.device("cpu") if str(x).partition(":")[0] == "cuda" else x


_PROPERTIES: dict[Any, Any] = {
    Tensor.device.__get__: GPU,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.get_device: 0,
}


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Inside there is a GPU without Triton. It has the tensor functions of a GPU."""
    says = _Says()
    run_backward = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with says if not _is_on(says) else nullcontext():
            return run_backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", backward)
    for name in ("set_device", "synchronize", "set_rng_state", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: gpu_bytes())
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**31, 2**31))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    monkeypatch.setattr(attention, "_has_efficient", lambda *_: True)
    for name in ("_bytes_per_second", "_flops_per_second"):
        monkeypatch.setattr(stats, name, lambda *_: 1e12)
    shapes = {"default": lambda x: {"shape": x.shape}, "none": lambda _: None}
    monkeypatch.setattr(checkpoint, "_allowed_determinism_checks_to_fns", shapes)
    with _Computes(), says:
        yield GPU


def _is_on(mode: TorchFunctionMode) -> bool:
    stack = [
        torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
    ]
    return mode in stack
