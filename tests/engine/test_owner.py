"""One engine, one owner: what threads, engines or a fork would compute wrongly is refused."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gearshift.engine import Engine
from gearshift.errors import GearshiftError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, pack_completions, tiny_model

PARAMS = SamplingParams(n=2, max_new_tokens=8)


def write(engine: Engine) -> list[list[int]]:
    with engine.generating():
        return [c.token_ids for g in engine.generate(PROMPTS, PARAMS) for c in g]


def score(engine: Engine) -> Any:
    with engine.generating():
        groups = engine.generate(PROMPTS, PARAMS)
    with engine.training():
        return engine.logprobs(pack_completions(PROMPTS, groups)).logprobs


def step(engine: Engine) -> None:
    engine.loop.step()


USES: list[Callable[[Engine], Any]] = [write, score, step, Engine.weights_changed]


@pytest.mark.parametrize("use", USES)
def test_a_second_thread_is_refused_while_one_is_inside(use: Callable[[Engine], Any]) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    expected = write(engine)
    with ThreadPoolExecutor(1) as pool:
        with engine.generating():
            stream = engine.stream(PROMPTS[0], PARAMS)
            next(stream)
            with pytest.raises(GearshiftError, match="Another thread uses this engine"):
                pool.submit(use, engine).result()
            assert [stream.completion.token_ids[0], *stream] == expected[0]
        assert pool.submit(write, engine).result() == expected  # one after the other may


def test_of_two_threads_at_once_one_is_right_and_one_is_refused() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    expected = write(engine)
    ready = threading.Barrier(4)

    def both(_: int) -> Any:
        ready.wait()
        try:
            return write(engine)
        except GearshiftError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(both, range(4)))
    assert expected in ends
    assert all(end == expected or "Another thread" in end for end in ends)


def test_another_engine_of_the_model_is_refused_meanwhile() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    expected = write(engine)
    other = Engine(engine.model, tiny_tokenizer())
    with engine.generating():
        with pytest.raises(GearshiftError, match="Another engine of this model"):
            write(other)
        with pytest.raises(GearshiftError, match="Another engine of this model"):
            Engine(engine.model, tiny_tokenizer())
    assert write(other) == write(engine) == expected


def test_a_step_inside_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    with engine.generating():
        stream = engine.stream(PROMPTS[0], PARAMS)
        next(stream)
        monkeypatch.setattr(engine.loop._decoder, "run", lambda _: engine.loop.step())
        with pytest.raises(GearshiftError, match="called itself"):
            next(stream)
    assert write(engine)


def test_a_forked_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    parent = os.getpid()
    monkeypatch.setattr("gearshift.engine.owner.os.getpid", lambda: parent + 1)
    with pytest.raises(GearshiftError, match="forked"):
        write(engine)


def test_tasks_do_not_leave_their_gears_in_another_order() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())

    async def trains() -> None:
        with engine.training():
            await asyncio.sleep(0)

    async def writes() -> None:
        with engine.generating():
            for _ in range(3):
                await asyncio.sleep(0)

    async def reads() -> list[int]:
        return list(engine.stream(PROMPTS[0], PARAMS))

    async def both() -> None:
        ends = await asyncio.gather(writes(), trains(), return_exceptions=True)
        assert ends[0] is None
        assert "Another task of this thread" in str(ends[1])
        await trains()
        with engine.generating():  # around both
            assert len(await asyncio.gather(reads(), reads())) == 2

    asyncio.run(both())
    assert engine.gear is None
    assert torch.is_grad_enabled()
    assert write(engine)
