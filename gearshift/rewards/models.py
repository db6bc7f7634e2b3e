"""Reward models as reward functions: a conversation and its answer are one sequence, which gets a
score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat_template import TemplateOptions
from gearshift.data.reward_input import render_reward_input
from gearshift.errors import DataError, ModelError
from gearshift.models.classifier import context, reads_last_token
from gearshift.models.load import ModelConfig, load_classifier, load_tokenizer, writes_text
from gearshift.models.runner import EXACT, ModelRunner
from gearshift.models.vocabulary import check_vocabulary
from gearshift.rewards.functions import REWARD_MISSING, is_usable
from gearshift.types import Message


class ModelReward:
    """A reward model as a reward function."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        """Raises `ModelError` if the folder contains no classifier."""
        if writes_text(config, str(folder)):
            raise ModelError(
                f"{folder} holds a language model, which gives no scores; "
                "name a reward model's folder."
            )
        self.model = load_classifier(config, str(folder))
        self.tokenizer = load_tokenizer(config, str(folder), of_policy=False)
        check_vocabulary(self.model, self.tokenizer)
        self.runner = ModelRunner(self.model, undescribed=EXACT)

    def __call__(
        self,
        prompts: list[list[Message]],
        completions: list[str],
        *,
        token_ids: Sequence[list[int]] | None = None,
        ended: Sequence[bool] | None = None,
        policy: PreTrainedTokenizerBase | None = None,
        template_options: Sequence[TemplateOptions | None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """`token_ids` are the tokens of each conversation and its answer, as the `policy` read and
        wrote them; they are scored if the reward model's tokenizer has the same tokens, otherwise
        the texts are. `ended` says which answers came to their end. `template_options` are the
        tools and other arguments of the chat template. The score is `REWARD_MISSING` for a sequence
        that is longer than the model accepts, and for a conversation that its template refuses.
        """
        if token_ids is not None and policy is not None and same_tokens(policy, self.tokenizer):
            sequences = [self._read(ids) for ids in token_ids]
        else:
            ended = ended or [True] * len(prompts)
            options = template_options or [None] * len(prompts)
            samples = zip(prompts, completions, ended, options, strict=True)
            sequences = self._rendered(list(samples))
        limit = context(self.model)
        fits = [bool(s) and len(s) <= limit for s in sequences]
        fitting = [s for s, fit in zip(sequences, fits, strict=True) if fit]
        scores = iter(self.runner.score_all(fitting))
        return [next(scores) if fit else REWARD_MISSING for fit in fits]

    def _rendered(
        self, samples: Sequence[tuple[list[Message], str, bool, TemplateOptions | None]]
    ) -> list[list[int]]:
        """The token ids of these texts; an empty list where the template refuses a conversation.
        Raises the template's `DataError` if it refuses all of them.
        """
        sequences: list[list[int]] = []
        fault: DataError | None = None
        for prompt, completion, end, options in samples:
            # An encoder closes every text with a token, which says nothing about the answer's end.
            end = end or not reads_last_token(self.model)
            try:
                ids = render_reward_input(self.tokenizer, prompt, completion, end, options)
                sequences.append(self._read(ids))
            except DataError as error:
                fault = error
                sequences.append([])
        if fault and not any(sequences):
            raise fault
        return sequences

    def _read(self, ids: list[int]) -> list[int]:
        """The tokens up to the place where Hugging Face reads a decoder's score: the last token
        that is not the pad. A reward model from elsewhere may use its end token as pad.
        """
        pad = self.model.config.get_text_config().pad_token_id
        last = len(ids)
        while reads_last_token(self.model) and last > 1 and ids[last - 1] == pad:
            last -= 1
        return ids[:last]


@dataclass(frozen=True)
class Ensemble:
    """Several reward models as one function (Coste et al. 2023)."""

    members: Sequence[ModelReward]
    how: Literal["mean", "min", "mean_less_std"]

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], **given: Any
    ) -> list[float | None]:
        columns = [member(prompts, completions, **given) for member in self.members]
        return [
            self._joined([v for v in row if v is not None]) for row in zip(*columns, strict=True)
        ]

    def _joined(self, scores: list[float]) -> float | None:
        """None where no member applies, `REWARD_MISSING` where one has lost its score."""
        if not all(map(is_usable, scores)):
            return REWARD_MISSING
        if not scores or self.how == "min":
            return min(scores, default=None)
        spread = 1.0 if self.how == "mean_less_std" else 0.0
        return fmean(scores) - spread * pstdev(scores)


@lru_cache(16)
def same_tokens(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether the policy's tokens mean the same to the other model: they have the same ids, and the
    chat templates are equal. The other tokenizer may have more tokens, for example its own pad.
    """
    return (
        policy.get_vocab().items() <= other.get_vocab().items()
        and policy.chat_template == other.chat_template
        and (policy.bos_token, policy.eos_token) == (other.bos_token, other.eos_token)
    )
