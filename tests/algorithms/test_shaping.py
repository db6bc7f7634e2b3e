"""What becomes of rewards before they are advantages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.shaping import clip_rewards, overlong_penalty, token_rewards
from tests.algorithms.ragged import assert_rows, column, flat, rows

settings.load_profile("algorithms")


@given(rows(2), st.floats(0, 2))
def test_kl_is_a_cost_of_each_token(data: list, beta: float) -> None:
    rewards, kl = flat(column(data, 0))[0], flat(column(data, 1))[0]
    expected = [[r - beta * k for r, k in row] for row in data]
    assert_rows(token_rewards(rewards, kl, beta), expected)


def test_clipped_rewards() -> None:
    assert clip_rewards(torch.tensor([[-9.0, -1.0, 0.5, 6.0]]), 5.0).tolist() == [[-5, -1, 0.5, 5]]


@given(st.integers(1, 40), st.integers(1, 20))
def test_the_end_of_the_longest_answer_costs(length: int, buffer: int) -> None:
    longest = 30
    start = longest - buffer
    wanted = 0.0 if length <= start else max(-1.0, (start - length) / buffer)
    ours = overlong_penalty(torch.tensor([length]), longest, buffer)
    assert ours.tolist() == pytest.approx([wanted])
