"""One function chooses the kernels, by what a tensor is and what this machine has."""

import pytest
import torch
from torch import nn

from gearshift.kernels import build
from gearshift.kernels.cpu import CPUKernels
from gearshift.kernels.dispatch import kernels_for, kernels_of
from gearshift.kernels.reference import Kernels
from tests.device import on_card


def model(*dtypes: torch.dtype) -> nn.Module:
    return nn.ModuleList(nn.Linear(2, 2, dtype=dtype) for dtype in dtypes)


def test_other_types_and_models_of_several_types_run_as_tensor_functions() -> None:
    assert type(kernels_for(torch.zeros(1, dtype=torch.float64))) is Kernels
    assert type(kernels_of(model(torch.float32, torch.bfloat16))) is Kernels  # type: ignore[arg-type]


@on_card
def test_a_card_runs_its_own_kernels(device: torch.device) -> None:
    assert type(kernels_for(torch.zeros(1, device=device))).__name__ == "TritonKernels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_run_where_they_can(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.library() is not None:
        assert type(kernels_for(torch.zeros(1, dtype=dtype))) is CPUKernels
        assert type(kernels_of(model(dtype, dtype))) is CPUKernels  # type: ignore[arg-type]
    monkeypatch.setattr(build, "library", lambda: None)
    assert type(kernels_for(torch.zeros(1, dtype=dtype))) is Kernels
