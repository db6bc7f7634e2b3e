"""Step 2: the kernels of decode steps against tensor functions in fp64, and how fast they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.probe import Probe
from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK, AttentionMetadata, AttentionOptions

HEADS = [(9, 3, 64), (32, 8, 128), (32, 8, 64), (8, 4, 256), (14, 2, 64), (16, 1, 128), (4, 4, 24)]
"""Query heads, key heads and head size, of models that people use."""
TINY = [(3, 1, 24)]
FORMS: dict[str, dict[str, Any]] = {"": {}, " window": {"window": 32}, " softcap": {"softcap": 2.0}}


def attention(probe: Probe) -> None:
    """Every form of decode attention, with and without blocks that rows share."""
    kernels = triton_kernels(probe)
    if kernels is None:
        return
    # Triton's interpreter has no bf16.
    narrow = probe.size(torch.bfloat16, torch.float16)
    for dtype, most in ((torch.float32, 1e-5), (narrow, 1e-2)):
        for Q, K, D in probe.size(HEADS, TINY):
            if probe.left < 3:
                probe.omits(f"attention Q={Q} K={K} D={D}", "no time is left")
                continue
            with probe.case(f"attention Q={Q} K={K} D={D}"):
                found = {}
                for form, more in FORMS.items():
                    options = AttentionOptions(D**-0.5, **more)
                    for shared in (0, 3) if probe.cuda or not form else (3,):
                        heads, case = (Q, K, D), f"shared {shared}{form}"
                        found[case] = difference(probe, kernels, heads, shared, dtype, options)
                worst = max(found, key=lambda case: (isnan(found[case]), found[case]))
                name = f"Q={Q} K={K} D={D} {str(dtype).removeprefix('torch.')}: {worst}"
                probe.at_most(name, found[worst], most, "relative")


def difference(
    probe: Probe, kernels: Kernels, heads: tuple[int, int, int], shared: int, dtype: torch.dtype,
    options: AttentionOptions,
) -> float:  # fmt: skip
    """The largest difference from fp64, over the largest value."""
    lengths = probe.size([1, 16, 17, 4096], [1, 20])
    if shared:
        lengths = [shared * BLOCK + n for n in [*lengths, *range(2, 9)]]
    query, store, metadata = rows(probe, lengths, shared, heads, dtype)
    with poisoned():
        ours = kernels.attend(query, store, metadata, options).double()
    theirs = Kernels().attend(query.double(), store.double(), metadata, options)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def other_operations(probe: Probe) -> None:
    """Rotation with the write of keys and values, and sampling."""
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        case = f"rotation and write {str(dtype).removeprefix('torch.')}"
        with probe.case(case):
            kernels = kernels_for(probe.randn(1, dtype=dtype))
            probe.at_most(case, written(probe, kernels, dtype), most, "relative")
    with probe.case("sampling"):
        sampled(probe, kernels_for(probe.randn(1, dtype=torch.bfloat16)))


def written(probe: Probe, kernels: Kernels, dtype: torch.dtype) -> float:
    """The largest difference from fp64 of queries, keys and values after rotation."""
    Q, K, D, T = 9, 3, 64, 5
    _, store, metadata = rows(probe, [1, 16, 17, 33, 40], 0, (Q, K, D), dtype)
    qkv = probe.randn(T, Q + 2 * K, D, dtype=dtype)
    angles = probe.randn(T, D)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    own, exact = store.clone(), store.double()
    ours = kernels.apply_rotary_and_write(qkv.clone(), rotary, own, metadata)
    cos, sin = rotary
    theirs = Kernels().apply_rotary_and_write(
        qkv.double(), (cos.double(), sin.double()), exact, metadata
    )
    gaps = [(ours - theirs).abs().max(), (own - exact).abs().max()]
    return float(max(gaps) / theirs.abs().max())


def sampled(probe: Probe, kernels: Kernels) -> None:
    """The most likely token at temperature 0, ties, tokens that cannot be sampled."""
    B, V = 8, probe.size(128_256, 1000)
    logits = 3 * probe.randn(B, V, dtype=torch.bfloat16)
    logits[:, : V // 2] = float("-inf")
    logits[1, V // 2 + 5 : V // 2 + 9] = logits[1].max() + 1  # equal
    temperature = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 2.0, 1.0], device=probe.device)
    uniforms = torch.tensor(
        [0.5, 0.5, 1e-12, 1 - 1e-12, 0.5, 0.3, 0.9, 0.1], dtype=torch.float64, device=probe.device
    )
    tokens = torch.zeros(B, dtype=torch.int64, device=probe.device)
    logprobs = torch.zeros(B, device=probe.device)
    with poisoned():
        kernels.sample(logits, temperature, uniforms, tokens, logprobs)
    scaled = logits.double() / torch.where(temperature == 0, 1.0, temperature.double())[:, None]
    exact = scaled.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    greedy = logits[:2].gather(1, tokens[:2, None]) == logits[:2].amax(1, keepdim=True)
    probe.holds("sampling: temperature 0 takes the most likely", bool(greedy.all()))
    probe.holds("sampling: no token of weight 0", bool((tokens >= V // 2).all()))
    probe.at_most("sampling: log-probs", float((logprobs - exact).abs().max()), 1e-4, "nat")


def bandwidth(probe: Probe) -> None:
    """Bytes of keys and values that decode attention reads a second; no two rows share a block."""
    kernels = triton_kernels(probe)
    if kernels is None:
        return
    for heads in probe.size([(32, 8, 128), (9, 3, 64)], [(3, 1, 16)]):
        for positions in probe.size([512, 4096], [20]):
            batches = probe.size([1, 64, 256], [2])
            found = {f"B={B}": reads(probe, kernels, heads, B, positions) for B in batches}
            name = f"reads at Q={heads[0]} K={heads[1]} D={heads[2]}, {positions} positions"
            probe.shows(name, found, "GB/s")


def reads(
    probe: Probe, kernels: Kernels, heads: tuple[int, int, int], B: int, positions: int
) -> float:
    """Gigabytes of keys and values that are read a second."""
    dtype = probe.size(torch.bfloat16, torch.float16)
    query, store, metadata = rows(probe, [positions] * B, 0, heads, dtype)
    options = AttentionOptions(heads[2] ** -0.5)

    def run() -> None:
        kernels.attend(query, store, metadata, options)

    seconds = probe.seconds(run, *probe.size((20, 3), (1, 0)))
    return 2 * B * positions * heads[1] * heads[2] * dtype.itemsize / seconds / 1e9


def triton_kernels(probe: Probe) -> Kernels | None:
    """The kernels of a card; on a CPU they run in Triton's interpreter."""
    try:
        from gearshift.kernels.triton_ops import TritonKernels
    except ModuleNotFoundError as error:
        if probe.cuda:
            raise
        probe.omits("decode attention", f"the package {error.name} is not installed")
        return None
    return TritonKernels()


def rows(
    probe: Probe, lengths: list[int], shared: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """Queries [B, Q, D], a layer's store, and rows of these lengths, whose first `shared` blocks
    are the same. The order of all other blocks is random.
    """
    Q, K, D = heads
    B, width = len(lengths), max(lengths) // BLOCK + 2
    order = 1 + torch.randperm(B * width + shared)
    table = order[shared:].view(B, width).clone()
    table[:, :shared] = order[:shared]
    used = torch.arange(width) < -(-torch.tensor(lengths)[:, None] // BLOCK)
    table = torch.where(used, table, 0).to(probe.device)
    store = probe.randn(B * width + shared + 1, 2, K, BLOCK * D, dtype=dtype)
    query = probe.randn(B, Q + 2 * K, D, dtype=dtype)[:, :Q]
    positions = torch.tensor(lengths, device=probe.device) - 1
    return query, store, AttentionMetadata(
        torch.arange(B, device=probe.device), positions, table
    )  # fmt: skip


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory is NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


PARTS = (Part(attention, 27), Part(other_operations, 5), Part(bandwidth, 13))
