"""Step 1: the attention of training and of prefills, and what could take its place."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.probe import Probe
from gearshift.batch import PackedBatch, pack, pack_groups
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import AttentionOptions
from gearshift.models.attention import PackedLayout

HEADS, KEY_HEADS, SIZE = 32, 8, 128
"""The heads of queries, the heads of keys and the head size of the timed layers."""
NEW_SHAPES = 6


def backends(probe: Probe) -> None:
    """Which kernel torch chooses for each form of attention."""
    length = probe.size(1024, 16)
    for dtype in (torch.bfloat16, torch.float32):
        for D in (64, 128, 256):
            found = {}
            for form in ("GQA+mask", "MHA+mask", "causal"):
                K = 2 if form == "GQA+mask" else 8
                q, k = (probe.randn(2, n, length, D, dtype=dtype) for n in (8, K))
                mask = probe.randn(2, 1, length, length) > 0
                masked, grouped = form != "causal", form == "GQA+mask"
                choice = torch._fused_sdp_choice(
                    q, k, k, mask if masked else None, 0.0, not masked, enable_gqa=grouped
                )
                found[form] = SDPBackend(choice).name
            probe.shows(f"kernel, {str(dtype).removeprefix('torch.')}, D={D}", found)


def exact(probe: Probe) -> None:
    """The attention that trains and its gradients against the same in fp64, over trees."""
    lengths = probe.size((300, 40, 200, 1, 700, 65), (5, 3, 9, 1, 17, 4))
    rows = [([3] * n, [0] * n) for n in lengths]
    batch = pack_groups([(rows[0][0], rows[1:3]), (rows[3][0], rows[4:])]).to(probe.device)
    sequences = PackedLayout(batch).sequences
    forms = {"": {}, ", window": {"window": 8}, ", softcap": {"softcap": 2.0}}
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for D in probe.size((64, 128, 256), (16,)):
            for form, more in forms.items():
                case = f"attention {str(dtype).removeprefix('torch.')}, D={D}{form}"
                with probe.case(case):
                    options = AttentionOptions(D**-0.5, **more)
                    gaps = differences(probe, sequences, dtype, D, options)
                    probe.at_most(case, max(gaps), most, "relative")


def differences(
    probe: Probe, sequences: PackedSequences, dtype: torch.dtype, D: int, options: AttentionOptions
) -> list[float]:
    """The largest errors of the output and of the gradients, each divided by the largest value."""
    T = len(sequences.batch)
    ours = [probe.randn(T, n, D, dtype=dtype).requires_grad_() for n in (8, 2, 2)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    weight = probe.randn(T, 8, D, dtype=dtype)
    out = card_kernels(probe, ours[0]).attend_packed(*ours, sequences, options)
    out.backward(weight)
    right = Kernels().attend_packed(*theirs, sequences, options)
    right.backward(weight.double())
    pairs = [(out, right), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]


def card_kernels(probe: Probe, like: Tensor) -> Kernels:
    """The kernels of a card; on a CPU their tensor functions."""
    return kernels_for(like) if probe.cuda else ChunkedKernels()


def plans(probe: Probe) -> None:
    """What the first call of each new shape costs more than the second, in the attention that
    trains: ragged batches are a new shape each time.
    """
    runs: dict[str, Callable[[PackedBatch], Callable[[], None]]] = {
        "ours": lambda batch: packed(probe, batch),
        "torch's choice, GQA and mask": lambda batch: padded(probe, batch, None),
        "memory-efficient, expanded keys": lambda batch: padded(
            probe, batch, [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        ),
    }
    for name, made in runs.items():
        with probe.case(name):
            costs, seconds, flops = [], [], []
            for seed in range(NEW_SHAPES + 1):
                batch = ragged(probe, seed)
                run = made(batch)
                first, second = probe.wall(run), probe.wall(run)
                costs.append(first - second)
                seconds.append(second)
                flops.append(attention_flops(batch))
            costs, seconds = costs[1:], seconds[1:]  # the first compiles and loads
            case, cost = f"{name}: a new shape costs", 1e3 * median(costs)
            if name == "ours":
                probe.quick(case, cost, 1.0, "ms")
            else:
                probe.shows(case, cost, "ms")
            told = {"ms": 1e3 * median(seconds), "TFLOP/s": sum(flops[1:]) / sum(seconds) / 1e12}
            probe.shows(f"{name}: forward and backward", told)


def others(probe: Probe) -> None:
    """FlexAttention and torch's attention of packed sequences, over the same tokens."""
    with probe.case("FlexAttention"):
        flex(probe)
    with probe.case("varlen_attn"):
        varlen(probe)


def ragged(probe: Probe, seed: int) -> PackedBatch:
    """Sequences of random lengths, 4,096 tokens on a card."""
    rng, total = random.Random(seed), probe.size(4096, 48)
    lengths: list[int] = []
    while (rest := total - sum(lengths)) > 0:
        lengths.append(min(rest, rng.randint(total // 32 + 1, total // 4)))
    return pack([([3] * n, [0] * n) for n in lengths]).to(probe.device)


def attention_flops(batch: PackedBatch) -> float:
    """Products of causal attention over the batch's sequences, forward and backward."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).double()
    return float(3.5 * 4 * HEADS * SIZE * (lengths * lengths).sum() / 2)


def tensors(probe: Probe, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; heads are the second dimension from behind."""
    made = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS):
        x = probe.randn(*shape, heads, probe.size(SIZE, 16), dtype=torch.bfloat16)
        made.append(x.requires_grad_())
    return made[0], made[1], made[2]


def packed(probe: Probe, batch: PackedBatch) -> Callable[[], None]:
    """The training gear's attention. Its layout is made anew at each call, as for each batch."""
    q, k, v = tensors(probe, len(batch))
    options = AttentionOptions(q.shape[-1] ** -0.5)

    def run() -> None:
        sequences = PackedLayout(batch).sequences
        out = card_kernels(probe, q).attend_packed(q, k, v, sequences, options)
        out.backward(torch.randn_like(out))

    return run


def padded(
    probe: Probe, batch: PackedBatch, kernels: list[SDPBackend] | None
) -> Callable[[], None]:
    """Torch's own attention over padded rows, with a mask."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    N, S = len(lengths), max(lengths)
    q, k, v = (x.transpose(1, 2) for x in tensors(probe, N, S))
    real = (
        torch.arange(S, device=probe.device) < torch.tensor(lengths, device=probe.device)[:, None]
    )
    mask = torch.ones(S, S, dtype=torch.bool, device=probe.device).tril() & real[:, None]
    mask |= ~real[:, :, None]

    def run() -> None:
        if kernels is None:
            out = F.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)
        else:
            R = HEADS // KEY_HEADS
            wide = [x.repeat_interleave(R, 1) for x in (k, v)]
            with sdpa_kernel(kernels):
                out = F.scaled_dot_product_attention(q, *wide, mask[:, None])
        out.backward(torch.randn_like(out), retain_graph=True)

    return run


def flex(probe: Probe) -> None:
    """One compiled kernel for all shapes, over the packed tokens; its blocks follow the batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # A CPU would compile C++, and has no backward.
    attend: Any = torch.compile(flex_attention, dynamic=False) if probe.cuda else flex_attention
    seconds, flops = [], 0.0

    def run(batch: PackedBatch, made: tuple[Tensor, Tensor, Tensor]) -> None:
        lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
        document = torch.full((made[0].shape[1],), -1)
        document[: len(batch)] = torch.arange(len(lengths)).repeat_interleave(lengths)
        document = document.to(probe.device)

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (document[q] == document[k]) & (q >= k)

        T = len(document)
        mask = create_block_mask(seen, None, None, T, T, device=probe.device)
        out = attend(*(x.transpose(1, 2) for x in made), block_mask=mask, enable_gqa=True)
        if probe.cuda:
            out.backward(torch.randn_like(out))

    for seed in range(3):
        batch = ragged(probe, seed)
        q, k, v = tensors(probe, 1, -(-len(batch) // 128) * 128)
        made = (q, k, v) if probe.cuda else (q.detach(), k.detach(), v.detach())
        seconds.append([probe.wall(partial(run, batch, made)) for _ in range(2)])
        flops = attention_flops(batch)
    probe.shows("FlexAttention: the first batch (compiles)", seconds[0][0], "s")
    probe.shows("FlexAttention: a new batch, then again", [1e3 * x for x in seconds[-1]], "ms")
    probe.shows("FlexAttention", flops / seconds[-1][1] / 1e12, "TFLOP/s")


def varlen(probe: Probe) -> None:
    """Flash attention of packed sequences. Its arguments differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    probe.shows("varlen_attn takes", names)
    if not probe.cuda:
        probe.omits("varlen_attn", "it has kernels on cards only")
        return
    batch = ragged(probe, 0)
    q, k, v = tensors(probe, len(batch))
    R = HEADS // KEY_HEADS
    wide = [x.repeat_interleave(R, 1).detach().requires_grad_() for x in (k, v)]
    cu = batch.cu_seqlens.to(probe.device, torch.int32)
    longest = int((cu[1:] - cu[:-1]).max())
    causal: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in names:
        causal = {"is_causal": True}

    def run() -> None:
        out = varlen_attn(q, *wide, cu, cu, longest, longest, **causal)
        out.backward(torch.randn_like(out), retain_graph=True)

    seconds = probe.seconds(run)
    told = {"ms": 1e3 * seconds, "TFLOP/s": attention_flops(batch) / seconds / 1e12}
    probe.shows("varlen_attn: forward and backward", told)


PARTS = (Part(exact, 3), Part(plans, 4), Part(backends, 1), Part(others, 7))
