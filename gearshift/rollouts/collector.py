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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, Self

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import render_prompt, render_turn
from gearshift.data.text import decode
from gearshift.environments.base import TextEnvironment
from gearshift.environments.worker_processes import (
    EnvironmentProcesses,
    ProcessEnvironment,
    ProcessError,
)
from gearshift.errors import CapacityError, DataError
from gearshift.rewards.functions import is_usable, to_reward
from gearshift.rewards.http import short_repr
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import WorkerThreads, run_with_timeout
from gearshift.types import (
    Completion,
    EpisodeInfo,
    FinishReason,
    Message,
    SamplingParams,
    Trajectory,
)


class Writing(Protocol):
    """A completion on its way."""

    @property
    def ended(self) -> bool: ...
    @property
    def completion(self) -> Completion: ...
    def abort(self) -> None: ...


class Writer(Protocol):
    """What writes completions: `Engine`."""

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
Rewarded = Literal["needed", "finite", "any"]
"""What an environment must say of an episode, which is a failure else: a finite reward; no reward
that is not finite, but perhaps none; anything, where its reward does not count.
"""

WORKERS = 4
"""Environments that answer at a time, where those that only wait are not counted."""
EPISODE_TIMEOUT = 300.0
"""Seconds for an answer of an environment, where a recipe names no others."""
_CLOSING = 10.0
"""Seconds in which environments can close; those that have not are left."""
_GLANCE = 0.02
"""Seconds between looks at environments that answer, while nothing is written."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
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
    start: EpisodeSpec
    sample: int
    messages: list[Message] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """What the chat template gets besides the messages."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weights_versions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    rewarded: list[int] = field(default_factory=list)
    prompt_length: int = 0
    turn_start: int = 0
    turn_end: int = 0
    """Tokens up to the end of the newest answer."""
    said: int = 0
    """Messages up to the newest answer."""
    finish_reason: FinishReason = "abort"
    info: dict[str, Any] = field(default_factory=dict)
    completion: str = ""
    running: bool = True
    ready: bool = False
    """Whether its environment has begun, or failed to."""
    row: Any = None
    """Which of its tasks the environment said that it is."""
    turn: int = 0
    """Completions that were begun."""
    asked: float | None = None
    """When its environment began to answer."""

    def hear(self, ids: Sequence[int]) -> None:
        """Append what the environment said."""
        self.token_ids += ids
        self.loss_mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.weights_versions += [-1] * len(ids)
        self.rewards += [0.0] * len(ids)
        self.turn_start = len(self.token_ids)

    def say(self, completion: Completion) -> None:
        """Append what the policy wrote."""
        self.token_ids += completion.token_ids
        self.loss_mask += [1] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.weights_versions += completion.weights_versions
        self.rewards += [0.0] * len(completion.token_ids)
        self.finish_reason = completion.finish_reason
        self.turn_end = len(self.token_ids)

    def cut(self) -> None:
        """End at the newest answer: what the environment said to it will not be answered."""
        for column in (
            self.token_ids, self.loss_mask, self.logprobs, self.weights_versions, self.rewards
        ):  # fmt: skip
            del column[self.turn_end :]
        del self.messages[self.said :]
        self.running, self.finish_reason = False, "length"


class _Unmade(TextEnvironment):
    """In the place of an environment that could not be made."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        raise self._error

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        raise self._error


class Collector:
    """Runs episodes of one environment, as many at a time as are asked for."""

    def __init__(
        self,
        make: Callable[[], TextEnvironment],
        tokenizer: PreTrainedTokenizerBase,
        writer: Writer,
        workers: int = WORKERS,
        timeout: float | None = EPISODE_TIMEOUT,
    ) -> None:
        """`workers` environments answer at a time, more where those only wait; each is called from
        one thread at a time, but not always the same. One that takes more than `timeout` seconds
        loses its episode.
        """
        self._make, self._tokenizer, self._writer = make, tokenizer, writer
        # Rendering is slow beside a game's move, and what games say repeats.
        self._render_turn = lru_cache(4096)(partial(_rendered, tokenizer))
        self._idle: list[TextEnvironment] = []
        self._open: list[TextEnvironment] = []
        """All that were made."""
        self._workers, self._timeout = WorkerThreads(workers), timeout
        self.failures = 0
        """Episodes lost to an environment that raised, hung, gave no reward that is finite or
        started otherwise than its group; or to a prompt that leaves no place for an answer.
        """
        self.overlong = 0
        """Of these, the ones that were lost to their prompt."""
        self.last_failure = ""
        self._rewarded: Rewarded = "needed"
        self._made = False

    def unusable_rows(self, rows: int, most: int) -> dict[int, str]:
        """The rows whose prompt has more than `most` tokens or none, or is refused by the chat
        template; and why, for each.

        A prompt that has no more bytes than that is not rendered, if one of its roles has been: a
        token is a byte at least. One that cannot be begun is left to the rollout, which counts it.
        """
        environment = self._made_anew()
        extra: dict[tuple[str, ...], int] = {}
        found: dict[int, str] = {}
        for row in range(rows):
            call = self._workers.submit(partial(environment.reset, seed=row, options={"row": row}))
            wait([call], timeout=self._timeout)
            if not call.done():
                self._give_up(call, environment)
                break  # the others may hang as long
            if call.exception():
                environment = self._make()
                continue
            try:
                observation, info = call.result()
                messages = _said(observation, info)
            except Exception:
                continue
            template = info.get("template_options") or {}
            roles = tuple(m["role"] for m in messages)
            size = sum(len(m["content"].encode()) for m in messages)
            plain = not template and all(m.keys() == {"role", "content"} for m in messages)
            if plain and roles in extra and size and size + extra[roles] <= most:
                continue
            try:
                tokens = len(render_prompt(self._tokenizer, messages, template))
            except DataError as error:
                found[row] = str(error).rstrip(".")
                continue
            if plain:
                extra.setdefault(roles, tokens)  # what the template adds is less than that
            if not 0 < tokens <= most:
                found[row] = (
                    f"the prompt has {tokens} tokens, and 1 to {most} leave place to answer"
                )
        return found

    def collect(
        self,
        starts: Sequence[EpisodeSpec],
        params: SamplingParams,
        on_group: OnGroup = lambda group: None,
        rewarded: Rewarded = "needed",
    ) -> list[Trajectory]:
        """`params.n` episodes from each start, in order; one whose environment failed is left out
        and counted. `on_group` hears of each group as it ends, while others still run.
        """
        self._rewarded = rewarded
        groups = [
            [
                _Episode(self._idle.pop() if self._idle else self._new(), start, sample)
                for sample in range(params.n)
            ]
            for start in starts
        ]
        answering: dict[Future[Any], _Episode] = {}
        writing: list[tuple[Writing, _Episode]] = []
        group_of = {id(e): group for group in groups for e in group}

        def ask(episode: _Episode, call: Callable[[], Any]) -> None:
            def timed() -> Any:
                if isinstance(episode.environment, ProcessEnvironment):
                    episode.environment.ready()  # its start does not count
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
                    episode.cut()
                    self._judge(episode)
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

    def close(self) -> None:
        """Close the environments, and end the threads and processes in which they answered."""
        self._idle.clear()
        opened, self._open = self._open, []
        with suppress(Exception):
            run_with_timeout(_CLOSING, partial(_close_all, opened))
        self._workers.close()
        if isinstance(self._make, EnvironmentProcesses):
            self._make.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _made_anew(self) -> TextEnvironment:
        made = self._make()
        self._open.append(made)
        return made

    def _new(self) -> TextEnvironment:
        """Another environment. Raises what the first one raises that cannot be made; a later one
        costs its episode.
        """
        try:
            made = self._made_anew()
        except (Exception, SystemExit) as error:
            if not self._made:
                raise
            return _Unmade(error)
        self._made = True
        return made

    def _done(self, answering: dict[Future[Any], _Episode], patient: bool) -> list[Future[Any]]:
        """Environments that have answered, or have hung; a patient caller waits for the first."""
        while True:
            done = [f for f, episode in answering.items() if f.done() or self._hangs(episode)]
            if done or not patient or not answering:
                break
            wait(answering, timeout=_GLANCE, return_when=FIRST_COMPLETED)
            self._workers.maybe_add_thread()
        self._workers.maybe_add_thread()
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
            self._give_up(future, episode.environment)
            fault = TimeoutError(f"it took longer than {self._timeout:g} s")
        else:
            fault = future.exception()  # a sys.exit is a fault too
        if fault is None:
            try:
                (self._stepped if episode.ready else self._began)(episode, future.result())
            except Exception as error:
                fault = error
        if fault is not None:
            own = isinstance(fault, ProcessError)
            self._lose(episode, str(fault) if own else describe_error(fault))
        episode.ready = True

    def _give_up(self, call: Future[Any], environment: TextEnvironment) -> None:
        self._workers.abandon(call)
        if isinstance(environment, ProcessEnvironment):
            environment.kill()

    def _lose(self, episode: _Episode, why: str) -> None:
        self.failures += 1
        self.last_failure = why
        episode.running, episode.finish_reason = False, "abort"
        lost = episode.environment
        if isinstance(lost, ProcessEnvironment):  # nor is its process used again
            lost.close()
            self._open = [environment for environment in self._open if environment is not lost]

    def _judge(self, episode: _Episode) -> None:
        """An episode has ended: it is lost if it needed a reward and got none."""
        if self._rewarded == "needed" and not episode.rewarded:
            self._lose(episode, "the environment gave no reward")

    def _first_turn(
        self, group: list[_Episode], params: SamplingParams
    ) -> list[tuple[Writing, _Episode]]:
        """The completions of a group, whose prompt is one."""
        running = [e for e in group if e.running]
        for episode in running:
            episode.turn = 1
        if not running:
            return []
        [(prompt, _)] = Counter(tuple(e.token_ids) for e in running).most_common(1)
        for episode in [e for e in running if tuple(e.token_ids) != prompt]:
            name = type(episode.environment.unwrapped).__name__
            self._lose(
                episode,
                f"{name} started differently from the same seed; "
                "its reset must be a function of seed and options",
            )
        try:
            request = request_id(group[0].start.group_id)
            [begun] = self._writer.submit([prompt], params, [request])
        except CapacityError as error:
            for episode in [e for e in running if e.running]:
                self.overlong += 1
                self._lose(episode, str(error).rstrip("."))
            return []
        pairs = []
        for written, episode in zip(begun, group, strict=True):
            if episode.running:
                pairs.append((written, episode))
            else:
                written.abort()
        return pairs

    def _next_turn(self, e: _Episode, params: SamplingParams) -> tuple[Writing, _Episode]:
        """The next completion of one episode."""
        request = request_id(e.start.group_id, e.turn, e.sample)
        [[written]] = self._writer.submit([e.token_ids], replace(params, n=1), [request])
        e.turn += 1
        return written, e

    def _reset(self, episode: _Episode) -> tuple[str, dict[str, Any]]:
        options = {} if episode.start.row is None else {"row": episode.start.row}
        return episode.environment.reset(seed=episode.start.seed, options=options)

    def _began(self, episode: _Episode, answer: tuple[str, dict[str, Any]]) -> None:
        observation, info = answer
        episode.messages, episode.row = _said(observation, info), info.get("row")
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
        earned = None if reward is None else to_reward(reward)
        if earned is not None and not is_usable(earned) and self._rewarded != "any":
            raise ValueError(f"the reward is {short_repr(reward)}")
        text = self._text(episode)
        episode.rewards[-1] += earned or 0.0
        if earned is not None:
            episode.rewarded += [len(episode.rewards) - 1]
        episode.messages += [{"role": "assistant", "content": text}]
        episode.said = len(episode.messages)
        told = {"success": bool(info["success"])} if "success" in info else {}
        episode.info, episode.completion = {**info, **told}, text
        if terminated or truncated or episode.finish_reason == "length":
            episode.running = False
            self._judge(episode)
            return
        said = _said(observation, info)
        episode.messages += said
        episode.hear(self._render_turn(json.dumps([said, episode.options])))

    def _trajectories(self, group: list[_Episode]) -> list[Trajectory]:
        return [self._trajectory(e) for e in group if e.finish_reason != "abort"]

    def _trajectory(self, episode: _Episode) -> Trajectory:
        options = {"template_options": episode.options} if episode.options else {}
        columns = {"row": episode.row, **options, **episode.info}
        return Trajectory(
            episode.token_ids,
            episode.loss_mask,
            episode.logprobs,
            episode.rewards,
            episode.start.group_id,
            episode.prompt_length,
            episode.finish_reason,
            episode_info(episode.messages, episode.completion, columns),
            tuple(episode.rewarded),
            episode.weights_versions,
        )


def episode_info(messages: list[Message], completion: str, told: Mapping[str, Any]) -> EpisodeInfo:
    """The record of an episode from its texts and from what its environment told."""
    own_words = ("messages", "completion", "prompt")  # reward functions get these of every episode
    return EpisodeInfo(
        messages=messages,
        completion=completion,
        row=told.get("row"),
        success=bool(told.get("success", False)),
        gold=told.get("gold"),
        metrics=_finite_numbers(told.get("metrics")),
        columns={name: value for name, value in told.items() if name not in own_words},
    )


def _finite_numbers(metrics: Any) -> dict[str, float]:
    """The finite numbers among what an environment, or a column of a data row, calls `metrics`."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if math.isfinite(figure := float(value)):
                numbers[str(name)] = figure
    return numbers


def _close_all(environments: Sequence[TextEnvironment]) -> None:
    for environment in environments:
        with suppress(Exception):
            environment.close()


def request_id(group: int, turn: int = 0, sample: int = 0) -> int:
    """A number for one completion of a run, which its random numbers are a function of. No two are
    alike: 7 high bits of the turn, 32 of the group, 8 low bits of the turn, 16 of the sample.

    Raises `CapacityError` beyond them.
    """
    if group >= 1 << 32 or turn >= 1 << 15 or sample >= 1 << 16:
        raise CapacityError(
            f"Group {group}, turn {turn}, sample {sample} is beyond what a run can number; "
            "take fewer steps, turns or completions."
        )
    return (turn >> 8) << 56 | group << 24 | (turn & 255) << 16 | sample


def _said(observation: Any, info: Mapping[str, Any]) -> list[Message]:
    """What the environment says. Raises `TypeError` if it is not text."""
    said = list(info.get("messages") or [{"role": "user", "content": observation}])
    for message in said:
        if not isinstance(message["content"], str):
            raise TypeError(f"it said {message['content']!r:.60}, which is no text")
    return said


def _rendered(tokenizer: PreTrainedTokenizerBase, said: str) -> list[int]:
    return render_turn(tokenizer, *json.loads(said))
