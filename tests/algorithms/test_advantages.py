"""Each advantage against its definition, written out in loops; and the policy gradient against
enumeration.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.advantages import (
    ADVANTAGES,
    NEEDS_GREEDY,
    NEEDS_VALUES,
    Rollout,
    best_of_n,
    gae,
    grpo,
    grpo_turns,
    moving_average,
    opo,
    returns,
    rloo,
    value_baseline,
)
from gearshift.algorithms.policy_losses import reinforce
from tests.algorithms.ragged import FLOATS, assert_rows, column, flat, rows
from tests.oracles import advantages as oracle

UNIT = st.sampled_from([0.0, 0.3, 0.9, 1.0])
settings.load_profile("algorithms")


@given(rows(2), UNIT)
def test_returns_and_the_learned_baseline(data: list, gamma: float) -> None:
    rewards, lengths = flat(column(data, 0))
    values, _ = flat(column(data, 1))
    expected = oracle.returns(column(data, 0), gamma)
    assert_rows(returns(rewards, lengths, gamma), expected)
    out = value_baseline(rewards, values, lengths, gamma)
    assert_rows(out.returns_M, expected)
    centred = [
        [g - v for g, v in zip(a, b, strict=True)]
        for a, b in zip(expected, column(data, 1), strict=True)
    ]
    assert_rows(out.advantages_M, centred)


@given(rows(2), UNIT, UNIT)
def test_gae(data: list, gamma: float, lam: float) -> None:
    rewards, lengths = flat(column(data, 0))
    values, _ = flat(column(data, 1))
    out = gae(rewards, values, lengths, gamma, lam)
    expected = oracle.gae(column(data, 0), column(data, 1), gamma, lam)
    assert_rows(out.advantages_M, expected)
    assert torch.allclose(out.returns_M, out.advantages_M + values)


def test_gae_with_lambda_one_is_the_learned_baseline() -> None:
    rewards, values = torch.randn(24).double(), torch.randn(24).double()
    lengths = torch.tensor([6, 6, 6, 6])
    a = gae(rewards, values, lengths, 0.9, 1.0).advantages_M
    assert torch.allclose(a, value_baseline(rewards, values, lengths, 0.9).advantages_M)


@given(st.lists(st.tuples(FLOATS, st.integers(0, 3)), min_size=1, max_size=12))
def test_group_baselines(data: list[tuple[float, int]]) -> None:
    rewards, groups = [r for r, _ in data], [g for _, g in data]
    r, g = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    expected = torch.tensor(oracle.rloo(rewards, groups), dtype=torch.float64)
    assert torch.allclose(rloo(r, g), expected, atol=1e-9)
    for scale in (True, False):
        expected = torch.tensor(oracle.grpo(rewards, groups, scale), dtype=torch.float64)
        assert torch.allclose(grpo(r, g, scale), expected, atol=1e-6)


@given(st.floats(-200, 200, width=32), st.integers(2, 40))
def test_equal_rewards_teach_exactly_nothing(reward: float, size: int) -> None:
    """To the last bit: who leaves out groups without a gradient asks for advantages != 0."""
    r, g = torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)
    lengths = torch.arange(1, size + 1)
    turns = grpo_turns(r, torch.ones(size, dtype=torch.int64), g)
    for advantages in (rloo(r, g), grpo(r, g), grpo(r, g, scale=False), opo(r, g, lengths), turns):
        assert advantages.dtype == r.dtype and not advantages.any()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "grpo_turns", "opo"])
def test_a_completion_alone_in_its_group_teaches_nothing(name: str) -> None:
    out = ADVANTAGES[name](Rollout(*flat([[0.0, 0.7], [2.0]]), torch.tensor([4, 9])))
    assert not out.advantages_M.any()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_an_empty_completion_harms_no_other_group(name: str) -> None:
    """It has no token, so no figure, and it changes nothing where it is nobody's sibling."""
    rewards, lengths = flat([[0.0, 1.0], [], [0.5], [0.2, 2.0]])
    greedy, values = torch.ones(4).double(), torch.randn(5).double()
    group = torch.tensor([5, 7, 5, 5])
    ours = ADVANTAGES[name](Rollout(rewards, lengths, group, values, 0.3, greedy))
    kept = torch.tensor([0, 2, 3])
    rest = Rollout(rewards, lengths[kept], group[kept], values, 0.3, greedy[kept])
    wanted = ADVANTAGES[name](rest)
    assert torch.equal(ours.advantages_M, wanted.advantages_M)
    assert (ours.returns_M is None) == (name not in NEEDS_VALUES)
    if ours.returns_M is not None and wanted.returns_M is not None:
        assert torch.equal(ours.returns_M, wanted.returns_M)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
@given(rows(1))
def test_group_methods_score_the_row_sums(name: str, data: list) -> None:
    rewards = column(data, 0)
    groups = [i % 2 for i in range(len(rewards))]
    sums = [sum(row) for row in rewards]
    score = oracle.rloo if name == "rloo" else partial(oracle.grpo, scale=name == "grpo")
    expected = [[a] * len(row) for a, row in zip(score(sums, groups), rewards, strict=True)]
    out = ADVANTAGES[name](Rollout(*flat(rewards), torch.tensor(groups)))
    assert_rows(out.advantages_M, expected, atol=1e-6)


@given(rows(2), st.booleans())
def test_rewards_of_turns_are_scaled_in_their_group(data: list, is_given: bool) -> None:
    """A turn ends where a reward was given, which may be 0; each token has a cost."""
    rewards = [[0.0 if abs(r) < 1 else r for r in row] for row in column(data, 0)]
    given = [[x > 0 for x in row] for row in column(data, 1)]
    if not is_given:
        given = [[r != 0 for r in row] for row in rewards]
    given_M = flat([[float(x) for x in row] for row in given])[0] != 0
    groups = [i % 2 for i in range(len(rewards))]
    rollout = Rollout(*flat(rewards), torch.tensor(groups), given_M=given_M if is_given else None)
    out = ADVANTAGES["grpo_turns"](rollout)
    assert_rows(out.advantages_M, oracle.grpo_turns(rewards, given, groups), atol=1e-6)


@given(st.lists(st.tuples(FLOATS, st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=9))
def test_opo_and_the_best_of_n(data: list[tuple[float, int, int]]) -> None:
    rewards, groups, lengths = (list(column) for column in zip(*data, strict=True))
    r, g = torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)
    ours = opo(r, g, torch.tensor(lengths))
    assert torch.allclose(ours, torch.tensor(oracle.opo(rewards, groups, lengths)).double())
    assert best_of_n(r, g).tolist() == oracle.best_of_n(rewards, groups)


@given(rows(1), UNIT, FLOATS)
def test_plain_baselines(data: list, gamma: float, baseline: float) -> None:
    """The moving average's and ReMax's: the return less a number; `none`: less nothing."""
    rewards = column(data, 0)
    N = len(rewards)
    greedy = [baseline + i for i in range(N)]
    rollout = Rollout(
        *flat(rewards), torch.zeros(N), baseline=baseline,
        greedy_N=torch.tensor(greedy, dtype=torch.float64),
    )  # fmt: skip
    G = oracle.returns(rewards, gamma)
    for name, less in (
        ("none", [0.0] * N), ("moving_average", [baseline] * N), ("remax", greedy)
    ):  # fmt: skip
        expected = [[g - b for g in row] for row, b in zip(G, less, strict=True)]
        assert_rows(ADVANTAGES[name](rollout, gamma=gamma).advantages_M, expected)


def test_the_moving_average_begins_with_what_it_sees_first() -> None:
    average = None
    for x in (4.0, 8.0, 0.0):
        average = moving_average(average, x, 0.75)
    assert average == pytest.approx(0.75 * (0.75 * 4 + 0.25 * 8))


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_all_share_one_signature(name: str) -> None:
    rewards, lengths = flat([[0.0, 0.0, 1.0], [0.5], [0.0, 2.0]])
    values = torch.randn(6).double().requires_grad_()
    given_ = Rollout(
        rewards, lengths, torch.tensor([5, 5, 9]),
        values_M=values if name in NEEDS_VALUES else None,
        greedy_N=torch.ones(3).double() if name in NEEDS_GREEDY else None,
    )  # fmt: skip
    out = ADVANTAGES[name](given_)
    assert out.advantages_M.shape == (6,) and not out.advantages_M.requires_grad
    assert (out.returns_M is None) == (name not in NEEDS_VALUES)
    if out.returns_M is not None:
        assert out.returns_M.shape == (6,) and not out.returns_M.requires_grad
    if name in NEEDS_VALUES | NEEDS_GREEDY:
        with pytest.raises(ValueError, match=f"{name} needs"):
            ADVANTAGES[name](Rollout(rewards, lengths, torch.zeros(3)))


@pytest.mark.parametrize("baseline", [0.0, 0.4, -2.0])
def test_reinforce_with_any_baseline_is_the_exact_policy_gradient(baseline: float) -> None:
    """Enumerated: sum_a p(a) grad[-(r(a) - b) log p(a)] = -grad E[r], for every b."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, -0.5, 0.9], dtype=torch.float64)
    [exact] = torch.autograd.grad(-(torch.softmax(logits, 0) * reward).sum(), logits)
    log_p = torch.log_softmax(logits, 0)
    value = torch.full((4,), baseline, dtype=torch.float64)
    advantages = value_baseline(reward, value, torch.ones(4).long()).advantages_M
    losses = reinforce(log_p, log_p.detach(), advantages, torch.ones(4).long()).loss_M
    [ours] = torch.autograd.grad((log_p.detach().exp() * losses).sum(), logits)
    assert torch.allclose(ours, exact, atol=1e-12)


def test_rloo_is_unbiased() -> None:
    """Enumerated over all pairs of samples of one prompt."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    [exact] = torch.autograd.grad(-(torch.softmax(logits, 0) * reward).sum(), logits)
    log_p = torch.log_softmax(logits, 0)
    p = log_p.detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            advantages = rloo(reward[[a, b]], torch.zeros(2))
            total = total - p[a] * p[b] * (advantages * log_p[[a, b]]).mean()
    [ours] = torch.autograd.grad(total, logits)
    assert torch.allclose(ours, exact, atol=1e-12)
