"""Policy, value and preference losses: values and gradients against scalar formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.policy_losses import (
    POLICY_LOSSES,
    ImportanceMode,
    importance_weights,
    sampler_kl,
    value_loss,
)
from gearshift.algorithms.preference_losses import (
    bradley_terry,
    dpo,
    ipo,
    kto,
    orpo,
    simpo,
    step_loss,
)
from tests.algorithms.ragged import FLOATS
from tests.oracles import losses as oracle

settings.load_profile("algorithms")
TOKENS = st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=20)


def tensors(tokens: list[tuple[float, float, float]]) -> list[torch.Tensor]:
    return [
        torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in zip(*tokens, strict=True)
    ]


ORACLES = {
    "reinforce": lambda lp, old, a: (-a * lp, -a),
    "ppo_clip": lambda lp, old, a: oracle.ppo(lp, old, a, 0.2, 0.28),
    "dual_clip": lambda lp, old, a: oracle.dual_clip(lp, old, a, 0.2, 0.28, 1.5),
    "cispo": lambda lp, old, a: oracle.cispo(lp, old, a, 0.2, 0.28),
    "sapo": lambda lp, old, a: oracle.sapo(lp, old, a, 0.9, 1.3),
}


NUMBERS: dict[str, dict[str, float]] = {
    "reinforce": {},
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
    "cispo": {"clip_low": 0.2, "clip_high": 0.28},
    "sapo": {"tau_positive": 0.9, "tau_negative": 1.3},
}


@pytest.mark.parametrize("name", sorted(ORACLES))
@given(TOKENS)
def test_losses_of_tokens(name: str, tokens: list[tuple[float, float, float]]) -> None:
    lp, old, a = tensors(tokens)
    loss = POLICY_LOSSES["ppo_clip" if name == "dual_clip" else name]
    out = loss(lp, old, a, torch.tensor([len(tokens)]), **NUMBERS[name])
    out.loss_M.sum().backward()
    expected = [ORACLES[name](*t) for t in tokens]
    assert torch.allclose(out.loss_M, torch.tensor([e[0] for e in expected]).double(), atol=1e-9)
    assert torch.allclose(lp.grad, torch.tensor([e[1] for e in expected]).double(), atol=1e-9)
    if name in ("ppo_clip", "dual_clip"):
        flat = [e[1] == 0 and t[2] != 0 for e, t in zip(expected, tokens, strict=True)]
        assert out.metrics["clip_ratio/region_mean"].bool().tolist() == flat
    assert old.grad is None and a.grad is None  # constants of the update


@given(st.lists(st.tuples(TOKENS, FLOATS), min_size=1, max_size=4), st.sampled_from([0.1, 3e-4]))
def test_gspo(
    completions: list[tuple[list[tuple[float, float, float]], float]], clip: float
) -> None:
    """Each completion's tokens weighted 1 / length: the completion's own loss and gradient."""
    tokens = [(lp, old, a) for row, a in completions for lp, old, _ in row]
    counts = [len(row) for row, _ in completions]
    lp, old, a = tensors(tokens)
    # an empty completion between others is no completion
    counts_N = torch.tensor([counts[0], 0, *counts[1:]])
    out = POLICY_LOSSES["gspo"](lp, old, a, counts_N, clip_low=clip, clip_high=2 * clip)
    weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in counts])
    (weights * out.loss_M).sum().backward()
    expected = [
        oracle.gspo([t[0] for t in row], [t[1] for t in row], adv, clip, 2 * clip)
        for row, adv in completions
    ]
    assert float((weights * out.loss_M).sum().detach()) == pytest.approx(
        sum(e[0] for e in expected), abs=1e-9
    )
    slopes = [g for e in expected for g in e[1]]
    assert torch.allclose(lp.grad, torch.tensor(slopes).double(), atol=1e-9)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
@given(TOKENS)
def test_figures_of_each_token(name: str, tokens: list[tuple[float, float, float]]) -> None:
    lp, old, a = (torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True))
    counts = torch.ones(len(tokens)).long()  # where gspo's ratio is the token's
    metrics = POLICY_LOSSES[name](lp, old, a, counts).metrics
    ratio = [math.exp(x - y) for x, y, _ in tokens]
    assert torch.allclose(metrics["ratio"], torch.tensor(ratio).double(), atol=1e-9)
    if name == "ppo_clip":
        kl = [r - 1 - math.log(r) for r in ratio]
        assert torch.allclose(metrics["approx_kl"], torch.tensor(kl).double(), atol=1e-6)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    lp = torch.randn(9, dtype=torch.float64, requires_grad=True)
    a = torch.randn(9, dtype=torch.float64, requires_grad=True)
    out = POLICY_LOSSES[name](lp, lp.detach(), a, torch.tensor([4, 0, 5]))
    out.loss_M.sum().backward()
    assert torch.allclose(lp.grad, -a.detach())
    assert a.grad is None  # advantages are constants
    assert torch.allclose(out.metrics["ratio"], torch.ones(9).double())
    assert not any(m.requires_grad for m in out.metrics.values())


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("mode", MODES)
@given(st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from([1.0, 2.0, 5.0]))
def test_importance_weights(mode: ImportanceMode, rows: list, cap: float) -> None:
    lp, old, _ = tensors([t for row in rows for t in row])
    counts = torch.tensor([len(row) for row in rows])
    ours = importance_weights(lp, old, counts, mode, cap)
    lps, olds = ([[t[i] for t in row] for row in rows] for i in (0, 1))
    wanted = torch.tensor(oracle.importance(lps, olds, mode, cap)).double()
    # a ratio on the very edge may fall to either side
    edge = torch.isclose(wanted, torch.tensor(cap).double()) | (wanted == 0) & (
        ours * cap - 1 < 1e-6
    )
    assert torch.allclose(ours[~edge], wanted[~edge], atol=1e-9)
    assert not ours.requires_grad


def test_the_mismatch_of_sampler_and_policy() -> None:
    """k3 of the sampler against the policy: its mean over what the sampler drew is their KL."""
    sampler, policy = (torch.log_softmax(torch.randn(7).double(), 0) for _ in range(2))
    exact = (sampler.exp() * (sampler - policy)).sum()
    assert torch.allclose((sampler.exp() * sampler_kl(policy, sampler)).sum(), exact)


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


PAIRS = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=12)
PAIR_LOSSES = {
    "dpo": (lambda c, r: dpo(c, r, 0.3, 0.1), lambda c, r: oracle.dpo(c, r, 0.3, 0.1)),
    "ipo": (lambda c, r: ipo(c, r, 0.3), lambda c, r: oracle.ipo(c, r, 0.3)),
    "simpo": (lambda c, r: simpo(c, r, 2.0, 0.5), lambda c, r: oracle.simpo(c, r, 2.0, 0.5)),
    "orpo": (
        lambda c, r: orpo(c - 4, r - 4, 0.3), lambda c, r: oracle.orpo(c - 4, r - 4, 0.3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
@given(PAIRS)
def test_losses_of_pairs(name: str, pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = tensors(pairs)  # type: ignore[arg-type]
    ours, slow = PAIR_LOSSES[name]
    losses = ours(chosen, rejected)
    losses.sum().backward()
    for i, (c, r) in enumerate(pairs):
        assert float(losses[i]) == pytest.approx(slow(c, r), abs=1e-9)
        up = oracle.slope(lambda x, r=r: slow(x, r), c)
        down = oracle.slope(lambda x, c=c: slow(c, x), r)
        assert float(chosen.grad[i]) == pytest.approx(up, abs=1e-6)
        assert float(rejected.grad[i]) == pytest.approx(down, abs=1e-6)


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=1, max_size=12), FLOATS)
def test_kto(samples: list[tuple[float, bool]], z0: float) -> None:
    ratio = torch.tensor([x for x, _ in samples], dtype=torch.float64, requires_grad=True)
    good = torch.tensor([g for _, g in samples])
    baseline = torch.tensor(z0, dtype=torch.float64, requires_grad=True)
    losses = kto(ratio, good, baseline, 0.4, 1.3, 0.7)
    losses.sum().backward()
    assert baseline.grad is None
    for i, (x, g) in enumerate(samples):
        assert float(losses[i]) == pytest.approx(oracle.kto(x, g, z0, 0.4, 1.3, 0.7), abs=1e-6)
        slope = oracle.slope(lambda y, g=g: oracle.kto(y, g, z0, 0.4, 1.3, 0.7), x)
        assert float(ratio.grad[i]) == pytest.approx(slope, abs=1e-5)


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=1, max_size=12))
def test_the_loss_of_steps(steps: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([x for x, _ in steps], dtype=torch.float64)
    labels = torch.tensor([g for _, g in steps])
    expected = [oracle.step(x, g) for x, g in steps]
    assert step_loss(logits, labels).tolist() == pytest.approx(expected, abs=1e-6)


def test_losses_of_extremes_are_finite() -> None:
    far = torch.tensor([-400.0, 0.0, -1e-9]).requires_grad_()
    for loss in (dpo(far, -far, 1.0), orpo(far, far.flip(0), 1.0), simpo(far, -far, 2.0, 1.0)):
        [gradient] = torch.autograd.grad(loss.sum(), far)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_smoothed_labels_of_one_half_prefer_nothing() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([-1.0])
    even = dpo(chosen, rejected, 0.5, label_smoothing=0.5)
    assert torch.allclose(even, dpo(rejected, chosen, 0.5, label_smoothing=0.5))
