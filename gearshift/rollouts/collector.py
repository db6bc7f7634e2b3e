"""Episodes: environments answer, the policy writes, and what both said becomes trajectories of
tokens.

Takes what writes completions and never sees an engine or a trainer. Token in, token out: what was
sampled is never decoded and encoded again; text is made for the environment only.
Environments run in threads while others' completions are sampled, so that one that waits holds up
nobody.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import render_prompt, render_turn
from gearshift.data.text import decode
from gearshift.errors import CapacityError, DataError
from gearshift.rollouts.environment import TextEnvironment
from gearshift.rollouts.workers import Workers
from gearshift.types import Completion, FinishReason, Message, SamplingParams, Trajectory


class Writing(Protocol):
    """A completion on its way."""

    @property
    def ended(self) -> bool: ...
    @property
    def completion(self) -> Completion: ...
    def abort(self) -> None: ...


class Writer(Protocol):
    """What writes completions: `HybridEngine`."""

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        request_ids: Sequence[int],
    ) -> Sequence[Sequence[Writing]]:
        """Begin `params.n` completions of each prompt."""

    def step(self) -> None:
        """One token for each completion on its way."""


OnGroup = Callable[[list[Trajectory]], None]

_TURN_BITS, _SAMPLE_BITS = 8, 16
_GLANCE = 0.02
"""Seconds between looks at environments that answer, while nothing is written."""


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
    options: dict[str, Any] = field(default_factory=dict)
    """What the chat template gets besides the messages."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    prompt_length: int = 0
    turn_start: int = 0
    finish_reason: FinishReason = "abort"
    info: dict[str, Any] = field(default_factory=dict)
    running: bool = True
    ready: bool = False
    """Whether its environment has begun, or failed to."""
    turn: int = 0
    """Completions that were begun."""
    asked: float | None = None
    """When its environment began to answer."""

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
        writer: Writer,
        workers: int = 4,
        timeout: float | None = 300.0,
    ) -> None:
        """`workers` environments answer at a time, more where those only wait; each is called from
        one thread at a time, but not always the same. One that takes more than `timeout` seconds
        loses its episode.
        """
        self._make, self._tokenizer, self._writer = make, tokenizer, writer
        # Rendering is slow beside a game's move, and what games say repeats.
        self._render_turn = lru_cache(4096)(partial(_rendered, tokenizer))
        self._idle: list[TextEnvironment] = []
        self._workers, self._timeout = Workers(workers), timeout
        self.failures = 0
        """Episodes lost to an environment that raised, hung, or gave a reward that is not finite.
        """
        self.last_failure = ""

    def collect(
        self,
        starts: Sequence[Start],
        params: SamplingParams,
        on_group: OnGroup = lambda group: None,
    ) -> list[Trajectory]:
        """`params.n` episodes from each start, in order; one whose environment failed is left out
        and counted. `on_group` hears of each group as it ends, while others still run.
        """
        groups = [
            [
                _Episode(self._idle.pop() if self._idle else self._make(), start, sample)
                for sample in range(params.n)
            ]
            for start in starts
        ]
        answering: dict[Future[Any], _Episode] = {}
        writing: list[tuple[Writing, _Episode]] = []
        group_of = {id(e): group for group in groups for e in group}

        def ask(episode: _Episode, call: Callable[[], Any]) -> None:
            def timed() -> Any:
                episode.asked = time.monotonic()
                return call()

            episode.asked = None
            answering[self._workers.submit(timed)] = episode

        def answered(episode: _Episode) -> None:
            """Let it go on: to its first turn with its group, to its next, or to its end."""
            group = group_of[id(episode)]
            if not episode.turn and all(e.ready for e in group):
                writing.extend(self._first_turn(group, params))
            elif episode.turn and episode.running:
                try:
                    writing.append(self._next_turn(episode, params))
                except CapacityError:  # the conversation has grown as long as it can
                    episode.running, episode.finish_reason = False, "length"
            if not any(e.running for e in group):
                on_group(self._trajectories(group))

        for group in groups:
            for episode in group:
                ask(episode, partial(self._reset, episode))
        try:
            while answering or writing:
                for future in self._done(answering, patient=not writing):
                    episode = answering.pop(future)
                    self._hear(episode, future)
                    answered(episode)
                if any(not w.ended for w, _ in writing):
                    self._writer.step()
                for written, episode in [pair for pair in writing if pair[0].ended]:
                    episode.say(written.completion)
                    ask(episode, partial(episode.environment.step, self._text(episode)))
                writing = [pair for pair in writing if not pair[0].ended]
        finally:
            for written, _ in writing:
                written.abort()
        self._idle += [
            e.environment for group in groups for e in group if e.finish_reason != "abort"
        ]
        return [t for group in groups for t in self._trajectories(group)]

    def _done(self, answering: dict[Future[Any], _Episode], patient: bool) -> list[Future[Any]]:
        """Environments that have answered, or have hung; a patient caller waits for the first."""
        while True:
            done = [f for f, episode in answering.items() if f.done() or self._hangs(episode)]
            if done or not patient or not answering:
                break
            wait(answering, timeout=_GLANCE, return_when=FIRST_COMPLETED)
            self._workers.hurry()
        self._workers.hurry()
        return done

    def _hangs(self, episode: _Episode) -> bool:
        since, timeout = episode.asked, self._timeout
        return timeout is not None and since is not None and time.monotonic() - since > timeout

    def _hear(self, episode: _Episode, future: Future[Any]) -> None:
        """Take in what the environment answered. It is the user's code: its fault costs its own
        episode, and the environment, which may be broken, is not asked again.
        """
        fault: BaseException | None
        if not future.done():
            self._workers.give_up(future)
            fault = TimeoutError(f"it took longer than {self._timeout:g} s")
        else:
            fault = future.exception()  # a sys.exit is a fault too
        if fault is None:
            try:
                (self._stepped if episode.ready else self._began)(episode, future.result())
            except Exception as error:
                fault = error
        if fault is not None:
            self.failures += 1
            self.last_failure = f"{type(fault).__name__}: {fault}"
            episode.running, episode.finish_reason = False, "abort"
        episode.ready = True

    def _first_turn(
        self, group: list[_Episode], params: SamplingParams
    ) -> list[tuple[Writing, _Episode]]:
        """The completions of a group, whose prompt is one."""
        running = [e for e in group if e.running]
        for episode in running:
            episode.turn = 1
        if not running:
            return []
        prompt = running[0].token_ids
        if any(e.token_ids != prompt for e in running):
            name = type(running[0].environment.unwrapped).__name__
            raise DataError(
                f"{name} started differently from the same seed; "
                "its reset must be a function of seed and options."
            )
        request = group[0].start.group_id << _TURN_BITS + _SAMPLE_BITS
        [begun] = self._writer.submit([prompt], params, [request])
        pairs = []
        for written, episode in zip(begun, group, strict=True):
            if episode.running:
                pairs.append((written, episode))
            else:
                written.abort()
        return pairs

    def _next_turn(self, e: _Episode, params: SamplingParams) -> tuple[Writing, _Episode]:
        """The next completion of one episode."""
        group = e.start.group_id << _TURN_BITS + _SAMPLE_BITS
        request = group | (e.turn << _SAMPLE_BITS) | e.sample
        [[written]] = self._writer.submit([e.token_ids], replace(params, n=1), [request])
        e.turn += 1
        return written, e

    def _reset(self, episode: _Episode) -> tuple[str, dict[str, Any]]:
        options = {} if episode.start.row is None else {"row": episode.start.row}
        return episode.environment.reset(seed=episode.start.seed, options=options)

    def _began(self, episode: _Episode, answer: tuple[str, dict[str, Any]]) -> None:
        observation, info = answer
        episode.messages = _said(observation, info)
        episode.options = info.get("template_options") or {}
        episode.hear(render_prompt(self._tokenizer, episode.messages, episode.options))
        episode.prompt_length = len(episode.token_ids)
        episode.finish_reason = "stop"

    def _text(self, episode: _Episode) -> str:
        """What the policy wrote in this turn."""
        written = episode.token_ids[episode.turn_start :]
        return decode(self._tokenizer, written, skip_special_tokens=True)

    def _stepped(
        self, episode: _Episode, answer: tuple[str, float, bool, bool, dict[str, Any]]
    ) -> None:
        observation, reward, terminated, truncated, info = answer
        if not math.isfinite(reward):
            raise ValueError(f"the reward is {reward}")
        text = self._text(episode)
        episode.rewards[-1] += float(reward)
        episode.messages += [{"role": "assistant", "content": text}]
        episode.info = {**info, "completion": text}
        if terminated or truncated or episode.finish_reason == "length":
            episode.running = False
            return
        said = _said(observation, info)
        episode.messages += said
        episode.hear(self._render_turn(json.dumps([said, episode.options])))

    def _trajectories(self, group: list[_Episode]) -> list[Trajectory]:
        return [self._trajectory(e) for e in group if e.finish_reason != "abort"]

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


def _said(observation: Any, info: Mapping[str, Any]) -> list[Message]:
    """What the environment says. Raises `TypeError` if it is not text."""
    said = list(info.get("messages") or [{"role": "user", "content": observation}])
    for message in said:
        if not isinstance(message["content"], str):
            raise TypeError(f"it said {message['content']!r:.60}, which is no text")
    return said


def _rendered(tokenizer: PreTrainedTokenizerBase, said: str) -> list[int]:
    return render_turn(tokenizer, *json.loads(said))
