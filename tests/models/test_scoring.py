"""Compiled scores of tokens are what their formula says; gradients too."""

import math

import pytest
import torch
from torch import Tensor, nn

from gearshift.kernels.specs import Head
from gearshift.models import logprobs
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
