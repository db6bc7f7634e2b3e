"""The reinforcement-learning loop: sample prompts, collect, score, advantages, update.

With the defaults this is REINFORCE with a learned baseline (advantage = reward - value), a penalty
on the KL to the reference, and one update a rollout. Every other method is another name in the
config: an advantage function that gives each token its weight, and a loss that consumes the
weights. The loop does not know which. How it differs from the textbook: the gradient is normalised
over the whole rollout however it is cut into micro-batches; a group's prompt is computed once;
dropout is off, so that the first ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from gearshift.algorithms.advantages import NEEDS_GREEDY
from gearshift.algorithms.kl import adaptive_beta
from gearshift.algorithms.normalize import loss_weights
from gearshift.batch import PackedBatch
from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.engine.stats import measure_if_it_fits
from gearshift.models.heads import ValueHead
from gearshift.models.runner import ModelRunner
from gearshift.rollouts.collector import Collector
from gearshift.runtime.seeding import generator
from gearshift.trainers.ema import MovingAverage
from gearshift.trainers.left_out import LeftOut
from gearshift.trainers.rl.batching import describe_generation, minibatches, pack_trajectories
from gearshift.trainers.rl.collect import RewardModel, RolloutSampler
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.critic import Critic
from gearshift.trainers.rl.experience import AdaptiveState, ExperienceMaker, Models
from gearshift.trainers.rl.loss import rl_loss
from gearshift.trainers.rl.methods import ValueNet
from gearshift.trainers.rl.records import RolloutRecord
from gearshift.trainers.sft import Rendered, supervised_batch
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import optimizer_for, update
from gearshift.types import Trajectory


@dataclass(frozen=True, slots=True)
class RLData:
    """The sources of prompts and rewards for reinforcement learning."""

    collector: Collector
    """Plays episodes of the policy in the task's environment."""
    rows: Sequence[int] | None
    """The rows to draw prompts from; None where each episode is drawn by its seed."""
    score: RewardModel
    """Gives episodes their rewards."""
    examples: Mixture[Rendered] | None = None
    """Labelled examples that are mixed into the updates."""


def train_rl(
    config: RLConfig,
    engine: Engine,
    data: RLData,
    stage: Stage,
    reference: ModelRunner | None = None,
    critic: Critic | None = None,
) -> RLTrainer:
    """Train the engine's model in place. Returns the trainer, which holds the moving average and
    what was left out.
    """
    trainer = RLTrainer(
        config,
        engine,
        data.collector,
        data.rows,
        data.score,
        stage,
        reference,
        critic,
        data.examples,
    )
    trainer.train()
    return trainer


class RLTrainer:
    """Holds the state between steps; `train` is the loop."""

    def __init__(
        self,
        config: RLConfig,
        engine: Engine,
        collector: Collector,
        rows: Sequence[int] | None,
        score: RewardModel,
        stage: Stage,
        reference: ModelRunner | None = None,
        critic: Critic | None = None,
        examples: Mixture[Rendered] | None = None,
    ) -> None:
        """`rows`: those that the environment draws from, or None where each episode is drawn by
        its seed. `reference` is needed where `kl.beta` > 0; `critic` where `value.kind` is
        `critic`; `examples` are mixed into the updates.
        """
        self.config, self.engine, self.stage, self.examples = config, engine, stage, examples
        self.state, self.left_out = AdaptiveState(config.kl.beta), LeftOut()
        self.models = Models(engine, reference)
        updates = config.updates
        if config.value:  # the policy does not learn in the value net's warm-up
            updates -= min(config.value.warmup, config.steps) * config.updates_a_step
        trained = engine.runner.trained_parameters()
        self.optimizers = [optimizer_for(trained, config.update.optimizer, updates, engine.runner)]
        stage.track(model=engine.runner.stateful, optimizer=self.optimizers[0], adaptive=self.state)
        stage.track(rewards=score, left_out=self.left_out)
        stage.track(micro_batch=stage.micro_batch)
        if config.value:
            self._add_value_net(config.value, critic)
        ema = config.update.ema
        self.average = MovingAverage(engine.runner.kept, ema) if ema else None
        if self.average:
            stage.track(average=self.average)
        self.sampler = RolloutSampler(
            config, engine, collector, rows, score, stage, self.optimizers, self.left_out
        )
        self.make_experience = ExperienceMaker(config, self.models, self.state, stage.micro_batch)

    def _add_value_net(self, config: ValueNet, critic: Critic | None) -> None:
        if config.kind == "critic":
            if critic is None:
                raise ValueError("value.kind=critic needs a critic.")
            self.models.critic = critic
            parameters = critic.parameters()
            self.stage.track(**critic.modules)
        else:
            head = ValueHead(self.engine.head.linear.in_features).to(self.engine.device)
            self.models.head = head
            self.stage.track(value_head=head)
            parameters = list(head.parameters())
        runner = critic.runner if critic else None
        self.optimizers.append(
            optimizer_for(parameters, config.optimizer, self.config.updates, runner)
        )
        self.stage.track(value_optimizer=self.optimizers[1])

    def train(self) -> None:
        """Sample prompts, collect, score, advantages, update; until the stage's last step."""
        # It takes seconds, in no step's time.
        measure_if_it_fits(self.engine.device, self.engine.model.dtype)
        for step in self.stage.steps(on_resume=self.engine.weights_changed):
            sampled, metrics = self.sampler.rollout(step)
            tokens = 0
            with self.recording(step) as record:
                trajectories, greedy = self.with_greedy(step, sampled)
                if trajectories:
                    batch = self.packed(trajectories)
                    tokens, written = len(batch), batch.loss_mask
                    with self.stage.phase("score"):
                        batch, scored = self.make_experience(batch, trajectories, greedy)
                    with self.stage.phase("train"):
                        metrics |= scored | self.update(record.with_places(batch), step)
                    record.add_figures(trajectories, batch, written)
            self.left_out.rollout(self.config.rollout.prompts, tokens)
            metrics |= self.left_out.metrics() | describe_generation(self.sampler.collector.backend)
            metrics |= self.adapt(metrics, len(sampled))
            self.stage.log(step, metrics, tokens, *self.models.trained)
            if self.left_out.hopeless:
                if self.left_out.learned:  # these rollouts changed no weight, and are run again
                    self.stage.save(step + 1 - self.left_out.barren)
                self.stage.forget()
                raise self.left_out.error()
        if not self.left_out.learned:
            self.stage.forget()
            raise self.left_out.error()

    @contextmanager
    def recording(self, step: int) -> Iterator[RolloutRecord]:
        """The record of the step's rollout, which is written when this context ends, also after an
        error: the episodes may be its cause.
        """
        record = self.sampler.record
        try:
            yield record
        finally:
            self.stage.rollouts.append(step, record.line())

    def with_greedy(
        self, step: int, trajectories: list[Trajectory]
    ) -> tuple[list[Trajectory], dict[int, float] | None]:
        """The return of each group's greedy completion, where the advantage reads it; and the
        trajectories without the groups that have none.
        """
        if self.config.advantage.name not in NEEDS_GREEDY or not trajectories:
            return trajectories, None
        record = self.sampler.record
        greedy = self.sampler.greedy(step, {t.group_id for t in trajectories})
        known = [t for t in trajectories if t.group_id in greedy]
        self.left_out.add("no_greedy", len(trajectories) - len(known))
        record.keep(known, "no_greedy")
        return known, greedy

    def packed(self, trajectories: list[Trajectory]) -> PackedBatch:
        """The trajectories as one batch on the policy's device."""
        return pack_trajectories(trajectories).to(self.engine.device)

    def update(self, batch: PackedBatch, step: int) -> dict[str, float]:
        """All updates of one rollout; metrics are means over them."""
        config, aggregation = self.config.update, self.config.loss.aggregation
        longest = self.config.rollout.max_new_tokens
        warming = self.config.value is not None and step < self.config.value.warmup
        learning = self.optimizers[1:] if warming else self.optimizers
        history: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            for mini in minibatches(
                batch, config.minibatches, generator(self.stage.seed, f"mini/{step}/{epoch}")
            ):
                if not bool(mini.loss_mask.any()):  # all were cut, and cut ones are masked
                    continue
                nth = step * self.config.updates_a_step + len(history)
                counts = mini.completion_lengths[mini.completion_lengths > 0]
                weights = loss_weights(counts, aggregation, longest)
                mini = mini.with_scored(loss_weights=weights.to(batch.input_ids.device))
                if self.only_advantages_count:
                    assert mini.advantages is not None
                    mini = mini.select_sequences(mini.advantages != 0)
                with self.engine.training():
                    computed = float(mini.scored("loss_weights").sum())
                    loss_of = partial(
                        rl_loss,
                        config=self.config,
                        models=self.models,
                        beta=self.state.beta,
                        computed=computed,
                        on_scores=self.sampler.record.add_scores,
                    )
                    cut = partial(self.micro_batches, mini, self.supervised(nth))
                    history.append(update(cut, self.stage.micro_batch, loss_of, *learning))
                if warming:
                    self.optimizers[0].drop_gradients()
                self.engine.weights_changed()
                if critic := self.models.critic:
                    critic.runner.weights_changed()
                if self.average:
                    self.average.update()
        return {name: fmean(h[name] for h in history) for name in (history[:1] or [{}])[0]}

    def adapt(self, metrics: dict[str, float], completions: int) -> dict[str, float]:
        """Change beta so that the KL comes closer to its target."""
        kl = self.config.kl
        if kl.target is None or "kl" not in metrics:
            return {}
        used = self.state.beta
        nats = metrics["kl"] * metrics["completions/mean_length"]
        self.state.beta = adaptive_beta(used, nats, kl.target, kl.horizon, completions)
        return {"kl/beta": used}

    def supervised(self, nth: int) -> PackedBatch | None:
        """The labelled examples beside the `nth` update."""
        if self.examples is None or self.config.sft_mix is None:
            return None
        rows = self.examples.batch(nth, self.config.sft_mix.batch_size)
        return supervised_batch(rows).to(self.engine.device)

    @staticmethod
    def micro_batches(
        mini: PackedBatch, supervised: PackedBatch | None, tokens: int, ranks: int = 1
    ) -> list[PackedBatch]:
        """The micro-batches of an update: those of the rollout, then those of its examples."""
        examples = supervised.split(tokens, ranks) if supervised else ()
        return [*mini.split_groups(tokens, ranks), *examples]

    @property
    def only_advantages_count(self) -> bool:
        """Whether a completion whose advantage is 0 has no gradient and need not be computed.

        Its weight in the mean stays, so the gradient is the same and takes less time.
        """
        kl = self.config.kl
        return not self.config.value and (kl.beta == 0 or kl.where == "reward")
