"""The reward model: a score for a whole answer, learned from pairs of a better and a worse one.

loss = -log sigmoid(score(chosen) - score(rejected)), Bradley and Terry 1952, as in Ouyang et al.
2022; the mean is over the pairs of the whole batch. The backbone is any sequence classifier with
one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gearshift.algorithms.preference_losses import bradley_terry
from gearshift.batch import PackedBatch, chunks_by_tokens, for_ranks, pack_groups
from gearshift.data import DataConfig, Mixture, PreferenceExample
from gearshift.data.reward_input import render_reward_input
from gearshift.models.runner import EXACT, ModelRunner
from gearshift.runtime.config import PathText
from gearshift.runtime.distributed import world
from gearshift.trainers.needs import Inputs, MemoryNeeds, Tree
from gearshift.trainers.stage import Stage
from gearshift.trainers.supervised import HeldoutConfig, SupervisedStageConfig, row_limits
from gearshift.trainers.update import optimizer_for, update


class Pair(NamedTuple):
    """Token ids of prompt + chosen and of prompt + rejected, and the margin by which chosen should
    win.
    """

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    @property
    def sides(self) -> tuple[list[int], list[int]]:
        """Chosen, rejected."""
        return self.chosen, self.rejected


class RewardModelConfig(SupervisedStageConfig):
    """Step 2: the reward model."""

    data: DataConfig = DataConfig()
    """`prompt`/`chosen`/`rejected` rows; a `margin` (Touvron et al. 2023) where there is one."""
    heldout: HeldoutConfig = DataConfig()
    """Pairs that only measure accuracy."""
    model: PathText | None = None
    """The model that becomes the reward model, a decoder or an encoder: a folder or a name. null is
    the newest policy."""
    center: float = Field(default=0.0, ge=0)
    """The weight of the loss term (score(chosen) + score(rejected))^2, which keeps scores near
    zero."""

    sequences_in_row: ClassVar[int] = 2
    row_is: ClassVar[str] = "pair"

    def inputs(self) -> Inputs:
        models = (self.model,) if self.model else ()
        heldout = (self.heldout,)
        return replace(super().inputs(), heldout=heldout, models=models, labels="preference")

    def memory_needs(self) -> MemoryNeeds:
        half = -(-self.max_length // 2)
        return replace(super().memory_needs(), head="scores", tree=Tree(half, 2, half))


def render_pairs(
    examples: Sequence[PreferenceExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    context: int = 2**20,
) -> list[Pair]:
    """Token ids of both sides of each pair; raises `OverlongError` for one that is longer than
    `max_length`, or than the model's `context`.
    """
    pairs = []
    for number, example in enumerate(examples, start=1):
        sides = []
        with row_limits(example, number, max_length, context) as check_length:
            for answer in (example.chosen, example.rejected):
                sides.append(
                    render_reward_input(tokenizer, example.prompt, answer, options=example.options)
                )
            check_length(max(map(len, sides)))
        pairs.append(Pair(sides[0], sides[1], example.margin))
    return pairs


def micro_batches(
    runner: ModelRunner, pairs: Sequence[Pair], micro_batch_tokens: int, ranks: int = 1
) -> list[list[Pair]]:
    """The pairs in micro-batches of at most so many tokens, one pair at least; of padded tokens,
    where the runner pads. For several ranks there is a multiple of their number, or nearly so.
    """
    ordered = sorted(pairs, key=lambda p: max(map(len, p.sides)))
    if not runner.shares_prompts:
        lengths = [2 * max(map(len, pair.sides)) for pair in ordered]
        return [ordered[where] for where in chunks_by_tokens(lengths, micro_batch_tokens, ranks)]

    def cut(most: int) -> list[list[Pair]]:
        """Micro-batches of at most so many pairs."""
        micros: list[list[Pair]] = []
        held = 0
        for pair in ordered:
            size = len(pair.chosen) + len(pair.rejected) - _shared(pair)
            if not micros or held + size > micro_batch_tokens or len(micros[-1]) == most:
                micros.append([])
                held = 0
            micros[-1].append(pair)
            held += size
        return micros

    return for_ranks(cut, len(ordered), ranks)


def score_pairs(runner: ModelRunner, pairs: Sequence[Pair]) -> Tensor:
    """[2 * pairs] float32, with gradients: each pair's chosen score, then its rejected one. The
    common beginning of both sides is computed once if the runner can do so.
    """
    return runner.scores(_packed(pairs).to(runner.model.device))


def _shared(pair: Pair) -> int:
    """The number of tokens that both sides begin with, less than the length of the shorter side."""
    both = zip(pair.chosen, pair.rejected, strict=False)
    same = next((i for i, (a, b) in enumerate(both) if a != b), min(map(len, pair.sides)))
    return min(same, *(len(side) - 1 for side in pair.sides))


def _packed(pairs: Sequence[Pair]) -> PackedBatch:
    groups = []
    for pair in pairs:
        same = _shared(pair)
        ends = [(side[same:], [0] * (len(side) - same)) for side in pair.sides]
        groups.append((pair.chosen[:same], ends))
    return pack_groups(groups)


def train_reward_model(
    config: RewardModelConfig, runner: ModelRunner, pairs: Mixture[Pair], stage: Stage
) -> None:
    """Train the runner's classifier in place."""
    model = runner.model
    runner.train(True)
    optimizer = optimizer_for(runner.trained_parameters(), config.optimizer, stage.total, runner)
    stage.track(model=model, optimizer=optimizer, micro_batch=stage.micro_batch)

    for step in stage.steps():
        batch = config.batch(pairs, step)

        def loss_of(some: list[Pair], total: int = len(batch)) -> tuple[Tensor, dict[str, Tensor]]:
            scores = score_pairs(runner, some)
            chosen_P, rejected_P = scores[0::2], scores[1::2]
            share = len(some) / total
            margin_P = torch.tensor([pair.margin for pair in some], device=scores.device)
            loss = bradley_terry(chosen_P, rejected_P, margin_P, config.center).mean() * share
            right = (chosen_P > rejected_P).float().mean() * share
            return loss, {"accuracy": right, "margin": (chosen_P - rejected_P).mean() * share}

        with stage.phase("train"):
            cut = partial(micro_batches, runner, batch)
            metrics = update(cut, stage.micro_batch, loss_of, optimizer)
        runner.weights_changed()
        tokens = sum(len(side) for pair in batch for side in pair.sides)
        stage.log(step, metrics, tokens, runner)
    runner.train(False)


def pair_accuracy(runner: ModelRunner, pairs: Sequence[Pair]) -> float:
    """The fraction of pairs whose chosen side has the higher score, by Hugging Face's forward."""
    exact = ModelRunner(runner.model, undescribed=EXACT)

    def wins(some: Sequence[Pair]) -> list[bool]:
        scores = exact.score_all([side for pair in some for side in pair.sides])
        return [c > r for c, r in zip(scores[0::2], scores[1::2], strict=True)]

    return fmean(world().dealt(pairs, wins))
