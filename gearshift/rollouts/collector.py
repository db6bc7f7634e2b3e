"""Episodes: environments answer, the policy writes, and what both said becomes trajectories of
tokens.

Takes a generate function and never sees an engine or a trainer. Token in, token out: what was
sampled is never decoded and encoded again; text is made for the environment only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import render_prompt, render_turn
from gearshift.errors import DataError
from gearshift.rollouts.environment import TextEnvironment
from gearshift.types import Completion, FinishReason, Message, SamplingParams, Trajectory

Generate = Callable[
    [Sequence[Sequence[int]], SamplingParams, Sequence[int]], list[list[Completion]]
]
"""(prompts, params, request ids) -> `params.n` completions a prompt: `HybridEngine.generate`."""

_TURN_BITS, _SAMPLE_BITS = 8, 16


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode starts; its group is all the episodes from the same start."""

    group_id: int
    """Unique in the run: what is sampled depends on it."""
    seed: int
    """Given to the environment's `reset`."""
    row: int | None = None
    """The row of the environment's data, where it has rows."""


@dataclass(slots=True)
class _Episode:
    environment: TextEnvironment
    start: Start
    sample: int
    messages: list[Message] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    prompt_length: int = 0
    turn_start: int = 0
    finish_reason: FinishReason = "abort"
    info: dict[str, Any] = field(default_factory=dict)
    running: bool = True

    def hear(self, ids: Sequence[int]) -> None:
        """Append what the environment said."""
        self.token_ids += ids
        self.loss_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.rewards += [0.0] * len(ids)
        self.turn_start = len(self.token_ids)

    def say(self, completion: Completion) -> None:
        """Append what the policy wrote."""
        self.token_ids += completion.token_ids
        self.loss_mask += [1] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.rewards += [0.0] * len(completion.token_ids)
        self.finish_reason = completion.finish_reason


class Collector:
    """Runs episodes of one environment, as many at a time as are asked for."""

    def __init__(
        self,
        make: Callable[[], TextEnvironment],
        tokenizer: PreTrainedTokenizerBase,
        generate: Generate,
    ) -> None:
        self._make, self._tokenizer, self._generate = make, tokenizer, generate
        self._idle: list[TextEnvironment] = []
        self.failures = 0
        """Episodes lost to an environment that raised or gave a reward that is not finite."""
        self.last_failure = ""

    def collect(self, starts: Sequence[Start], params: SamplingParams) -> list[Trajectory]:
        """`params.n` episodes from each start, in order; one whose environment failed is left out
        and counted.
        """
        episodes = [
            _Episode(self._idle.pop() if self._idle else self._make(), start, sample)
            for start in starts
            for sample in range(params.n)
        ]
        for episode in episodes:
            self._guarded(episode, self._reset)
        turn = 0
        while running := [e for e in episodes if e.running]:
            for episode, completion in zip(
                running, self._write(running, params, turn), strict=True
            ):
                episode.say(completion)
                self._guarded(episode, self._step)
            turn += 1
        self._idle += [e.environment for e in episodes]
        return [self._trajectory(e) for e in episodes if e.finish_reason != "abort"]

    def _write(
        self, episodes: list[_Episode], params: SamplingParams, turn: int
    ) -> list[Completion]:
        """One completion for each episode; a group's first prompt is shared."""
        if turn:
            ids = [
                (e.start.group_id << _TURN_BITS + _SAMPLE_BITS) | (turn << _SAMPLE_BITS) | e.sample
                for e in episodes
            ]
            alone = replace(params, n=1)
            return [c for [c] in self._generate([e.token_ids for e in episodes], alone, ids)]
        groups: dict[int, list[_Episode]] = {}
        for episode in episodes:
            groups.setdefault(episode.start.group_id, []).append(episode)
        for members in groups.values():
            if any(e.token_ids != members[0].token_ids for e in members):
                name = type(members[0].environment.unwrapped).__name__
                raise DataError(
                    f"{name} started differently from the same seed; "
                    "its reset must be a function of seed and options."
                )
        ids = [group << _TURN_BITS + _SAMPLE_BITS for group in groups]
        prompts = [members[0].token_ids for members in groups.values()]
        written = self._generate(prompts, params, ids)
        by_id = {
            (group, sample): completion
            for group, completions in zip(groups, written, strict=True)
            for sample, completion in enumerate(completions)
        }
        return [by_id[e.start.group_id, e.sample] for e in episodes]

    def _guarded(self, episode: _Episode, do: Callable[[_Episode], None]) -> None:
        try:
            do(episode)
        except (
            Exception
        ) as error:  # an environment is the user's code: its fault costs its own episode
            self.failures += 1
            self.last_failure = f"{type(error).__name__}: {error}"
            episode.running, episode.finish_reason = False, "abort"

    def _reset(self, episode: _Episode) -> None:
        options = {} if episode.start.row is None else {"row": episode.start.row}
        _, info = episode.environment.reset(seed=episode.start.seed, options=options)
        episode.messages = list(info["messages"])
        episode.hear(render_prompt(self._tokenizer, episode.messages))
        episode.prompt_length = len(episode.token_ids)
        episode.finish_reason = "stop"

    def _step(self, episode: _Episode) -> None:
        text = self._tokenizer.decode(
            episode.token_ids[episode.turn_start :], skip_special_tokens=True
        )
        observation, reward, terminated, truncated, info = episode.environment.step(text)
        if not math.isfinite(reward):
            raise ValueError(f"the reward is {reward}")
        episode.rewards[-1] += float(reward)
        episode.messages += [{"role": "assistant", "content": text}]
        episode.info = {**info, "completion": text}
        if terminated or truncated or episode.finish_reason == "length":
            episode.running = False
            return
        message = {"role": "user", "content": observation}
        episode.messages.append(message)
        episode.hear(render_turn(self._tokenizer, message))

    def _trajectory(self, episode: _Episode) -> Trajectory:
        return Trajectory(
            episode.token_ids,
            episode.loss_mask,
            episode.logprobs,
            episode.rewards,
            episode.start.group_id,
            episode.prompt_length,
            episode.finish_reason,
            {**episode.info, "messages": episode.messages},
        )
