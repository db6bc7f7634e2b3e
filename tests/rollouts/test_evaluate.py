"""Held-out figures come with intervals that are as wide as they should be, and row by row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.evaluate import bootstrap, compare, interval, sample, value_of, wilson
from gearshift.types import Trajectory


def test_wilson() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_a_rate_has_wilsons_interval_and_a_mean_the_bootstraps() -> None:
    assert interval([0.0] * 20) == wilson(0, 20)
    values = [random.Random(i).gauss(3, 2) for i in range(400)]
    low, high = interval(values)
    mean, half = sum(values) / 400, 1.96 * 2 / math.sqrt(400)
    assert low == pytest.approx(mean - half, abs=0.06)
    assert high == pytest.approx(mean + half, abs=0.06)
    assert bootstrap(values) == (low, high), "the same figures give the same interval"


def record(row: int, chrf: float, success: bool = False) -> dict[str, Any]:
    return {"row": row, "reward": 2 * chrf, "success": success, "metrics": {"chrf": chrf}}


def test_policies_are_compared_row_by_row() -> None:
    # Rows differ by much more than the policies do: only their pairs tell.
    before = [record(i, 100.0 * i) for i in range(50)]
    after = [record(i, 100.0 * i + (1 if i % 5 else -1)) for i in reversed(range(50))]
    c = compare(("sft", before), ("rl", [*after, record(99, 0.0)]), "chrf")
    assert c.difference == pytest.approx(0.6)
    assert 0.3 < c.interval[0] < 0.6 < c.interval[1] < 0.9
    assert sorted(c.wins) == [i for i in range(50) if i % 5]
    assert sorted(c.losses) == list(range(0, 50, 5))
    assert c.summary() == {
        "before": "sft", "after": "rl", "difference": c.difference,
        "interval": list(c.interval), "better": 40, "worse": 10,
    }  # fmt: skip


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(DataError, match="a and b were evaluated on no common row"):
        compare(("a", [record(0, 1.0)]), ("b", [record(1, 1.0)]), "chrf")
    with pytest.raises(ConfigError, match="has no `bleu`; it has success, reward, chrf"):
        value_of(record(0, 1.0), "bleu")


def test_the_record_of_a_conversation_holds_all_of_it() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b"},
    ]
    info = {"messages": messages, "completion": "b", "success": True, "metrics": {"m": 1.0}}
    kept = sample(Trajectory([1, 2], [0, 1], [0.0, 0.0], [0.0, 0.5], 7, 1, "stop", info))
    assert kept["completion"] == "assistant: a\ntool: t\nassistant: b"
    assert (kept["row"], kept["prompt"], kept["reward"], kept["success"]) == (7, "q", 0.5, True)
    one = {**info, "messages": messages[:3], "completion": "a"}
    assert sample(Trajectory([1, 2], [0, 1], [0.0, 0.0], [0.0, 0.5], 7, 1, "stop", one))[
        "completion"
    ] == "a"  # fmt: skip
