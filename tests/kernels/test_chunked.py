"""A GPU's attention: it is exact attention, it stays within its bounds, and waits for nothing."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.backends.cuda import cudnn_sdp_enabled
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.batch import PackedBatch, pack, pack_groups
from gearshift.engine import Engine, EngineConfig
from gearshift.kernels import attention, rows
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.dispatch import kernels_for, tensor_functions
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK, AttentionMetadata, AttentionOptions
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import device
from tests.oracles import attention as oracle
from tests.zoo import FAMILIES, PROMPTS, pack_completions, random_model, sampled_logprobs

DEVICE = device()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
HEADS = [(1, 1, 8), (4, 2, 16), (3, 3, 24), (6, 2, 20), (8, 1, 8), (2, 1, 136)]


@contextmanager
def bounds(scores: int, keys: int, masks: int) -> Iterator[None]:
    """Inside, a few tokens are as many chunks as a long prompt is."""
    names = {"CHUNK_SCORES": scores, "KEPT_MASKS": masks}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setattr(rows, name, value)
        patch.setattr(attention, "MOST_KEYS", keys)
        patch.setattr("gearshift.kernels.specs.MOST_KEYS", keys)
        yield


@st.composite
def batches(draw: st.DrawFn) -> PackedBatch:
    """Trees of sequences, whose positions go on from their parents'."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    parents, positions, root = [], [], 0
    for i, length in enumerate(lengths):
        if i == 0 or draw(st.booleans()):
            root = i
            parents.append(-1)
        else:
            parents.append(draw(st.integers(root, i - 1)))
        start = 0 if parents[-1] < 0 else positions[parents[-1]][-1] + 1
        positions.append([*range(start, start + length)])
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    flat = torch.tensor([p for row in positions for p in row])
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch(ids, flat, cu, torch.tensor(parents), ids.bool())


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(), heads=st.sampled_from(HEADS), dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, 1, 5]), softcap=st.sampled_from([None, 2.0]),
    stores=st.booleans(), scores=st.sampled_from([1, 40, 300, 2**26]),
    keys=st.sampled_from([1, 50, 2**16]), masks=st.sampled_from([0, 2**20]),
    chunked=st.sampled_from([True, True, False]),
)  # fmt: skip
def test_packed_attention_is_exact_in_any_chunks(
    batch: PackedBatch, heads: tuple[int, int, int], dtype: torch.dtype, window: int | None,
    softcap: float | None, stores: bool, scores: int, keys: int, masks: int, chunked: bool,
) -> None:  # fmt: skip
    """Each token sees its ancestors and its past; the CPU's own kernels say the same."""
    (Q, K, D), options = heads, AttentionOptions(heads[2] ** -0.5, 0.0, window, softcap)
    whole = torch.randn(len(batch), Q + 2 * K, D, device=DEVICE).to(dtype).requires_grad_()
    weights = torch.randn(len(batch), Q, D).to(dtype)
    with bounds(scores, keys, masks), pytest.MonkeyPatch.context() as patch:
        if stores:
            patch.setattr(attention, "stores_scores", lambda *_: True)
        sequences = PackedSequences(batch.to(DEVICE))
        for _ in range(2):  # as two layers do
            q, k, v = whole.split((Q, K, K), dim=1)
            kernels = ChunkedKernels() if chunked else kernels_for(q)
            out = kernels.attend_packed(q, k, v, sequences, options)
        [ours] = torch.autograd.grad((out * weights.to(DEVICE)).sum(), whole)
    exact = whole.detach().cpu().double().requires_grad_()
    expected = oracle.attention(batch, *exact.split((Q, K, K), dim=1), options)
    [theirs] = torch.autograd.grad((expected * weights.double()).sum(), exact)
    assert out.dtype == dtype
    assert (out.cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert (ours.cpu() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm() + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5),
    heads=st.sampled_from(HEADS), dtype=st.sampled_from(DTYPES),
    window=st.sampled_from([None, 1, 20]), softcap=st.sampled_from([None, 2.0]),
    stores=st.booleans(), scores=st.sampled_from([1, 500, 2**26]),
    keys=st.sampled_from([1, 200, 2**16]), masks=st.sampled_from([0, 2**20]),
)  # fmt: skip
@torch.no_grad()
def test_prefills_are_exact_in_any_chunks(
    spans: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype,
    window: int | None, softcap: float | None, stores: bool, scores: int, keys: int, masks: int,
) -> None:  # fmt: skip
    """Sequences with some positions cached and some new, their blocks in any order."""
    (Q, K, D), options = heads, AttentionOptions(heads[2] ** -0.5, 0.0, window, softcap)
    width = max((old + new - 1) // BLOCK + 1 for old, new in spans)
    table = torch.randperm(len(spans) * width).view(len(spans), width).to(DEVICE)
    store = torch.randn(len(spans) * width, 2, K, BLOCK * D, device=DEVICE).to(dtype)
    ids = torch.tensor([i for i, (_, new) in enumerate(spans) for _ in range(new)], device=DEVICE)
    positions = [p for old, new in spans for p in range(old, old + new)]
    where = AttentionMetadata(ids, torch.tensor(positions, device=DEVICE), table)
    query = torch.randn(len(ids), Q, D, device=DEVICE).to(dtype)
    with bounds(scores, keys, masks), pytest.MonkeyPatch.context() as patch:
        if stores:
            patch.setattr(attention, "stores_scores", lambda *_: True)
        for _ in range(2):
            ours = ChunkedKernels().attend(query, store, where, options)
    exact = Kernels().attend(query.double(), store.double(), where, options)
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= TOLERANCE[dtype] * exact.norm()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made, and how often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls[str(func).removeprefix("aten.").split(".")[0]] += 1
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


LONG = 2**15


def meta(T: int, *heads: int, D: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Tensors [T, h, D] that have a shape and no numbers."""
    shapes = [(T, h, D) for h in heads]
    return [torch.empty(x, dtype=dtype, device="meta", requires_grad=True) for x in shapes]


class Efficient:
    """Stands for PyTorch's memory-efficient kernel, and asks of its arguments what that asks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.biases: list[Tensor] = []
        patch.setattr(attention, "stores_scores", lambda *_: False)
        patch.setattr(attention.F, "scaled_dot_product_attention", self)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, *, scale: float
    ) -> Tensor:
        assert not cudnn_sdp_enabled()
        N, Q, C, D = q.shape
        assert k.shape == v.shape == (N, Q, k.shape[2], D), "it takes no grouped queries"
        assert bias.shape == (N, 1, C, k.shape[2]) and bias.dtype == q.dtype
        assert bias.stride(-1) == 1 and all(step % 16 == 0 for step in bias.stride()[:-1])
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert N * C * bias.stride(2) <= rows.CHUNK_SCORES
        self.biases.append(bias)
        return q * k.sum(2, keepdim=True) + v.sum(2, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 4096])
def test_a_training_row_of_32k_tokens_is_bounded(
    window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads of a 1B model."""
    Q, K, D = 32, 8, 64
    kernel = Efficient(monkeypatch)
    sequences = PackedSequences(pack([([1] * LONG, [1] * LONG)]))
    q, k, v = meta(LONG, Q, K, K, D=D, dtype=dtype)
    kernels = tensor_functions(q.device)
    options = AttentionOptions(D**-0.5, window=window)
    with Largest() as largest:
        kernels.attend_packed(q, k, v, sequences, options).sum().backward()
    assert k.grad is not None
    assert len(kernel.biases) == 2 * 16  # the backward pass computes each chunk again
    keys = sum(bias.shape[3] for bias in kernel.biases) / len(kernel.biases)
    assert keys < (LONG * 0.55 if window is None else 2 * window)
    assert largest.bytes <= dtype.itemsize * max(rows.CHUNK_SCORES, (LONG + 1) * Q * D)


def test_a_training_row_of_32k_tokens_with_a_soft_cap_is_bounded() -> None:
    """The heads of a Gemma 2 of 2B, whose scores no kernel of PyTorch can cap."""
    Q, K, D = 8, 4, 256
    sequences = PackedSequences(pack([([1] * LONG, [1] * LONG)]))
    q, k, v = meta(LONG, Q, K, K, D=D)
    options = AttentionOptions(D**-0.5, window=4096, softcap=50.0)
    with Largest() as largest:
        ChunkedKernels().attend_packed(q, k, v, sequences, options).sum().backward()
    assert k.grad is not None
    assert largest.bytes <= max(4 * rows.CHUNK_SCORES, 2 * LONG * Q * D)


def test_a_prompt_of_32k_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last piece, which sees all keys."""
    Efficient(monkeypatch)
    Q, K, D, S = 32, 8, 64, 4096
    tables = torch.arange(LONG // BLOCK)[None]
    where = AttentionMetadata(
        torch.zeros(S, dtype=torch.int64), torch.arange(LONG - S, LONG), tables
    )
    rows.place(where.rows, tables[0], torch.device("meta"))
    where.block_tables = tables.to("meta")
    store = torch.empty(LONG // BLOCK, 2, K, BLOCK * D, dtype=torch.bfloat16, device="meta")
    [query] = meta(S, Q, D=D)
    with Largest() as largest, torch.no_grad():
        ChunkedKernels().attend(query, store, where, AttentionOptions(D**-0.5))
    assert largest.bytes <= 2 * max(rows.CHUNK_SCORES, LONG * Q * D)


def test_masks_and_index_tensors_are_made_once_a_batch() -> None:
    """Each layer after the first makes none, moves none, and waits for nothing."""
    batch = pack_groups([([1] * 30, [([1] * n, [1] * n) for n in (5, 6, 20)])] * 3)
    sequences, kernels = PackedSequences(batch), ChunkedKernels()
    whole = torch.randn(len(batch), 8, 16, device=DEVICE, requires_grad=True)
    layers = []
    for _ in range(3):
        with Largest() as seen:
            for window in (None, 8):
                q, k, v = whole.split((4, 2, 2), dim=1)
                options = AttentionOptions(0.25, window=window)
                kernels.attend_packed(q, k, v, sequences, options).sum().backward()
        layers.append(seen.calls)
    masks = 2 * 3  # two windows; prompts, and completions of two lengths
    assert layers[0]["masked_fill_"] == masks
    assert layers[1] == layers[2]
    waits = ("_local_scalar_dense", "nonzero", "unique", "bincount")
    assert not {"masked_fill_", "full", *waits} & set(layers[1])


def test_a_gpu_waits_and_copies_once_a_batch() -> None:
    class Moves(Largest):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(made, Tensor) and any(
                isinstance(x, Tensor) and x.device != made.device for x in args
            ):
                self.calls["moves"] += 1
            return made

    batch = pack_groups([([1] * 30, [([1] * n, [1] * n) for n in (5, 6, 20)])] * 3)
    q, k, v = meta(len(batch), 4, 2, 2, D=16)
    sequences = PackedSequences(batch)
    with Moves() as seen:
        for window in (None, 8, None, 8):
            options = AttentionOptions(0.25, window=window)
            ChunkedKernels().attend_packed(q, k, v, sequences, options)
    assert seen.calls["moves"] == 1


def test_attention_keeps_its_inputs_alone_for_the_backward_pass() -> None:
    batch = pack_groups([([1] * 30, [([1] * n, [1] * n) for n in (5, 6, 20)])] * 3)
    whole = torch.randn(len(batch), 8, 16, device=DEVICE, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = whole.split((4, 2, 2), dim=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ChunkedKernels().attend_packed(q, k, v, PackedSequences(batch), AttentionOptions(0.25))
    assert sum(kept.values()) <= whole.untyped_storage().nbytes()


def test_only_a_cpu_attends_in_whole_rows() -> None:
    assert type(tensor_functions(torch.device("cpu"))) is Kernels
    for name in ("cuda", "meta"):
        assert isinstance(tensor_functions(torch.device(name)), ChunkedKernels)


def test_dropped_scores_are_dropped_again_in_the_backward_pass() -> None:
    """With value vectors of one, a row of weights sums up to what was not dropped."""
    batch = pack([([1] * 40, [1] * 40)])
    q, k = torch.randn(2, 40, 1, 8).to(DEVICE).unbind()
    v = torch.ones(40, 1, 8, device=DEVICE, requires_grad=True)
    out = ChunkedKernels().attend_packed(
        q, k, v, PackedSequences(batch), AttentionOptions(0.3, dropout=0.5)
    )
    out.sum().backward()
    assert v.grad is not None
    assert torch.allclose(v.grad.sum(), out.sum(), rtol=1e-4)
    assert not torch.allclose(out, torch.ones_like(out), atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_computes_the_same_in_chunks(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both gears agree, and gradients are those of whole rows; layers that are computed again in
    the backward pass too.
    """
    results = []
    for chunked in (True, False):
        engine = Engine(random_model(family), tiny_tokenizer(), EngineConfig(recompute=recompute))
        if chunked:
            engine.runner.kernels = ChunkedKernels()
            monkeypatch.setattr(
                "gearshift.models.attention.kernels_for", lambda _: ChunkedKernels()
            )
        with bounds(200, 50, 2**20) if chunked else nullcontext():
            if not results:
                with engine.generating():
                    groups = engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12))
            with engine.training():
                scores = engine.logprobs(pack_completions(PROMPTS, groups))
                weights = torch.linspace(0, 1, len(scores.logprobs), device=DEVICE)
                (scores.logprobs * weights).sum().backward()
        grads = [p.grad.flatten() for p in engine.model.parameters() if p.grad is not None]
        results.append((scores.logprobs.detach(), torch.cat(grads)))
        monkeypatch.undo()
    sampled = sampled_logprobs(groups)
    (ours, our_grads), (theirs, their_grads) = results
    assert torch.allclose(ours, sampled, atol=2e-5)
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (our_grads - their_grads).norm() <= 1e-5 * their_grads.norm()
