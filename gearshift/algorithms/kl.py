"""Estimators of KL(policy, reference) in nats from the log-probs of tokens that the policy sampled.

Tensors only; elementwise, any shape. See Schulman, "Approximating KL divergence", 2020. p is the
policy, q the reference. What an estimator's gradient is, when it stands in the loss, is another
question than what its value is: each docstring says both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q. Unbiased, large variance, negative at times. The choice for the reward.

    In the loss it is useless: on-policy its expected gradient, E[grad log p], is 0. Off-policy it
    is not, but then it pulls towards the sampler, whatever the reference.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2. Biased as a value, small variance; on-policy its gradient in the loss
    is exactly that of the reverse KL, KL(policy, reference). Off-policy it is biased.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p). Unbiased, small variance, never negative. The choice for a figure to
    watch.

    In the loss its on-policy gradient is that of the forward KL(reference, policy), not of the
    reverse one; off-policy it is biased for both (see `with_ratio`).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def with_ratio(kl: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """(p / p_old) * KL, p_old being the policy that sampled (DeepSeek-V3.2, 2025).

    With k1 or k3 both the expected value and the expected gradient in the loss are those of
    KL(policy, reference), however far p has moved from p_old: the sum over tokens of
    p_old * (p / p_old) * k is E_p[k], and the gradient passes through the ratio too.
    """
    return torch.exp(logprobs - old_logprobs.detach()) * kl


def adaptive_beta(beta: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon) (Ziegler et al. 2019).

    `kl` and `target` in nats a completion; `samples`: completions since the last call.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * samples / horizon)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the name that a recipe gives."""
