"""One episode: the policy and an environment answer in turn, and their tokens become a trajectory.

Token in, token out: what was sampled is never decoded and encoded again; text is made for the
environment only. Knows no engine, no trainer and no other episode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import render_prompt, render_turn
from gearshift.data.text import decode
from gearshift.environments.base import TextEnvironment
from gearshift.errors import CapacityError
from gearshift.rewards.functions import is_usable, to_reward
from gearshift.rewards.http_client import short_repr
from gearshift.rollouts.backend import GenerationBackend
from gearshift.rollouts.environment_pool import EnvironmentPool, EpisodeError
from gearshift.runtime.user_functions import describe_error
from gearshift.types import (
    Completion,
    EpisodeInfo,
    FinishReason,
    Message,
    SamplingParams,
    Trajectory,
)

Rewarded = Literal["needed", "finite", "any"]
"""Which rewards an environment must give; otherwise its episode fails. The choices: at least one,
and each finite; each finite; any, because they do not count.
"""


async def begin_episode(
    environment: TextEnvironment,
    spec: EpisodeSpec,
    sample: int,
    chat: ChatTokens,
    rewarded: Rewarded,
    pool: EnvironmentPool,
) -> Episode:
    """An episode whose environment has given its prompt. Raises `EpisodeError` if it does not."""
    options = {} if spec.row is None else {"row": spec.row}
    reset = partial(environment.reset, seed=spec.seed, options=options)
    answer = await pool.call(environment, reset)
    episode = Episode(environment, spec, sample, chat, rewarded)
    episode.append_prompt(answer)
    return episode


async def run_episode(
    episode: Episode, backend: GenerationBackend, params: SamplingParams, pool: EnvironmentPool
) -> Trajectory:
    """Let the policy and the environment answer in turn until the episode is over.

    Raises `EpisodeError` if the environment fails, or if the prompt leaves no room for an answer.
    """
    while not episode.over:
        try:
            completion = await backend.generate(episode.token_ids, params, *episode.request())
        except CapacityError as error:
            if episode.turn == 0:
                raise PromptTooLongError(str(error).rstrip(".")) from None
            episode.cut()  # the conversation has grown as long as it can
            break
        text = episode.append_completion(completion)
        answer = await pool.call(episode.environment, partial(episode.environment.step, text))
        episode.append_observation(answer)
    return episode.trajectory()


class PromptTooLongError(EpisodeError):
    """The prompt leaves no room for an answer."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """Where an episode starts; its group is all the episodes from the same start."""

    group_id: int
    """Unique in the run: what is sampled depends on it."""
    seed: int
    """The seed for the environment's `reset`."""
    row: int | None = None
    """The row of the environment's data, where it has rows."""


class ChatTokens:
    """Turns messages into tokens and tokens into text, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prompt: Callable[[list[Message], dict[str, Any]], list[int]]
        """The tokens of a conversation up to the place where the policy answers."""
        self.prompt = partial(render_prompt, tokenizer)
        self._tokenizer = tokenizer
        # Rendering is slow compared with a move of a game, and games repeat their messages.
        self._turn = lru_cache(4096)(lambda said: render_turn(tokenizer, *json.loads(said)))

    def turn(self, messages: list[Message], options: dict[str, Any]) -> list[int]:
        """The tokens between two answers of the policy, with these messages."""
        return self._turn(json.dumps([messages, options]))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the policy's tokens, without special tokens."""
        return decode(self._tokenizer, token_ids, skip_special_tokens=True)


@dataclass(slots=True)
class Episode:
    """The conversation so far, as texts and as tokens."""

    environment: TextEnvironment
    spec: EpisodeSpec
    sample: int
    """Its number in the group."""
    chat: ChatTokens
    rewarded: Rewarded
    over: bool = False
    turn: int = 0
    """Answers that the policy has given."""
    messages: list[Message] = field(default_factory=list)
    template_options: dict[str, Any] = field(default_factory=dict)
    """The arguments of the chat template besides the messages."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weights_versions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    rewarded_at: list[int] = field(default_factory=list)
    prompt_length: int = 0
    answered_tokens: int = 0
    """Tokens up to the end of the newest answer."""
    answered_messages: int = 0
    """Messages up to the newest answer."""
    completion: str = ""
    """The newest answer."""
    finish_reason: FinishReason = "stop"
    row: Any = None
    """The environment's name for its task, as `reset` gives it."""
    info: dict[str, Any] = field(default_factory=dict)
    """The environment's last report."""

    def request(self) -> tuple[int, int]:
        """The request id and the sample of the next answer: a group's first answers share the id,
        for they share the prompt.
        """
        group = self.spec.group_id
        if self.turn == 0:
            return request_id(group), self.sample
        return request_id(group, self.turn, self.sample), 0

    def append_prompt(self, answer: tuple[str, dict[str, Any]]) -> None:
        """Append what the environment's `reset` returned."""
        with _environment_at_fault():
            observation, info = answer
            self.messages, self.row = messages_of(observation, info), info.get("row")
            self.template_options = info.get("template_options") or {}
            self._append(self.chat.prompt(self.messages, self.template_options))
            self.prompt_length = len(self.token_ids)

    def append_completion(self, completion: Completion) -> str:
        """Append what the policy wrote -> its text."""
        self.token_ids += completion.token_ids
        self.loss_mask += [1] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.weights_versions += completion.weights_versions
        self.rewards += [0.0] * len(completion.token_ids)
        self.finish_reason = completion.finish_reason
        self.answered_tokens = len(self.token_ids)
        self.turn += 1
        self.completion = self.chat.text(completion.token_ids)
        return self.completion

    def append_observation(self, answer: tuple[str, float, bool, bool, dict[str, Any]]) -> None:
        """Append what the environment's `step` returned for the newest answer."""
        with _environment_at_fault():
            observation, reward, terminated, truncated, info = answer
            earned = None if reward is None else to_reward(reward)
            if earned is not None and not is_usable(earned) and self.rewarded != "any":
                raise ValueError(f"the reward is {short_repr(reward)}")
            self.rewards[-1] += earned or 0.0
            if earned is not None:
                self.rewarded_at += [len(self.rewards) - 1]
            self.messages += [{"role": "assistant", "content": self.completion}]
            self.answered_messages = len(self.messages)
            success = {"success": bool(info["success"])} if "success" in info else {}
            self.info = {**info, **success}
            self.over = bool(terminated or truncated or self.finish_reason == "length")
            if not self.over:
                said = messages_of(observation, info)
                self.messages += said
                self._append(self.chat.turn(said, self.template_options))

    def cut(self) -> None:
        """End at the newest answer, because the policy will not answer the environment's last
        message.
        """
        for column in (
            self.token_ids, self.loss_mask, self.logprobs, self.weights_versions, self.rewards
        ):  # fmt: skip
            del column[self.answered_tokens :]
        del self.messages[self.answered_messages :]
        self.over, self.finish_reason = True, "length"

    def trajectory(self) -> Trajectory:
        """The record of an episode that is over. Raises `EpisodeError` if it lacks a reward."""
        if self.rewarded == "needed" and not self.rewarded_at:
            raise EpisodeError("the environment gave no reward")
        options = {"template_options": self.template_options} if self.template_options else {}
        columns = {"row": self.row, **options, **self.info}
        return Trajectory(
            self.token_ids,
            self.loss_mask,
            self.logprobs,
            self.rewards,
            self.spec.group_id,
            self.prompt_length,
            self.finish_reason,
            episode_info(self.messages, self.completion, columns),
            tuple(self.rewarded_at),
            self.weights_versions,
        )

    def _append(self, token_ids: list[int]) -> None:
        """Append the environment's message."""
        self.token_ids += token_ids
        self.loss_mask += [0] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)
        self.weights_versions += [-1] * len(token_ids)
        self.rewards += [0.0] * len(token_ids)


def request_id(group: int, turn: int = 0, sample: int = 0) -> int:
    """A number for one completion of a run; its random numbers are a function of it. No two are
    equal: 7 high bits of the turn, 32 of the group, 8 low bits of the turn, 16 of the sample.

    Raises `CapacityError` beyond them.
    """
    if group >= 1 << 32 or turn >= 1 << 15 or sample >= 1 << 16:
        raise CapacityError(
            f"Group {group}, turn {turn}, sample {sample} is beyond what a run can number; "
            "take fewer steps, turns or completions."
        )
    return (turn >> 8) << 56 | group << 24 | (turn & 255) << 16 | sample


def group_of(request: int) -> int:
    """The group of a request id."""
    return request >> 24 & (1 << 32) - 1


def messages_of(observation: Any, info: Mapping[str, Any]) -> list[Message]:
    """The environment's message. Raises `TypeError` if it is not text."""
    said = list(info.get("messages") or [{"role": "user", "content": observation}])
    for i, message in enumerate(said):
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            said[i] = {**message, "content": ""}
        elif not isinstance(content, str):
            raise TypeError(f"its message is {content!r:.60}, which is not text")
    return said


def episode_info(
    messages: list[Message], completion: str, reported: Mapping[str, Any]
) -> EpisodeInfo:
    """The record of an episode from its texts and from what its environment reported."""
    own_words = ("messages", "completion", "prompt")  # reward functions get these of every episode
    return EpisodeInfo(
        messages=messages,
        completion=completion,
        row=reported.get("row"),
        success=bool(reported.get("success", False)),
        gold=reported.get("gold"),
        metrics=_finite_numbers(reported.get("metrics")),
        columns={name: value for name, value in reported.items() if name not in own_words},
    )


def _finite_numbers(metrics: Any) -> dict[str, float]:
    """The finite numbers among what an environment, or a column of a data row, calls `metrics`."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if math.isfinite(figure := float(value)):
                numbers[str(name)] = figure
    return numbers


@contextmanager
def _environment_at_fault() -> Iterator[None]:
    """An error inside is caused by what the environment returned, and ends only its own episode."""
    try:
        yield
    except Exception as error:
        raise EpisodeError(describe_error(error)) from error
