"""Estimators of KL(policy, reference) in nats from the log-probs of tokens that the policy sampled.

Tensors only; elementwise, any shape. See Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q. Unbiased, large variance, negative at times. The choice for the reward.

    In the loss it is useless: its expected gradient is that of E[log p], which is 0.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2. Biased as a value, small variance; on-policy its gradient in the loss
    is exactly that of the reverse KL.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p). Unbiased, small variance, never negative. The choice for a figure to
    watch.

    In the loss its on-policy gradient is that of the forward KL(reference, policy), not of the
    reverse one.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the name that a recipe gives."""
