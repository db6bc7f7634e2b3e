"""Rollouts run on any program that samples completions, inside any event loop, and leave it usable
when they are interrupted.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gearshift.engine import Engine
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.backend import GenerationBackend
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec, request_id
from gearshift.types import Completion, SamplingParams, Trajectory
from tests.gyms import SayLetters, TwoTurns
from tests.zoo import random_model

PARAMS = SamplingParams(n=3, max_new_tokens=6, stop_token_ids=tuple(range(3, 259)))
STARTS = [EpisodeSpec(g, seed=g) for g in range(4)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer())


class Elsewhere:
    """Another program: it answers out of order, and what it samples names the request."""

    exact = False

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.running = 0

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        assert params.n == 1 and token_ids
        self.asked.append((request_id, sample))
        self.running += 1
        try:
            await asyncio.sleep(0.001 * (request_id + sample) % 7)
        finally:
            self.running -= 1
        ids = [3 + request_id % 50, 3 + sample]
        return Completion(ids, [-1.0, -2.0], [-1.0, -2.0], "stop", [4, 5])

    async def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None: ...

    def generating(self) -> nullcontext[None]:
        return nullcontext()

    def stats(self) -> dict[str, float]:
        return {}


def test_episodes_are_collected_from_a_backend_that_is_no_engine() -> None:
    backend = Elsewhere()
    with Collector(TwoTurns, tiny_tokenizer(), backend) as collector:
        episodes = collector.collect(STARTS, PARAMS)
    assert [t.group_id for t in episodes] == [g for g in range(4) for _ in range(3)]
    first = [(request_id(g), i) for g in range(4) for i in range(3)]
    second = [(request_id(g, 1, i), 0) for g in range(4) for i in range(3)]
    assert sorted(backend.asked) == sorted(first + second)
    for place, t in enumerate(episodes):
        own = [i for i, mask in enumerate(t.loss_mask) if mask]
        assert [t.weights_versions[i] for i in own] == [4, 5, 4, 5]
        assert [t.logprobs[i] for i in own] == [-1.0, -2.0, -1.0, -2.0]
        assert t.token_ids[own[1]] == 3 + place % 3 and t.rewards[own[1]] == 0.25


def test_the_engine_is_a_backend_and_exact(engine: Engine) -> None:
    backend: GenerationBackend = engine.loop
    assert backend.exact


@pytest.mark.parametrize("where", ["group", "step", "backend"])
def test_an_interrupt_leaves_the_engine_usable(
    engine: Engine, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]

    def interrupted(*_: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    class Slow(TwoTurns):
        def step(self, action: str) -> tuple:
            return super().step(action)

    long = SamplingParams(n=3, max_new_tokens=40)
    with engine.generating():
        expected = Collector(Slow, engine.tokenizer, engine.loop).collect(STARTS, long)
        collector = Collector(Slow, engine.tokenizer, engine.loop)
        with monkeypatch.context() as patch:
            if where == "step":
                run = engine.loop._decoder.run  # type: ignore[union-attr]
                patch.setattr(engine.loop._decoder, "run", lambda p: (interrupted(), run(p))[1])
            if where == "backend":
                add = engine.loop._enqueue
                patch.setattr(engine.loop, "_enqueue", lambda *a: (interrupted(), add(*a))[1])
            on_group = interrupted if where == "group" else lambda group: None
            with pytest.raises(KeyboardInterrupt):
                collector.collect(STARTS, long, on_group)
        assert engine.loop.idle
        engine.weights_changed()
        again = collector.collect(STARTS, long)
    assert [t.token_ids for t in again] == [t.token_ids for t in expected]
    collector.close()


def test_an_error_of_the_callback_ends_the_rollout(engine: Engine) -> None:
    def refuse(group: list[Trajectory]) -> None:
        raise ValueError("no more")

    with engine.generating(), Collector(SayLetters, engine.tokenizer, engine.loop) as collector:
        with pytest.raises(ValueError, match="no more"):
            collector.collect(STARTS, PARAMS, refuse)
        assert engine.loop.idle and not collector.failures


def test_a_notebook_collects_too(engine: Engine) -> None:
    """Where an event loop runs in this thread already."""

    async def cell() -> list[Trajectory]:
        with engine.generating():
            episodes = collector.collect(STARTS, PARAMS)
        await asyncio.sleep(0)  # the notebook's own loop goes on
        return episodes

    with Collector(TwoTurns, engine.tokenizer, engine.loop) as collector:
        with engine.generating():
            expected = collector.collect(STARTS, PARAMS)
        assert [t.token_ids for t in asyncio.run(cell())] == [t.token_ids for t in expected]
