"""The GPU's kernels, in Triton's interpreter or on a GPU, are the tensor functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import KernelError
from gearshift.kernels import triton_ops
from gearshift.kernels.cuda_graphs import HostWaits
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK, TILE, AttentionMetadata, AttentionOptions
from gearshift.kernels.triton_ops import TritonKernels, tile_size
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import ON_CPU, device
from tests.zoo import FAMILIES, PROMPTS, random_model

HALF = torch.float16 if ON_CPU else torch.bfloat16
"""The interpreter has no bf16."""


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
    places = torch.arange(len(lengths)), positions, table
    return store.to(device()), AttentionMetadata(*(x.to(device()) for x in places))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
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
    query = torch.randn(len(lengths), H + 2 * K, D).to(device(), dtype)[:, :H]
    options = AttentionOptions(scaling=D**-0.5, **more)
    ours = TritonKernels().attend(query, store, places, options).float()
    theirs = Kernels().attend(query, store, places, options).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def test_the_largest_heads_fit_into_the_shared_memory_of_every_gpu() -> None:
    """Sizes for which Triton was seen to take at most 99 KB: with more, a launch is an error."""
    assert tile_size(TILE * 4, 128, 4) == (32, 4)
    assert tile_size(TILE * 16, 128, 4) == (32, 4) and tile_size(TILE * 16, 128, 2) == (128, 4)
    assert tile_size(TILE * 8, 256, 4) == (16, 2) and tile_size(TILE * 8, 256, 2) == (64, 4)
    assert tile_size(16, 256, 4, whole=True) == (16, 2)
    assert tile_size(24, 512, 4, whole=True) == (32, 1)


@torch.no_grad()
def test_a_tile_in_several_programs_is_the_tensor_function() -> None:
    store, places = rows([49, 50, 97, 64, 120, 51, 80, 128, 49], 3, 1, 130, torch.float32)
    query, options = torch.randn(9, 12, 130).to(device()), AttentionOptions(0.1)
    assert tile_size(TILE * 12, 256, 4) == (16, 2)
    ours = TritonKernels().attend(query, store, places, options)
    theirs = Kernels().attend(query, store, places, options)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_common_blocks_are_those_that_all_rows_of_a_tile_see_whole() -> None:
    table = torch.tensor([[1, 2, 3, 4, 5]] * 8 + [[1, 2, 9, 4, 0], [1, 2, 8, 4, 0]])
    positions = torch.tensor([70] * 7 + [47] + [70, 70])
    places = AttentionMetadata(torch.arange(10), positions, table)
    assert places.common.tolist() == [3, 2]
    positions[7] = 46
    places.refresh()
    assert places.common.tolist() == [2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_waits_for_nothing(family: str) -> None:
    """What a GPU would capture runs on fixed memory, without a sync, and samples the same."""

    def record(prepare: Any, run: Any) -> Any:
        def again() -> torch.Tensor:
            with HostWaits() as waits:
                prepare()
                out = run()
            assert waits.found is None
            return out

        again()
        return again

    written = []
    for kernels in (TritonKernels(), Kernels()):
        config = EngineConfig(
            max_num_seqs=4, decode_steps_per_sync=2 if isinstance(kernels, TritonKernels) else 1
        )
        engine = Engine(random_model(family), tiny_tokenizer(), config, seed=3)
        engine.runner.kernels = kernels
        if isinstance(kernels, TritonKernels):
            kernels.capture = record  # type: ignore[method-assign]
        with engine.generating():
            groups = engine.generate(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=5))
        written.append([[c.token_ids for c in group] for group in groups])
    assert written[0] == written[1]


class Broken:
    """A kernel that Triton cannot compile."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getitem__(self, grid: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "raised", "way_out"),
    [
        (RuntimeError("Failed to find C compiler."), KernelError, "install gcc"),
        (OutOfResources(120_000, 101_376, "shared memory"), KernelError, "model.dtype=bfloat16"),
        (RuntimeError("another"), RuntimeError, "another"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_says_what_is_missing(
    error: Exception, raised: type[Exception], way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_ops, "_own_part", Broken(error))
    store, places = rows([5], 0, 2, 16, torch.float32)
    with pytest.raises(raised, match=way_out):
        query = torch.zeros(1, 4, 16, device=device())
        TritonKernels().attend(query, store, places, AttentionOptions(0.25))


def test_kernels_are_launched_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device, which may be another one."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    store, places = rows([5], 0, 2, 16, torch.float32)
    query, launched = torch.zeros(1, 4, 16, device=device()), []

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: launched.append(current == [query])

    for name in ("_shared_part", "_own_part"):
        monkeypatch.setattr(triton_ops, name, Launched())
    TritonKernels().attend(query, store, places, AttentionOptions(0.25))
    assert launched == [True, True]


def test_a_window_reads_no_shared_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "_shared_part", Broken(AssertionError()))
    store, places = rows([40] * 8, 2, 1, 16, torch.float32)
    query, options = torch.randn(8, 2, 16).to(device()), AttentionOptions(0.25, window=20)
    ours = TritonKernels().attend(query, store, places, options)
    assert torch.allclose(ours, Kernels().attend(query, store, places, options), atol=1e-5)
