"""Policy, value and preference losses: values and gradients against scalar formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.policy_losses import POLICY_LOSSES, ppo_clip, value_loss
from gearshift.algorithms.preference_losses import bradley_terry
from tests.algorithms.ragged import FLOATS

settings.load_profile("algorithms")
TOKENS = st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=20)


def ppo_oracle(lp: float, old: float, a: float, low: float, high: float) -> tuple[float, float]:
    """(loss, d loss / d log p) of one token, case by case (Schulman et al. 2017, figure 1)."""
    ratio = math.exp(lp - old)
    if a > 0 and ratio > 1 + high:
        return -(1 + high) * a, 0.0
    if a < 0 and ratio < 1 - low:
        return -(1 - low) * a, 0.0
    return -ratio * a, -ratio * a


@given(TOKENS, st.sampled_from([0.1, 0.2]), st.sampled_from([0.2, 0.28]))
def test_ppo_clip(tokens: list[tuple[float, float, float]], low: float, high: float) -> None:
    lp, old, a = (
        torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in zip(*tokens, strict=True)
    )
    out = ppo_clip(lp, old, a, clip_low=low, clip_high=high)
    out.loss_M.sum().backward()
    expected = [ppo_oracle(*t, low, high) for t in tokens]
    assert torch.allclose(out.loss_M, torch.tensor([e[0] for e in expected]).double(), atol=1e-9)
    assert torch.allclose(lp.grad, torch.tensor([e[1] for e in expected]).double(), atol=1e-9)
    flat = torch.tensor([e[1] == 0 and t[2] != 0 for e, t in zip(expected, tokens, strict=True)])
    assert torch.equal(out.metrics["clip_fraction"].bool(), flat)
    assert old.grad is None and a.grad is None  # constants of the update


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@given(TOKENS)
def test_figures_of_each_token(name: str, tokens: list[tuple[float, float, float]]) -> None:
    lp, old, a = (torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True))
    metrics = POLICY_LOSSES[name](lp, old, a, clip_low=0.2, clip_high=0.2).metrics
    ratio = [math.exp(x - y) for x, y, _ in tokens]
    assert torch.allclose(metrics["ratio"], torch.tensor(ratio).double(), atol=1e-9)
    if name == "ppo_clip":
        kl = [r - 1 - math.log(r) for r in ratio]
        assert torch.allclose(metrics["approx_kl"], torch.tensor(kl).double(), atol=1e-6)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    lp = torch.randn(9, dtype=torch.float64, requires_grad=True)
    a = torch.randn(9, dtype=torch.float64, requires_grad=True)
    out = POLICY_LOSSES[name](lp, lp.detach(), a, clip_low=0.2, clip_high=0.2)
    out.loss_M.sum().backward()
    assert torch.allclose(lp.grad, -a.detach())
    assert a.grad is None  # advantages are constants
    assert torch.allclose(out.metrics["ratio"], torch.ones(9).double())
    assert not any(m.requires_grad for m in out.metrics.values())


@given(TOKENS, st.sampled_from([None, 0.2]))
def test_value_loss(tokens: list[tuple[float, float, float]], clip: float | None) -> None:
    v, r, old = (
        torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in zip(*tokens, strict=True)
    )
    expected, slopes = [], []
    for value, target, before in tokens:
        loss, slope = (value - target) ** 2 / 2, value - target
        if clip is not None:
            near = min(max(value, before - clip), before + clip)
            if (near - target) ** 2 / 2 > loss:  # the clipped side counts, and it is flat
                loss, slope = (near - target) ** 2 / 2, 0.0
        expected.append(loss)
        slopes.append(slope)
    losses = value_loss(v, r, old, clip)
    assert torch.allclose(losses, torch.tensor(expected).double(), atol=1e-9)
    losses.sum().backward()
    assert torch.allclose(v.grad, torch.tensor(slopes).double(), atol=1e-9)
    assert r.grad is None and old.grad is None  # targets are constants


def test_a_value_clip_without_old_values_is_refused() -> None:
    with pytest.raises(ValueError, match="old values"):
        value_loss(torch.ones(1), torch.zeros(1), clip=0.2)


@given(TOKENS, st.sampled_from([0.0, 0.01]))
def test_bradley_terry(pairs: list[tuple[float, float, float]], center: float) -> None:
    chosen, rejected, margin = (
        torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in zip(*pairs, strict=True)
    )
    loss = bradley_terry(chosen, rejected, margin, center)
    expected = [math.log1p(math.exp(-(c - r - m))) + center * (c + r) ** 2 for c, r, m in pairs]
    assert torch.allclose(loss, torch.tensor(expected).double(), atol=1e-9)
    loss.sum().backward()
    slope = [-1 / (1 + math.exp(c - r - m)) for c, r, m in pairs]
    pull = [2 * center * (c + r) for c, r, _ in pairs]
    want = torch.tensor([s + p for s, p in zip(slope, pull, strict=True)]).double()
    assert torch.allclose(chosen.grad, want, atol=1e-9)


def test_bradley_terry_of_equals_is_a_coin_and_of_extremes_is_finite() -> None:
    zero = torch.zeros(1)
    assert float(bradley_terry(zero, zero)) == pytest.approx(math.log(2))
    assert torch.isfinite(bradley_terry(torch.tensor([-500.0]), torch.tensor([500.0]))).all()
