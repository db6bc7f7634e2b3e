"""The policy of an engine on vLLM servers: the weights are pushed when they have changed, and a
probe compares the servers with the trainer after each push. This file must not import a trainer.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gearshift.batch import pack
from gearshift.engine import Engine
from gearshift.errors import ServerError
from gearshift.models.load import save_model
from gearshift.rewards.http_client import NoAnswerError
from gearshift.rollouts.vllm import VLLM, GenerationConfig, VLLMServer
from gearshift.runtime.distributed import world
from gearshift.runtime.event_loop import run_coroutine
from gearshift.runtime.files import writing
from gearshift.types import Completion, SamplingParams

_TEXT = "The quick brown fox jumps over the lazy dog, and then"
_PROBES = (
    SamplingParams(temperature=0.0, max_new_tokens=16),
    SamplingParams(temperature=0.7, max_new_tokens=16),
)
"""A temperature other than 1 shows a server whose log-probabilities leave it out."""
_CHANGED = 1e-4
"""The mean change of log-probabilities, in nats, that no server with the weights can miss."""
_REASONS = (
    "Likely reasons: it does not read this folder or keeps a tied head of older weights (take "
    "another version of vLLM, or untie the model), it runs without "
    "--logprobs-mode processed_logprobs, or in another --dtype than the trainer"
)
T = TypeVar("T")
Answers = dict[str, list[Completion]]
"""What each server answered to the probes, by the server's name."""


class PolicyOnServers(VLLM):
    """The `GenerationBackend` of an engine whose policy vLLM servers sample."""

    def __init__(self, config: GenerationConfig, engine: Engine, folder: Path) -> None:
        """The weights go through a folder inside `folder`, which the servers read."""
        super().__init__(
            config, engine.end_tokens, engine.max_length, engine.seed, engine.config.max_num_seqs
        )
        self._engine, self._folder = engine, folder / "weights-for-servers"
        self._sleep, self._pushed = config.sleep, -1
        whole = engine.model.dtype == torch.float32
        self._tolerance = config.tolerance or (1e-3 if whole else 0.05)
        self._before: dict[str, tuple[list[Completion], Tensor]] = {}
        """Each server's answers after the last push, and the trainer's log-probs of their tokens.
        """

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Wake the servers, and push the weights if they have changed. All ranks enter it. Raises
        `ServerError` for a server that samples from other weights.
        """
        if self._sleep:
            self._command("/wake_up")
        if self._pushed != self._engine.weights_version:
            self._push_until_right()
        yield
        if self._sleep:
            self._command("/sleep")  # level 1, by default; level 2 would forget the weights

    def _command(self, path: str) -> None:
        """Send it to all servers, once all ranks have come."""
        world().gather(None, "the end of sampling")
        command = partial(VLLMServer.command, path=path)
        world().says(partial(self.command_all, self.servers, command), "the servers' sleep")

    def _push_until_right(self) -> None:
        """Push, probe, and push once more where the probe finds other weights."""
        version, servers = self._engine.weights_version, self.servers
        weights = self._engine.runner.whole_state()
        wrong: dict[str, str] = {}
        for _ in range(2):
            lost, answers = world().says(
                partial(self._push_and_ask, servers, version, weights), "the push of weights"
            )
            for server in self.servers:
                server.lost = lost[server.name]
            scored = {name: self._scores(asked) for name, asked in answers.items()}
            wrong = world().says(partial(self._wrong, answers, scored), "the probe of servers")
            servers = [server for server in servers if server.name in wrong]
            if not servers:
                break
        if servers:
            found = "; ".join(f"{name} {why}" for name, why in wrong.items())
            raise ServerError(f"After two pushes of the weights, {found}. {_REASONS}.")
        self._pushed = self.version = version

    def _push_and_ask(
        self, servers: Sequence[VLLMServer], version: int, weights: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, str], Answers]:
        """Push to these servers -> why each server is lost, and what the others answer."""
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            with writing(self._folder):
                model, tokenizer = self._engine.model, self._engine.tokenizer
                save_model(self._folder, model, tokenizer, "", weights=weights)
            self.push(self._folder, version, servers)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        asked = [server for server in servers if not server.lost]
        answers = run_coroutine(_each(map(self._ask_probes, asked)))
        found = {s.name: a for s, a in zip(asked, answers, strict=True) if a is not None}
        self.require_one()
        return {server.name: server.lost for server in self.servers}, found

    async def _ask_probes(self, server: VLLMServer) -> list[Completion] | None:
        try:
            return [
                await self.ask(server, self.request(self._prompt, params, 0), params)
                for params in _PROBES
            ]
        except NoAnswerError as error:
            self.lose(server, str(error))
            return None

    @property
    def _prompt(self) -> list[int]:
        """[T]: some plain text, of which a short model takes the beginning."""
        ids: list[int] = self._engine.tokenizer(_TEXT)["input_ids"]
        return ids[: max(1, self._engine.max_length - _PROBES[0].max_new_tokens)]

    @torch.no_grad()
    def _scores(self, answers: Sequence[Completion]) -> Tensor:
        """[M]: the trainer's log-probs of these answers to the probes. All ranks compute them,
        because each may have its part of the weights.
        """
        scores, prompt = [], self._prompt
        for params, answer in zip(_PROBES, answers, strict=True):
            ids = prompt + answer.token_ids
            mask = [0] * len(prompt) + [1] * len(answer.token_ids)
            batch = pack([(ids, mask)]).to(self._engine.device)
            with self._engine.training(), torch.no_grad():
                scored = self._engine.logprobs(batch, params.temperature or 1.0)
            scores.append(scored.logprobs.cpu())
        return torch.cat(scores)

    def _wrong(self, answers: Answers, scored: dict[str, Tensor]) -> dict[str, str]:
        """What is wrong with the servers that sample from other weights than the trainer's."""
        wrong = {}
        for name, asked in answers.items():
            ours_M = scored[name]
            theirs_M = torch.tensor([x for answer in asked for x in answer.logprobs])
            gap = float((ours_M - theirs_M).abs().mean())
            if not gap <= self._tolerance:
                wrong[name] = (
                    f"gives log-probabilities that differ from the trainer's by {gap:.2g} nats a "
                    f"token, and generation.tolerance allows {self._tolerance:g}"
                )
                continue
            before, then_M = self._before.get(name, ((), ours_M))
            same = [(a.token_ids, a.logprobs) for a in before] == [
                (a.token_ids, a.logprobs) for a in asked
            ]
            moved = float((ours_M - then_M).abs().mean()) if same else 0.0
            if moved > _CHANGED:
                wrong[name] = (
                    f"still samples from older weights: its answer is the same to the last digit, "
                    f"and the trainer's log-probabilities have moved by {moved:.2g} nats a token"
                )
                continue
            self._before[name] = asked, ours_M
        return wrong


async def _each(tasks: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*tasks)
