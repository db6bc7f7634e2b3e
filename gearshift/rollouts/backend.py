"""The interface between rollouts and a program that samples completions. The engine is one such
program; this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gearshift.types import Completion, SamplingParams


class GenerationBackend(Protocol):
    """Samples completions with one model, many at a time."""

    @property
    def exact(self) -> bool:
        """Whether `Completion.logprobs` equal those that training computes, except for rounding. If
        they do not, the loss can correct the difference by importance weights.
        """

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        """One completion of a prompt. `params.n` is not read; `sample` numbers the completions of
        one prompt and request id.

        What is sampled is a function of the seed, the request id and the sample, and of the weights
        and the prompt. Cancelling the call ends the request. Raises `CapacityError` for a prompt
        that leaves no room for `params.max_new_tokens` more.
        """

    async def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """Take the weights of a saved model's folder, or tensors by their parameters' names, and
        give what they sample this version. No request may run meanwhile.
        """

    def generating(self) -> AbstractContextManager[Any]:
        """The context in which requests run, with the newest weights. All ranks enter it."""

    def stats(self) -> dict[str, float]:
        """The figures of the work since the last call, by name."""
