"""KL estimators by exact enumeration over a small vocabulary: their means, and what their gradients
are the gradients of.
"""

import pytest
import torch
from torch import Tensor

from gearshift.algorithms.kl import KL_ESTIMATORS, adaptive_beta, with_ratio


@pytest.fixture
def policies() -> tuple[Tensor, Tensor]:
    """Logits of the policy (with a gradient) and log-probs of the reference over 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()
    reference = torch.log_softmax(torch.randn(8, dtype=torch.float64, generator=generator), 0)
    return logits, reference


def expectation(logits: Tensor, per_token: Tensor) -> Tensor:
    """Mean over tokens drawn from the policy; the drawing itself has no gradient."""
    return (torch.softmax(logits, 0).detach() * per_token).sum()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased(name: str, policies: tuple[Tensor, Tensor]) -> None:
    logits, q = policies
    p = torch.log_softmax(logits, 0)
    exact = (p.exp() * (p - q)).sum()
    assert torch.allclose(expectation(logits, KL_ESTIMATORS[name](p, q)), exact, atol=1e-12)


def test_k2_is_biased_but_second_order_right(policies: tuple[Tensor, Tensor]) -> None:
    logits, q = policies
    for scale, tolerance in ((1.0, None), (1e-3, 1e-2)):
        p = torch.log_softmax(q + scale * logits, 0)
        exact = (p.exp() * (p - q)).sum()
        mean = (p.exp() * KL_ESTIMATORS["k2"](p, q)).sum()
        if tolerance is None:
            assert abs(mean / exact - 1) > 0.05
        else:
            assert abs(mean / exact - 1) < tolerance


def test_gradients_in_the_loss(policies: tuple[Tensor, Tensor]) -> None:
    logits, q = policies
    p = torch.log_softmax(logits, 0)
    [reverse] = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    [forward] = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)
    found = {
        name: torch.autograd.grad(expectation(logits, k(p, q)), logits, retain_graph=True)[0]
        for name, k in KL_ESTIMATORS.items()
    }
    assert torch.allclose(found["k1"], torch.zeros(8).double(), atol=1e-12)
    assert torch.allclose(found["k2"], reverse, atol=1e-12)
    assert torch.allclose(found["k3"], forward, atol=1e-12)
    assert not torch.allclose(forward, reverse, atol=1e-3)


def test_off_policy_no_estimator_has_the_gradient_of_the_kl_without_a_ratio(
    policies: tuple[Tensor, Tensor],
) -> None:
    logits, q = policies
    old = torch.log_softmax(logits.detach() + 0.7 * torch.randn(8).double(), 0)
    p = torch.log_softmax(logits, 0)
    [reverse] = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    found = {
        name: torch.autograd.grad((old.exp() * k(p, q)).sum(), logits, retain_graph=True)[0]
        for name, k in KL_ESTIMATORS.items()
    }
    assert torch.allclose(found["k1"], old.exp() - p.detach().exp(), atol=1e-12)  # q is not in it
    for gradient in found.values():
        assert not torch.allclose(gradient, reverse, atol=1e-2)


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl(
    policies: tuple[Tensor, Tensor],
) -> None:
    logits, q = policies
    p = torch.log_softmax(logits, 0)
    [reverse] = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    cost = KL_ESTIMATORS["k1"](p, q).detach()
    [ours] = torch.autograd.grad(expectation(logits, cost * p), logits)
    assert torch.allclose(ours, reverse, atol=1e-12)


def test_k3_and_k2_are_never_negative() -> None:
    p, q = torch.randn(1000).double(), torch.randn(1000).double()
    assert (KL_ESTIMATORS["k3"](p, q) >= 0).all() and (KL_ESTIMATORS["k2"](p, q) >= 0).all()


@pytest.mark.parametrize("name", ["k1", "k3"])
@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_with_the_ratio_value_and_gradient_are_the_reverse_kls(
    policies: tuple[Tensor, Tensor], name: str, moved: float
) -> None:
    """Enumerated over what an older policy sampled; without the ratio, k3 is biased there."""
    logits, q = policies
    old = torch.log_softmax(logits.detach() + moved * torch.randn(8).double(), 0)
    p = torch.log_softmax(logits, 0)
    exact = (p.exp() * (p - q)).sum()
    [reverse] = torch.autograd.grad(exact, logits, retain_graph=True)
    ours = (old.exp() * with_ratio(KL_ESTIMATORS[name](p, q), p, old)).sum()
    assert torch.allclose(ours, exact, atol=1e-12)
    [gradient] = torch.autograd.grad(ours, logits, retain_graph=True)
    assert torch.allclose(gradient, reverse, atol=1e-12)
    if moved:
        plain = (old.exp() * KL_ESTIMATORS[name](p, q)).sum()
        [forward] = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)
        [biased] = torch.autograd.grad(plain, logits)
        assert not torch.allclose(plain, exact, atol=1e-3)
        assert not torch.allclose(biased, reverse, atol=1e-3)
        assert not torch.allclose(biased, forward, atol=1e-3)


def test_the_adaptive_weight_of_the_kl() -> None:
    assert adaptive_beta(0.2, 6.0, 6.0, 100, 50) == pytest.approx(0.2)
    assert adaptive_beta(0.2, 6.6, 6.0, 100, 50) == pytest.approx(0.2 * 1.05)
    assert adaptive_beta(0.2, 60.0, 6.0, 100, 50) == pytest.approx(0.2 * 1.1)  # error kept to 0.2
    assert adaptive_beta(0.2, 0.0, 6.0, 100, 50) == pytest.approx(0.2 * 0.9)
