"""Held-out figures: by problem, with failures counted, and compared row by row."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from gearshift.engine import Engine
from gearshift.environments.base import RowEnvironment
from gearshift.errors import ConfigError, DataError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import episode_info
from gearshift.rollouts.evaluate import compare, evaluate, sample, span, starts_of, value_of
from gearshift.types import EpisodeInfo, Trajectory
from tests.zoo import random_model


def record(row: int, chrf: float, success: bool = False, **more: Any) -> dict[str, Any]:
    figures = {"reward": 2 * chrf, "success": success, "metrics": {"chrf": chrf}}
    return {"row": row, "problem": row, **figures, **more}


def test_policies_are_compared_row_by_row() -> None:
    # Rows differ by much more than the policies do: only their pairs tell.
    before = [record(i, 100.0 * i) for i in range(50)]
    after = [record(i, 100.0 * i + (1 if i % 5 else -1)) for i in reversed(range(50))]
    c = compare(("sft", before), ("rl", [*after, record(99, 0.0)]), "chrf")
    assert c.difference == pytest.approx(0.6)
    assert 0.3 < c.interval[0] < 0.6 < c.interval[1] < 0.9
    assert c.p < 0.001 and c.told_apart and c.n == 50
    assert sorted(c.wins) == [i for i in range(50) if i % 5]
    assert sorted(c.losses) == list(range(0, 50, 5))
    assert c.summary() == {
        "before": "sft", "after": "rl", "difference": c.difference, "interval": list(c.interval),
        "p": c.p, "told_apart": True, "n": 50, "better": 40, "worse": 10,
    }  # fmt: skip
    assert str(c).startswith("sft -> rl: +0.600 [+0.") and str(c).endswith("worse, 50 problems")


def test_four_better_and_none_worse_is_no_proof() -> None:
    before = [record(i, 0.0) for i in range(50)]
    c = compare(("a", before), ("b", [record(i, 0.0, i < 4) for i in range(50)]), "success")
    assert c.interval[0] > 0 and c.p == 0.125 and not c.told_apart
    assert "p = 0.12" in str(c) and str(c).endswith("this may be chance")


def test_rows_of_one_problem_count_once() -> None:
    after = [record(i, 0.0, True, problem=i % 3) for i in range(60)]
    before = [record(i, 0.0, problem=i % 3) for i in range(60)]
    c = compare(("a", before), ("b", after), "success")
    assert (c.n, c.p, c.told_apart, len(c.wins)) == (3, 0.25, False, 60)
    # Either side may know that rows are one problem.
    apart = [record(i, 0.0, problem=i) for i in range(60)]
    assert compare(("a", apart), ("b", after), "success").n == 3


def test_what_is_not_known_is_said() -> None:
    c = compare(("a", [record(0, 0.1)]), ("b", [record(0, 0.4)]), "chrf")
    assert c.summary()["interval"] == [None, None] and not c.told_apart
    assert "[not known: one problem only]" in str(c)
    assert span([0.3912, 0.656]) == "[0.391, 0.656]"


def test_a_failed_episode_is_no_success_and_has_no_other_figure() -> None:
    before = [record(i, 0.5, True, failed=False) for i in range(4)]
    after = [record(i, 0.75, True, failed=False) for i in range(3)]
    after.append(record(3, 0.0, False, failed=True, reward=None, metrics={}))
    lost = compare(("a", before), ("b", after), "success")
    assert (lost.difference, lost.losses, lost.n) == (-0.25, [3], 4)
    better = compare(("a", before), ("b", after), "chrf")
    assert (better.difference, better.n) == (0.25, 3)


class Fails(RowEnvironment):
    """Fails at every fourth row; the others are solved."""

    def __init__(self) -> None:
        def score(prompts: Any, completions: Any, *_: Any, **__: Any) -> list[float | None]:
            return [2.0]

        super().__init__([{"prompt": f"row {i // 2}", "i": i} for i in range(8)], score)

    def verdict(self, row: Any, action: str, reward: float) -> dict[str, Any]:
        if row["i"] % 4 == 0:
            raise OSError("the disk is full")
        return {"success": True, "metrics": {"points": 3.0}}


def test_what_made_every_episode_fail_is_said_with_its_count() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    collector = Collector(Fails, engine.tokenizer, engine.loop)
    with engine.generating():
        for rows, said in (
            ([0, 4], "failed: 2 lost to the environment (the last: OSError: the disk is full);"),
            ([0, 1, 2], "full), 2 without a reward (the last: f raised);"),
        ):
            starts = starts_of("test", len(rows), rows)
            with pytest.raises(DataError) as failed:
                evaluate(collector, starts, 4, score=lambda ran: ([None] * len(ran), "f raised."))
            assert said in str(failed.value)


def test_failed_episodes_count_in_the_success_rate() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    collector = Collector(Fails, engine.tokenizer, engine.loop)
    starts = starts_of("test", 8, range(8))
    assert all(start.seed >= 2**31 for start in starts), "no seed of training"
    with engine.generating():
        result = evaluate(collector, starts, 4, problems={i: i // 2 for i in range(8)})
        points = evaluate(collector, starts, 4, metric="points")
    assert (result.value, result.n, result.episodes, result.failures) == (0.75, 4, 8, 2)
    assert result.figures["success"] == 0.75 and result.figures["reward"] == 2.0
    assert result.summary()["episodes"] == 8
    assert [s["failed"] for s in result.samples] == [True, False, False, False] * 2
    assert [s["problem"] for s in result.samples] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert (points.value, points.n, points.failures) == (3.0, 6, 2)


@pytest.mark.parametrize("metrics", ["accuracy", None, 3, {"x": None}, {"x": math.nan}, {"x": "a"}])
def test_figures_that_are_no_numbers_cost_only_themselves(metrics: Any) -> None:
    given = {"x": np.float32(2.0), "y": np.int64(3)}
    messages = [{"role": "assistant", "content": "c"}]
    infos = [episode_info(messages, "c", {"gold": {1}, "metrics": m}) for m in (given, metrics)]
    one, other = (
        sample(Trajectory([1, 2], [0, 1], [0.0] * 2, [0.0, 1.0], 0, 1, "stop", info))
        for info in infos
    )
    assert one["metrics"] == {"x": 2.0, "y": 3.0} and other["metrics"] == {}
    assert json.loads(json.dumps([one, other]))[0]["gold"] == "{1}"


def test_splits_by_seed_never_meet() -> None:
    seeds = {s: {start.seed for start in starts_of(s, 5000)} for s in ("validation", "test")}
    assert not seeds["validation"] & seeds["test"]
    assert min(map(min, seeds.values())) >= 2**31 and max(map(max, seeds.values())) < 2**32


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
    info = EpisodeInfo(messages, "b", success=True, metrics={"m": 1.0})
    kept = sample(Trajectory([1, 2], [0, 1], [0.0, 0.0], [0.0, 0.5], 7, 1, "stop", info))
    assert kept["completion"] == "assistant: a\ntool: t\nassistant: b"
    assert (kept["row"], kept["prompt"], kept["reward"], kept["success"]) == (7, "q", 0.5, True)
    one = EpisodeInfo(messages[:3], "a")
    assert sample(Trajectory([1, 2], [0, 1], [0.0, 0.0], [0.0, 0.5], 7, 1, "stop", one))[
        "completion"
    ] == "a"  # fmt: skip
