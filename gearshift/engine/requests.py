"""What the scheduler runs: one completion on its way, and when it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gearshift.types import Completion, FinishReason, SamplingParams

Decode = Callable[[list[int]], str]


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion, waiting, live or ended."""

    prompt: list[int]
    params: SamplingParams
    request_id: int
    sample_index: int
    seed: int
    end_tokens: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    uniforms: list[float] = field(default_factory=list)
    """Of its first tokens, one each; drawn ahead, some at a time."""
    blocks: list[int] = field(default_factory=list)
    """Its part of the cache while it is live."""

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def tokens(self) -> list[int]:
        """Prompt and completion so far."""
        return self.prompt + self.token_ids

    def append(self, token: int, logprob: float, drawn_logprob: float, decode: Decode) -> None:
        """One more token, and whether it is the last."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.drawn_logprobs.append(drawn_logprob)
        if token in self.end_tokens or self._says_stop(decode):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def completion(self, weights_version: int) -> Completion:
        """What is handed out; a sequence that has not ended was aborted."""
        return Completion(
            self.token_ids,
            self.logprobs,
            self.drawn_logprobs,
            self.finish_reason or "abort",
            weights_version,
        )

    def _says_stop(self, decode: Decode) -> bool:
        if not self.params.stop:
            return False
        text = decode(self.token_ids)
        return any(stop in text for stop in self.params.stop)
