"""The only place that chooses kernels: by a tensor's device and type, and by this machine."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gearshift.kernels import build
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.cpu import CPUKernels
from gearshift.kernels.reference import Kernels


def kernels_for(weight: Tensor) -> Kernels:
    """The fastest kernels for a model with weights like this one."""
    if build.usable(weight):
        return CPUKernels(weight.dtype)
    if weight.device.type == "cuda" and _has_triton():
        from gearshift.kernels.triton_ops import TritonKernels

        return TritonKernels()
    return tensor_functions(weight.device)


def kernels_of(model: PreTrainedModel) -> Kernels:
    """The fastest kernels for this model: compiled ones need all weights in one type."""
    parameters = [p for name, p in model.named_parameters() if ".lora_" not in name]
    uniform = len({p.dtype for p in parameters}) == 1
    return kernels_for(parameters[0]) if uniform else tensor_functions(parameters[0].device)


def tensor_functions(device: torch.device) -> Kernels:
    """The kernels that PyTorch alone computes: on a CPU in whole rows, elsewhere in chunks."""
    return Kernels() if device.type == "cpu" else ChunkedKernels()


@lru_cache(1)
def _has_triton() -> bool:
    return find_spec("triton") is not None
