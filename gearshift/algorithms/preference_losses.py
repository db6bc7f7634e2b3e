"""Losses of preferences, elementwise. Tensors only.

Legend: P pairs, N completions, S steps. A *log-ratio* is log p(completion) under the policy less
the same under the reference, summed over the completion's tokens, in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, margin: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """[P] -log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2.

    Bradley and Terry 1952, as in Ouyang et al. 2022; the margin as in Touvron et al. 2023; the last
    term keeps scores around zero (Eisenstein et al. 2023).
    """
    difference_P = chosen_P - rejected_P
    if margin is not None:
        difference_P = difference_P - margin
    return -F.logsigmoid(difference_P) + center * (chosen_P + rejected_P) ** 2


def dpo(chosen_P: Tensor, rejected_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[P] -log sigmoid(beta * (chosen - rejected)) of log-ratios (Rafailov et al. 2023).

    `label_smoothing` e is the chance that a label is wrong: (1 - e) times that, plus e times the
    same with the sides changed (conservative DPO, Mitchell 2023).
    """
    logits_P = beta * (chosen_P - rejected_P)
    right_P, wrong_P = -F.logsigmoid(logits_P), -F.logsigmoid(-logits_P)
    return (1.0 - label_smoothing) * right_P + label_smoothing * wrong_P


def ipo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """[P] (chosen - rejected - 1 / (2 beta))^2 of log-ratios (Azar et al. 2023): a margin to reach,
    not one to grow for ever.
    """
    return (chosen_P - rejected_P - 0.5 / beta) ** 2


def kto(
    ratio_N: Tensor,
    desirable_N: Tensor,
    baseline: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[N] weight * (1 - sigmoid(+-beta * (log-ratio - baseline))), + where the completion is
    desirable (bool), - where not (Ethayarajh et al. 2024).

    `baseline`, a constant scalar, is the batch's estimate of KL(policy, reference), at least 0.
    """
    distance_N = beta * (ratio_N - baseline.detach())
    signed_N = torch.where(desirable_N, distance_N, -distance_N)
    weight_N = torch.where(desirable_N, desirable_weight, undesirable_weight)
    return weight_N * (1.0 - torch.sigmoid(signed_N))


def orpo(chosen_P: Tensor, rejected_P: Tensor, weight: float) -> Tensor:
    """[P] -weight * log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), where
    log p is the mean log-prob of a completion's tokens (Hong et al. 2024). The caller adds the
    chosen's negative log-likelihood, which the method needs.
    """
    return -weight * F.logsigmoid(_log_odds(chosen_P) - _log_odds(rejected_P))


def simpo(chosen_P: Tensor, rejected_P: Tensor, beta: float, margin: float) -> Tensor:
    """[P] -log sigmoid(beta * (chosen - rejected) - margin) of mean log-probs of a completion's
    tokens; no reference (Meng et al. 2024).
    """
    return -F.logsigmoid(beta * (chosen_P - rejected_P) - margin)


def step_loss(logits_S: Tensor, labels_S: Tensor) -> Tensor:
    """[S] binary cross-entropy of each step's logit and whether the step is right (bool): a process
    reward model (Lightman et al. 2023).
    """
    return F.binary_cross_entropy_with_logits(logits_S, labels_S.float(), reduction="none")


def _log_odds(logprob: Tensor) -> Tensor:
    """log p - log(1 - p), safe where p is nearly 1 or nearly 0."""
    logprob = logprob.clamp(max=-1e-7)
    return logprob - torch.log(-torch.expm1(logprob))
