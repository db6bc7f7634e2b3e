"""The loss of reinforcement learning: policy, KL to the reference, values, labelled examples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gearshift.algorithms.kl import KL_ESTIMATORS, with_ratio
from gearshift.algorithms.policy_losses import (
    POLICY_LOSSES,
    importance_weights,
    sampler_kl,
    value_loss,
)
from gearshift.batch import PackedBatch
from gearshift.trainers.rl.config import KLConfig, RLConfig
from gearshift.trainers.rl.experience import Models
from gearshift.trainers.sft import supervised_loss

Metrics = dict[str, Tensor]
OnScores = Callable[[PackedBatch, Tensor], None]
"""A function that gets a micro-batch and its [M] log-probs."""


def rl_loss(
    batch: PackedBatch,
    config: RLConfig,
    models: Models,
    beta: float,
    computed: float,
    on_scores: OnScores = lambda batch, logprobs_M: None,
) -> tuple[Tensor, Metrics]:
    """Policy loss + beta * KL (where it is in the loss) + coefficient * value loss, of one
    micro-batch; or the weighted loss of one of labelled examples.

    Metrics are means over what is computed, which has `computed` of the loss's weights. `on_scores`
    gets the policy's log-probs.
    """
    if batch.advantages is None:
        assert config.sft_mix is not None
        loss, _ = supervised_loss(models.engine, batch)
        return config.sft_mix.weight * loss, {"sft_mix/loss": loss}
    weights_M = batch.scored("loss_weights")
    lengths_N = batch.completion_lengths
    lengths_N = lengths_N[lengths_N > 0].to(weights_M.device)
    scores = models.scores(batch, config.rollout.temperature)
    logprobs_M = scores.logprobs
    on_scores(batch, logprobs_M)
    old_M = logprobs_M.detach() if batch.old_logprobs is None else batch.scored("old_logprobs")
    policy = POLICY_LOSSES[config.loss.name](
        logprobs_M, old_M, batch.scored("advantages"), lengths_N, **config.loss.parameters()
    )
    sampler_M = batch.scored("sampler_logprobs")
    loss_M, metrics = (
        policy.loss_M,
        {
            **policy.metrics,
            "entropy": scores.entropy,
            "sampling/sampling_logp_difference/mean": (old_M - sampler_M).abs(),
            "sampling/kl": sampler_kl(old_M, sampler_M),
        },
    )
    if config.importance:
        importance_M = importance_weights(
            old_M, sampler_M, lengths_N, config.importance.mode, config.importance.cap
        )
        loss_M = loss_M * importance_M
        metrics["sampling/importance_sampling_ratio/mean"] = importance_M
    if config.kl.beta > 0:
        ref_M = batch.scored("ref_logprobs")
        metrics["kl"] = KL_ESTIMATORS["k3"](logprobs_M, ref_M)
        if config.kl.where == "loss":
            loss_M = loss_M + beta * kl_loss(logprobs_M, ref_M, old_M, config.kl)
    if scores.values is not None and config.value:
        returns_M, old_values_M = batch.scored("returns"), batch.scored("old_values")
        error_M = value_loss(scores.values, returns_M, old_values_M, config.value.clip)
        loss_M = loss_M + config.value.coefficient * error_M
        metrics["value/loss"] = error_M
    share_M = weights_M / computed
    return (weights_M * loss_M).sum(), {k: (share_M * v).sum() for k, v in metrics.items()}


def kl_loss(logprobs_M: Tensor, ref_M: Tensor, old_M: Tensor, config: KLConfig) -> Tensor:
    """[M]: the KL to the reference in the form that the loss uses."""
    kl_M = KL_ESTIMATORS[config.estimator](logprobs_M, ref_M)
    return with_ratio(kl_M, logprobs_M, old_M) if config.ratio else kl_M
