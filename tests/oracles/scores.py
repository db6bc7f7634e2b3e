"""Log-probs the slow, obvious way: one sequence at a time through Hugging Face's own forward, no
batch, no cache.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def lone_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[A] log-prob of each completion token and [A] entropy of its distribution. `model` uses eager
    attention.
    """
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    log_p = torch.log_softmax(logits, -1)
    chosen = torch.stack([log_p[i, token] for i, token in enumerate(completion)])
    return chosen, -(log_p.exp() * log_p).sum(-1)
