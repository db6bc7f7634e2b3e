"""The GPU's kernels, in Triton's interpreter, are the tensor functions."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gearshift.engine import Engine, EngineConfig
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK, AttentionMetadata, AttentionOptions
from gearshift.kernels.triton_ops import TritonKernels
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import FAMILIES, PROMPTS, random_model


def rows(
    lengths: list[int], shared: int, K: int, D: int, dtype: torch.dtype
) -> tuple[torch.Tensor, AttentionMetadata]:
    """A store, and rows of these lengths that begin with `shared` common blocks."""
    width = max(lengths) // BLOCK + 2
    table = torch.zeros((len(lengths), width), dtype=torch.int64)
    order = iter((1 + torch.randperm(len(lengths) * width + shared)).tolist())
    common = [next(order) for _ in range(shared)]
    for row, length in zip(table, lengths, strict=True):
        for w in range(-(-length // BLOCK)):
            row[w] = common[w] if w < shared else next(order)
    store = torch.randn(len(lengths) * width + shared + 1, 2, K, BLOCK * D).to(dtype)
    positions = torch.tensor(lengths) - 1
    return store, AttentionMetadata(torch.arange(len(lengths)), positions, table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("H", "K", "D"), [(9, 3, 64), (4, 4, 24), (8, 1, 80)])
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("more", [{}, {"window": 20}, {"softcap": 2.0}])
@torch.no_grad()
def test_decode_attention(
    H: int, K: int, D: int, shared: int, more: dict[str, float], dtype: torch.dtype
) -> None:
    torch.manual_seed(H + shared)
    lengths = [49, 50, 97, 64, 120, 51, 80, 128, 49, 48, 77] if shared else [1, 16, 17, 100]
    store, places = rows(lengths, shared, K, D, dtype)
    query = torch.randn(len(lengths), H + 2 * K, D).to(dtype)[:, :H]
    options = AttentionOptions(scaling=D**-0.5, **more)
    ours = TritonKernels().attend(query, store, places, options).float()
    theirs = Kernels().attend(query, store, places, options).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def test_common_blocks_are_those_that_all_rows_of_a_tile_see_whole() -> None:
    table = torch.tensor([[1, 2, 3, 4, 5]] * 8 + [[1, 2, 9, 4, 0], [1, 2, 8, 4, 0]])
    positions = torch.tensor([70] * 7 + [47] + [70, 70])
    places = AttentionMetadata(torch.arange(10), positions, table)
    assert places.common.tolist() == [3, 2]
    positions[7] = 46
    places.refresh()
    assert places.common.tolist() == [2, 2]


class NoSync(TorchDispatchMode):
    """Refuses what makes a host wait for its device, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "bincount"))
        assert "masked_select" not in name and "unique" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_waits_for_nothing(family: str) -> None:
    """What a GPU would capture runs on fixed memory, without a sync, and samples the same."""

    def record(prepare: Any, run: Any) -> Any:
        def again() -> torch.Tensor:
            with NoSync():
                prepare()
                return run()

        again()
        return again

    written = []
    for kernels in (TritonKernels(), Kernels()):
        config = EngineConfig(decode_steps_per_sync=4 if isinstance(kernels, TritonKernels) else 1)
        engine = Engine(random_model(family), tiny_tokenizer(), config, seed=3)
        engine.runner.kernels = kernels
        if isinstance(kernels, TritonKernels):
            kernels.capture = record  # type: ignore[method-assign]
        with engine.generating():
            groups = engine.generate(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=6))
        written.append([[c.token_ids for c in group] for group in groups])
    assert written[0] == written[1]
