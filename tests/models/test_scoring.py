"""Compiled scores of tokens, and packed attention, are what their formulas say; gradients too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gearshift.batch import PackedBatch
from gearshift.kernels.specs import AttentionOptions, Head
from gearshift.models import logprobs
from gearshift.models.attention import PackedLayout
from gearshift.models.logprobs import token_logprobs


def scored(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float, weights: Tensor
) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    head.linear.zero_grad()
    s = token_logprobs(head, hidden, targets, temperature)
    (weights[0] * s.logprobs + weights[1] * s.entropy).sum().backward()
    grads = [p.grad for p in (hidden, *head.linear.parameters())]
    return [s.logprobs.detach(), s.entropy.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_scores_are_the_formula(
    dtype: torch.dtype, bias: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 2**12)  # several chunks
    M, H, V = 13, 24, 307
    head = Head(nn.Linear(H, V, bias=bias).to(dtype))
    hidden, targets = torch.randn(M, H).to(dtype) * 3, torch.randint(V, (M,))
    weights = torch.randn(2, M)
    ours = scored(head, hidden, targets, temperature, weights)
    double = Head(nn.Linear(H, V, bias=bias).double())
    double.linear.load_state_dict(head.linear.state_dict())
    log_p = torch.log_softmax(double.linear(hidden.double()) / temperature, -1)
    assert torch.allclose(
        ours[0].double(), log_p[range(M), targets], atol=1e-5 if dtype == torch.float32 else 0.05
    )
    theirs = [x.detach() for x in (log_p[range(M), targets], -(log_p.exp() * log_p).sum(-1))]
    x = hidden.double().requires_grad_()
    log_p = torch.log_softmax(double.linear(x) / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (weights[0] * log_p[range(M), targets] + weights[1] * entropy).sum().backward()
    theirs += [x.grad, *(p.grad for p in double.linear.parameters())]  # type: ignore[list-item]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_a_token_that_cannot_be_has_no_gradient() -> None:
    head = Head(nn.Linear(4, 40))
    with torch.no_grad():
        head.linear.bias[7] = -math.inf
    ours = scored(head, torch.randn(3, 4), torch.tensor([1, 2, 3]), 1.0, torch.ones(2, 3))
    assert all(x.isfinite().all() for x in ours[:3])


def visible(batch: PackedBatch, i: int, j: int) -> bool:
    """Whether token i may look at token j."""
    cu = batch.cu_seqlens.tolist()
    of = [next(n for n in range(len(cu) - 1) if t < cu[n + 1]) for t in (i, j)]
    line = [of[0]]
    while batch.parents[line[-1]] >= 0:
        line.append(int(batch.parents[line[-1]]))
    return of[1] in line and bool(batch.position_ids[j] <= batch.position_ids[i])


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), window=st.sampled_from([None, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    heads=st.sampled_from([(4, 2, 6), (3, 3, 16), (6, 2, 20)]),
)  # fmt: skip
def test_packed_attention_sees_ancestors_and_its_past(
    data: st.DataObject, window: int | None, dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    parents: list[int] = []
    root = 0
    for i in range(len(lengths)):  # a new tree, or one more of the last
        if i == 0 or data.draw(st.booleans()):
            root = i
            parents.append(-1)
        else:
            parents.append(data.draw(st.integers(root, i - 1)))
    positions: list[Tensor] = []
    for parent, length in zip(parents, lengths, strict=True):
        start = 0 if parent < 0 else int(positions[parent][-1]) + 1
        positions.append(torch.arange(start, start + length))
    T, (H, K, D) = sum(lengths), heads
    cu = torch.tensor([0, *lengths]).cumsum(0)
    zeros = torch.zeros(T, dtype=torch.int64)
    batch = PackedBatch(zeros, torch.cat(positions), cu, torch.tensor(parents), zeros.bool())
    whole = torch.randn(T, H + 2 * K, D).to(dtype).requires_grad_()
    q, k, v = whole.split((H, K, K), dim=1)
    out = PackedLayout(batch).packed(q, k, v, AttentionOptions(D**-0.5, window=window))
    weights = torch.randn_like(out)
    [ours] = torch.autograd.grad((out * weights).sum(), whole)

    mask = torch.tensor([[visible(batch, i, j) for j in range(T)] for i in range(T)])
    if window is not None:
        near = batch.position_ids[:, None] - batch.position_ids[None] < window
        mask &= near
    exact = whole.detach().double().requires_grad_()
    q, k, v = exact.split((H, K, K), dim=1)
    keys, values = (x.repeat_interleave(H // K, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * D**-0.5
    p = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
    expected = torch.einsum("hij,jhd->ihd", p, values)
    [theirs] = torch.autograd.grad((expected * weights.double()).sum(), exact)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
