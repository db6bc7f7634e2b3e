"""Several ranks make what one makes: the same rollouts, and the same weights and metrics up to the
order in which fp32 numbers are added.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scale.checks import CALLS, CHECKS
from tests.scale.outcome import Outcome, distance

NEAR = {"sft-in-bf16": 1e-2}
"""How near weights must be where that is not 1e-6."""
NAMES = [name for name in (*CHECKS, *CALLS) if name != "streams"]
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
Read = Callable[[int, str, str], Outcome]


@pytest.fixture(scope="session")
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """(ranks, check, which of its trainings) to what came of it. One program does the checks of all
    tests that are to run.
    """
    given = [getattr(item, "callspec", None) for item in request.session.items]
    params = [spec.params for spec in given if spec and {"name", "ranks"} <= spec.params.keys()]

    @cache
    def checked(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        names = {
            p["name"] for p in params if p["ranks"] == ranks and p["name"] in (*CHECKS, *CALLS)
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={ranks}", "-m", "tests.scale.program", str(folder), *sorted(names)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _, said = process.communicate(timeout=1800)
        finally:
            process.terminate()  # torchrun then ends the ranks
            process.wait()
        assert process.returncode == 0, said[-4000:]
        return folder

    def read(ranks: int, check: str, which: str) -> Outcome:
        return Outcome(**torch.load(checked(ranks) / check / f"{which}.pt", weights_only=False))

    return read


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_change_nothing(read: Read, ranks: int, name: str) -> None:
    one, several = read(ranks, name, "one"), read(ranks, name, "all")
    assert one.error == several.error == ""
    assert distance(one.weights, several.weights) <= NEAR.get(name, 1e-6)
    # In bf16 a micro-batch's gradient is rounded, so other micro-batches are near only.
    assert distance(one.metrics, several.metrics) <= NEAR.get(name, 1e-6)
    assert _tokens(one) == _tokens(several)
    by_model = (
        name == "reward-model-as-the-reward"
    )  # it scores padded batches, so the last digits differ
    exact = [_without_figures(outcome) for outcome in (one, several)]
    assert distance(*exact) <= (1e-6 if by_model else 0.0)
    # These are rounded to 1e-4, and a value between two of them falls to either.
    assert distance(one.episodes, several.episodes) <= max(2e-4, NEAR.get(name, 0.0))
    for outcome in (one, several):  # more ranks begin with smaller micro-batches
        outcome.records.pop("tokens", None)
    assert distance(one.records, several.records) <= 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CHECKS)
def test_the_same_ranks_make_the_same_bits(read: Read, ranks: int, name: str) -> None:
    first, again = read(ranks, name, "all"), read(ranks, name, "again")
    assert len(set(first.digests)) == 1, "the ranks' weights differ"
    assert first.digests == again.digests
    assert (first.metrics, first.episodes) == (again.metrics, again.episodes)
    assert first.records == again.records


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["sft", "gae"])
def test_speeds_are_those_of_all_ranks(read: Read, ranks: int, name: str) -> None:
    one, several = read(ranks, name, "one"), read(ranks, name, "all")
    for alone, together in zip(one.speeds, several.speeds, strict=True):
        assert _trained(together) >= _trained(alone) > 0  # a prompt that is cut counts twice
    if name == "sft":
        assert [m["num_tokens"] for m in one.metrics] == [*map(_trained, several.speeds)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["streams"])
def test_each_rank_has_random_numbers_of_its_own(read: Read, ranks: int, name: str) -> None:
    one, several = read(ranks, name, "one"), read(ranks, name, "all")
    drawn = several.records["drawn"]
    assert [step[0] for step in drawn] == [step[0] for step in one.records["drawn"]]
    assert all(len(set(step)) == ranks for step in drawn)


HAPPENS: dict[str, Callable[[Outcome], bool]] = {
    "sft": lambda it: all(step["grad_norm"] > 0.1 for step in it.metrics),
    "kto": lambda it: all(step["grad_norm"] > 0.1 for step in it.metrics),
    "lost-episodes": lambda it: it.metrics[-1]["environment/failures"] > 0,
    "lost-rewards": lambda it: it.metrics[-1]["left_out/no_reward"] > 0,
    "dynamic-sampling": lambda it: it.metrics[0]["sampling/rollouts"] > 1,
    "equal-rewards": lambda it: it.metrics[0]["frac_reward_zero_std"] == 1,
    "masked-answers": lambda it: 0 < it.metrics[0]["completions/clipped_ratio"] < 1,
    "memory-of-one-rank": lambda it: it.records["tokens"] == 12,
    "memory-of-one-rank-in-rl": lambda it: it.records["tokens"] == 32,
    "a-loss-that-is-not-finite": lambda it: "nan" in it.records["error"],
    "a-function-that-raises": lambda it: "it never works" in it.records["error"],
}
"""What the checks are about."""


@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("name", HAPPENS)
def test_a_check_has_what_it_is_about(read: Read, ranks: int, name: str) -> None:
    assert HAPPENS[name](read(ranks, name, "one"))


def _without_figures(outcome: Outcome) -> list[Any]:
    """The episodes without the figures that a model computes for each token."""
    computed = ("logprobs", "trained_logprobs", "ref_logprobs", "advantages")
    return [
        [{k: v for k, v in e.items() if k not in computed} for e in step]
        for step in outcome.episodes
    ]


def _tokens(outcome: Outcome) -> list[Any]:
    return [[(e["group_id"], e["token_ids"]) for e in step] for step in outcome.episodes]


def _trained(speeds: dict[str, Any]) -> int:
    """How many tokens a step trained on."""
    return round(speeds["speed/tokens_per_second"] * speeds["seconds/train"])
