"""A process reward model: one logit at the end of each step of an answer says whether the step is
right.

loss = mean over steps of the binary cross-entropy (Lightman et al. 2023). Any backbone that
`AutoModelForTokenClassification` loads; in an encoder a step's logit sees what comes after it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import fmean
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gearshift.algorithms.preference_losses import step_loss
from gearshift.batch import chunks_by_tokens
from gearshift.data import DataConfig, Mixture, StepwiseExample
from gearshift.data.reward_input import encode_plain, names_special_token, render_literal_prompt
from gearshift.models.classifier import pack_unscored
from gearshift.models.runner import ModelRunner
from gearshift.runtime.config import PathText
from gearshift.runtime.distributed import world
from gearshift.trainers.needs import Inputs, MemoryNeeds
from gearshift.trainers.stage import Stage
from gearshift.trainers.supervised import HeldoutConfig, SupervisedStageConfig, row_limits
from gearshift.trainers.update import optimizer_for, update


class ProcessRewardConfig(SupervisedStageConfig):
    """A reward model of steps."""

    data: DataConfig = DataConfig()
    """`prompt`/`completions`/`labels` rows: the steps of an answer, and whether each is right."""
    heldout: HeldoutConfig = DataConfig()
    """Rows that only measure accuracy."""
    model: PathText | None = None
    """The model that becomes the reward model, a decoder or an encoder: a folder or a name. null is
    the newest policy."""
    separator: str = "\n"
    """The text after each step; its last token carries the step's logit."""

    row_is: ClassVar[str] = "answer"

    def inputs(self) -> Inputs:
        models = (self.model,) if self.model else ()
        return replace(super().inputs(), heldout=(self.heldout,), models=models)

    def memory_needs(self) -> MemoryNeeds:
        return replace(super().memory_needs(), head="token_logits")


class Steps(NamedTuple):
    """The tokens of prompt and answer, where each step ends, and whether it is right."""

    ids: list[int]
    ends: list[int]
    labels: list[bool]


def render_steps(
    examples: Sequence[StepwiseExample],
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    max_length: int,
    context: int = 2**20,
) -> list[Steps]:
    """Token ids of each row, made step by step. Raises `OverlongError` for a row that is longer
    than `max_length`, or than the model's `context`.
    """
    rows = []
    for number, example in enumerate(examples, start=1):
        with row_limits(example, number, max_length, context) as check_length:
            ids = render_literal_prompt(tokenizer, example.prompt, example.options)
            ends: list[int] = []
            for step in example.steps:
                ids = [*ids, *_step(tokenizer, step, separator)]
                ends.append(len(ids) - 1)
            check_length(len(ids))
        rows.append(Steps(ids, ends, example.labels))
    return rows


def _step(tokenizer: PreTrainedTokenizerBase, step: str, separator: str) -> list[int]:
    """The separator may be a special token, but a step's own text never becomes one."""
    if names_special_token(tokenizer, step):
        end = tokenizer.encode(separator, add_special_tokens=False)
        return [*encode_plain(tokenizer, step), *end]
    ids: list[int] = tokenizer.encode(step + separator, add_special_tokens=False)
    return ids


def train_process_reward_model(
    config: ProcessRewardConfig, runner: ModelRunner, rows: Mixture[Steps], stage: Stage
) -> None:
    """Train the runner's token classifier in place."""
    model = runner.model
    optimizer = optimizer_for(runner.trained_parameters(), config.optimizer, stage.total, runner)
    stage.track(model=model, optimizer=optimizer, micro_batch=stage.micro_batch)
    runner.train(True)
    for step in stage.steps():
        batch = sorted(config.batch(rows, step), key=lambda row: len(row.ids))
        total = sum(len(row.ends) for row in batch)

        def loss_of(some: Sequence[Steps], total: int = total) -> tuple[Tensor, dict[str, Tensor]]:
            logits_S, labels_S = step_logits(runner, some)
            loss = step_loss(logits_S, labels_S).sum() / total
            return loss, {"accuracy": ((logits_S > 0) == labels_S).sum() / total}

        with stage.phase("train"):
            cut = partial(micro_batches, batch)
            metrics = update(cut, stage.micro_batch, loss_of, optimizer)
        runner.weights_changed()
        stage.log(step, metrics, sum(len(row.ids) for row in batch), runner)
    runner.train(False)


def micro_batches(
    rows: Sequence[Steps], micro_batch_tokens: int, ranks: int = 1
) -> list[Sequence[Steps]]:
    """The rows in micro-batches of at most so many padded tokens, one row at least."""
    lengths = [len(row.ids) for row in rows]
    return [rows[where] for where in chunks_by_tokens(lengths, micro_batch_tokens, ranks)]


def step_logits(runner: ModelRunner, rows: Sequence[Steps]) -> tuple[Tensor, Tensor]:
    """[S] logits and labels of all steps of the rows, in order."""
    logits_T = runner.token_logits(pack_unscored([row.ids for row in rows]))
    ends, start = [], 0
    for row in rows:
        ends += [start + end for end in row.ends]
        start += len(row.ids)
    labels = torch.tensor([label for row in rows for label in row.labels], device=logits_T.device)
    return logits_T[ends], labels


@torch.no_grad()
def step_accuracy(runner: ModelRunner, rows: Sequence[Steps], at_once: int = 8) -> float:
    """The fraction of steps that the model judges correctly."""

    def judged(some: Sequence[Sequence[Steps]]) -> list[list[bool]]:
        found = (step_logits(runner, part) for part in some)
        return [((logits_S > 0) == labels_S).tolist() for logits_S, labels_S in found]

    parts = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
    return fmean(chain.from_iterable(world().dealt(parts, judged)))
