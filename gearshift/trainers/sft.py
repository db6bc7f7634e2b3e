"""Supervised fine-tuning: maximise the log-probability of the assistant's answers.

loss = - sum over trained tokens of log p(token) / (trained tokens in the whole batch).
It differs from the textbook only in the packing: there is no padding, and the mean is over tokens,
not over rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from gearshift.algorithms.normalize import loss_weights
from gearshift.batch import PackedBatch, pack
from gearshift.data import (
    ChatExample,
    DataConfig,
    Mixture,
    TextExample,
    render_conversation,
    render_text,
)
from gearshift.data.chat import Rendered as Rendered
from gearshift.engine import Engine
from gearshift.errors import DataError
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.trainers.stage import Stage
from gearshift.trainers.supervised import SupervisedStageConfig, row_limits
from gearshift.trainers.update import optimizer_for, update


class SFTConfig(SupervisedStageConfig):
    """Step 1: supervised fine-tuning."""

    data: DataConfig = DataConfig()
    """Examples: `text`, `messages`, `prompt`/`completion`, ShareGPT or Alpaca rows."""
    epochs: float = Field(default=3.0, gt=0)
    """How often the stage passes over its rows."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5, schedule="linear")
    """AdamW and its schedule."""


def render_examples(
    examples: Sequence[ChatExample | TextExample], engine: Engine, max_length: int
) -> list[Rendered]:
    """(token ids, mask) of each example; several of one where the chat template writes an earlier
    answer otherwise than a policy does. Raises `DataError` for one that is too long, or has nothing
    to train on.
    """
    rendered: list[Rendered] = []
    for number, example in enumerate(examples, start=1):
        with row_limits(example, number, max_length, engine.max_length) as check_length:
            if isinstance(example, TextExample):
                some = [render_text(engine.tokenizer, example.text)]
            else:
                some = render_conversation(
                    engine.tokenizer, example.messages, example.options, example.untrained
                )
            check_length(max(len(ids) for ids, _ in some))
            if not all(any(mask) for _, mask in some):
                raise DataError("there are no assistant words to train on; add a reply or drop it.")
        rendered += some
    return rendered


def supervised_batch(examples: Sequence[Rendered]) -> PackedBatch:
    """The examples as one batch, each trained token with the same weight; the weights sum to 1."""
    batch = pack(examples)
    return batch.with_scored(loss_weights=loss_weights(batch.completion_lengths, "token_mean"))


def supervised_loss(engine: Engine, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted negative log-likelihood of a batch's trained tokens, and metrics."""
    scores = engine.logprobs(batch)
    weights_M = batch.scored("loss_weights")
    loss = -(weights_M * scores.logprobs).sum()
    return loss, {"entropy": (weights_M * scores.entropy).sum()}


def train_sft(config: SFTConfig, engine: Engine, examples: Mixture[Rendered], stage: Stage) -> None:
    """Train the engine's model in place on rendered examples."""
    optimizer = optimizer_for(
        engine.runner.trained_parameters(), config.optimizer, stage.total, engine.runner
    )
    stage.track(model=engine.runner.stateful, optimizer=optimizer, micro_batch=stage.micro_batch)

    def loss_of(batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised_loss(engine, batch)

    for step in stage.steps(on_resume=engine.weights_changed):
        batch = supervised_batch(config.batch(examples, step)).to(engine.device)
        with stage.phase("train"), engine.training(dropout=True):
            metrics = update(batch.split, stage.micro_batch, loss_of, optimizer)
        engine.weights_changed()
        stage.log(step, metrics, len(batch), engine.runner)
