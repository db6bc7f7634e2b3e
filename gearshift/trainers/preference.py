"""Preference learning without reinforcement learning: DPO, IPO, cDPO, KTO, ORPO, SimPO.

The policy learns from completions that were judged: pairs (a better and a worse answer to one
prompt) or single ones (good or bad, for KTO). A pair is a group, so its prompt is computed once;
the loss is a mean over the batch however it is cut into micro-batches. The reference is the policy
as it starts: its log-probs are computed once, before the first update, with no second copy of the
weights; or at each step from a copy.
Legend: N completions of the batch, P pairs, M their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from gearshift.algorithms.normalize import row_sums
from gearshift.algorithms.preference_losses import dpo, ipo, kto, orpo, simpo
from gearshift.batch import PackedBatch
from gearshift.data import DataConfig, Mixture
from gearshift.data.labels import Format
from gearshift.engine import Engine
from gearshift.models.adapters import adapters_off
from gearshift.models.runner import ModelRunner
from gearshift.runtime.config import Neutral
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.trainers.judged import Judged, judged_batch
from gearshift.trainers.needs import Inputs, MemoryNeeds, Tree
from gearshift.trainers.presets import PreferenceAlgorithm, preference_filled
from gearshift.trainers.stage import Stage
from gearshift.trainers.supervised import HeldoutConfig, SupervisedStageConfig
from gearshift.trainers.update import optimizer_for, update

NEEDS_REFERENCE = ("dpo", "ipo", "kto")
_OF_LOSS = {
    "label_smoothing": ("dpo",),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "supervised_weight": ("dpo", "ipo", "kto", "simpo"),
    "reference": NEEDS_REFERENCE,
}
"""Keys that only some losses read."""


class PreferenceConfig(SupervisedStageConfig):
    """Learning from judged completions, in place of the reward model and RL."""

    algorithm: Neutral[PreferenceAlgorithm | None] = Field(default=None, exclude=True)
    """A published method by name, which sets the other keys of this section; the same as the
    recipe's own `algorithm`."""
    data: DataConfig = DataConfig()
    """`prompt`/`chosen`/`rejected` rows; for `kto` also `prompt`/`completion`/`label`."""
    heldout: HeldoutConfig = DataConfig()
    """Pairs that only measure accuracy."""
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    """The preference loss; `docs/algorithms.md` has the formulas."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held at the reference: a larger value allows less change. For
    `orpo` it is the weight of the odds ratio."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """For `dpo`: the probability that a label is wrong (cDPO)."""
    margin: float = Field(default=0.0, ge=0)
    """For `simpo`: by how much the chosen completion's score should exceed the rejected one's."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """For `kto`: the weight of good completions."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """For `kto`: the weight of bad completions."""
    supervised_weight: float = Field(default=0.0, ge=0)
    """The weight of the chosen completion's mean token loss, which is added to the preference loss;
    for `orpo` it is 1 by definition."""
    reference: Literal["precompute", "each_step"] = "precompute"
    """When the reference's log-probabilities are computed. `precompute`: all of them before the
    first step, without a second copy of the weights. `each_step`: those of each update, which is
    cheaper if the stage uses few of its rows."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, schedule="linear")
    """AdamW and its schedule."""

    sequences_in_row: ClassVar[int] = 2

    @classmethod
    def filled(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree with what its `algorithm` stands for."""
        return preference_filled(tree)

    def describe(self) -> str:
        return f"{self.loss}, {super().describe()}"

    def inputs(self) -> Inputs:
        labels: Format = "judged" if self.loss == "kto" else "preference"
        return replace(super().inputs(), heldout=(self.heldout,), labels=labels)

    def memory_needs(self) -> MemoryNeeds:
        copied = self.reference == "each_step" and self.loss in NEEDS_REFERENCE
        half = -(-self.max_length // 2)
        tree = Tree(half, 2, half)
        return replace(super().memory_needs(), reference=copied, tree=tree, dropout=False)

    @field_validator(*_OF_LOSS)
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        wanted, loss = _OF_LOSS[name], info.data.get("loss")
        if value != cls.model_fields[name].default and loss is not None and loss not in wanted:
            raise ValueError(f"loss={loss} does not read it; leave it out, or take {wanted[0]}.")
        return value

    @model_validator(mode="after")
    def _enough_rows(self) -> Self:
        if self.loss == "kto" and self.batch_size == 1:
            raise ValueError("kto compares the rows of a batch; batch_size must be 2 or more.")
        return self


Micro = tuple[PackedBatch, Sequence[Judged]]


def train_preference(
    config: PreferenceConfig,
    engine: Engine,
    rows: Mixture[Judged],
    stage: Stage,
    reference: ModelRunner | None = None,
) -> None:
    """Train the engine's model in place on judged rows. Without a `reference` the policy as it
    starts is the reference, and its log-probs of all rows are computed before the first step; a
    `reference` is run at each step, and with adapters is the policy's own runner.
    """
    loss = PreferenceLoss(config, engine, reference, stage.micro_batch)
    optimizer = optimizer_for(
        engine.runner.trained_parameters(), config.optimizer, stage.total, engine.runner
    )
    stage.track(model=engine.runner.stateful, optimizer=optimizer, micro_batch=stage.micro_batch)
    if reference is None:
        loss.precompute(rows.rows())
    for step in stage.steps(on_resume=engine.weights_changed):
        batch = config.batch(rows, step)
        if config.loss in NEEDS_REFERENCE and reference is not None:
            loss.ask_reference(batch)
        with stage.phase("train"), engine.training():
            baseline = loss.kl(batch) if config.loss == "kto" else torch.zeros(())
            loss_of = partial(loss.loss_of, batch=batch, baseline=baseline)
            metrics = update(partial(loss.micros, batch), stage.micro_batch, loss_of, optimizer)
        engine.weights_changed()
        if config.loss == "kto":
            metrics["kl"] = float(baseline)
        stage.log(step, metrics, sum(map(len, batch)), engine.runner)


class PreferenceLoss:
    """The loss between a policy and its reference on judged rows."""

    def __init__(
        self,
        config: PreferenceConfig,
        engine: Engine,
        reference: ModelRunner | None = None,
        micro_batch: MicroBatchSize | None = None,
    ) -> None:
        """Without a `reference` the policy is its own: see `precompute`."""
        self.config, self.engine, self.reference = config, engine, reference
        size = MicroBatchSize(config.micro_batch_tokens, "preference.micro_batch_tokens")
        self.micro_batch = micro_batch or size

    def precompute(self, rows: Sequence[Judged]) -> None:
        """Store the reference's log-probs in all these rows, while the policy still is the
        reference.
        """
        if self.config.loss in NEEDS_REFERENCE:
            size = self.config.batch_size
            for first in range(0, len(rows), size):
                self.ask_reference(rows[first : first + size])

    @torch.no_grad()
    def ask_reference(self, rows: Sequence[Judged]) -> None:
        """Log-probs of the rows' completions under the reference, kept in the rows."""
        runner = self.reference or self.engine.runner

        def sums(micros: Sequence[Micro]) -> list[list[float]]:
            with self.engine.training(), torch.no_grad(), adapters_off(runner.model):
                return [
                    _sums(micro, runner.logprobs(micro).logprobs)[0].tolist() for micro, _ in micros
                ]

        values = chain.from_iterable(self.micro_batch.run(partial(self.micros, rows), sums))
        for row in rows:
            row.reference = [next(values) for _ in row.completions]
        if self.config.loss == "kto":
            found = self.micro_batch.run(partial(self.micros, rows, other=True), sums)
            values = chain.from_iterable(found)
            for row in rows:
                row.other_reference = next(values)

    def micros(
        self, rows: Sequence[Judged], tokens: int, ranks: int = 1, other: bool = False
    ) -> Iterator[Micro]:
        """Micro-batches of so many tokens with their rows: one tree each."""
        first = 0
        for micro in judged_batch(rows, other).to(self.engine.device).split(tokens, ranks):
            end = first + len(micro.prompt_groups())
            yield micro, rows[first:end]
            first = end

    @torch.no_grad()
    def kl(self, rows: Sequence[Judged]) -> Tensor:
        """KTO's z0: the mean log-ratio of completions that answer other prompts, at least 0."""

        def work(micros: Sequence[Micro]) -> list[Tensor]:
            with torch.no_grad():
                return [
                    self.engine.logprobs(micro).logprobs.sum()
                    - sum(row.other_reference for row in some)
                    for micro, some in micros
                ]

        found = self.micro_batch.run(partial(self.micros, rows, other=True), work)
        total = torch.stack([part.to(self.engine.device) for part in found]).sum()
        return (total / len(rows)).clamp(min=0.0)

    def loss_of(
        self, micro: Micro, batch: Sequence[Judged], baseline: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and metrics of one micro-batch, divided by the whole batch's counts, so that
        those of the micro-batches add up.
        """
        config = self.config
        packed, rows = micro
        scores = self.engine.logprobs(packed)
        device = scores.logprobs.device
        logprob_N, counts_N = _sums(packed, scores.logprobs)
        mean_N = logprob_N / counts_N
        good_N = torch.tensor([g for row in rows for g in row.good], device=device)
        if config.loss in NEEDS_REFERENCE:
            known = [value for row in rows for value in row.reference or ()]
            score_N = logprob_N - torch.tensor(known, device=device)
        else:
            score_N = mean_N
        if config.loss == "kto":
            weights = (config.beta, config.desirable_weight, config.undesirable_weight)
            losses = kto(score_N, good_N, baseline, *weights)
            right = ((score_N > baseline) == good_N).float()
        else:
            chosen_P, rejected_P = score_N[0::2], score_N[1::2]
            losses = self._pairs(chosen_P, rejected_P)
            right = (chosen_P > rejected_P).float()
        total = sum(len(row.completions) for row in batch) if config.loss == "kto" else len(batch)
        goods = max(1, sum(sum(row.good) for row in batch))
        bads = max(1, sum(len(row.good) - sum(row.good) for row in batch))
        loss = losses.sum() / total
        if weight := 1.0 if config.loss == "orpo" else config.supervised_weight:
            loss = loss - weight * mean_N[good_N].sum() / goods
        reward_N = config.beta * score_N.detach()
        chosen, rejected = reward_N[good_N].sum() / goods, reward_N[~good_N].sum() / bads
        return loss, {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right.sum() / total,
            "logps/chosen": logprob_N[good_N].sum() / goods,
            "logps/rejected": logprob_N[~good_N].sum() / bads,
        }

    def _pairs(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        config = self.config
        if config.loss == "dpo":
            return dpo(chosen_P, rejected_P, config.beta, config.label_smoothing)
        if config.loss == "ipo":
            return ipo(chosen_P, rejected_P, config.beta)
        if config.loss == "orpo":
            return orpo(chosen_P, rejected_P, config.beta)
        return simpo(chosen_P, rejected_P, config.beta, config.margin)

    @torch.no_grad()
    def accuracy(self, pairs: Sequence[Judged]) -> float:
        """The fraction of held-out pairs whose chosen side has the greater reward."""
        means = pairs[0].reference is None

        def work(micros: Sequence[Micro]) -> list[list[float]]:
            found = []
            with self.engine.training(), torch.no_grad():
                for micro, _ in micros:
                    sums, counts = _sums(micro, self.engine.logprobs(micro).logprobs)
                    found.append((sums / counts if means else sums).tolist())
            return found

        values = chain.from_iterable(self.micro_batch.run(partial(self.micros, pairs), work))
        wins = []
        for row in pairs:
            known = row.reference or [0.0, 0.0]
            chosen, rejected = (next(values) - value for value in known)
            wins.append(chosen > rejected)
        return fmean(wins)


def _sums(batch: PackedBatch, logprobs_M: Tensor) -> tuple[Tensor, Tensor]:
    """[N] log-prob of each completion, and its number of tokens."""
    counts_N = batch.completion_lengths[batch.completion_lengths > 0].to(logprobs_M.device)
    return row_sums(logprobs_M, counts_N), counts_N
