"""Changes of rewards before they become advantages. Tensors only."""

from __future__ import annotations

from torch import Tensor


def token_rewards(rewards_M: Tensor, kl_M: Tensor, beta: float) -> Tensor:
    """r_t - beta * KL_t: the KL as a cost of each token (Ziegler et al. 2019; Ouyang et al. 2022).
    [M].
    """
    return rewards_M - beta * kl_M


def clip_rewards(rewards_M: Tensor, limit: float) -> Tensor:
    """Each reward kept within [-limit, limit], before the KL is subtracted: DeepSpeed-Chat's guard
    against a reward model's outliers. [M].
    """
    return rewards_M.clamp(-limit, limit)


def overlong_penalty(lengths_N: Tensor, longest: int, buffer: int) -> Tensor:
    """[N] 0 up to `longest - buffer` tokens, then down in a line to -1 at `longest` (the soft
    overlong punishment of DAPO, Yu et al. 2025).
    """
    return -((lengths_N - (longest - buffer)) / buffer).clamp(0.0, 1.0)
