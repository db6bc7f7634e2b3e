"""One owner steps the engine, whoever awaits, streams or calls; what nobody wants any more ends."""

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import CapacityError, ConfigError, GearshiftError, ModelError
from gearshift.models.load import save_model
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import Completion, SamplingParams
from tests.zoo import PROMPTS, assert_same, random_model, written

PARAMS = SamplingParams(max_new_tokens=12, logit_bias={2: -100.0})
PROMPT = list(range(10, 50))


def engine(**config: object) -> Engine:
    """A GPU looks after each step, as a CPU does."""
    keys = EngineConfig.model_validate({"decode_steps_per_sync": 1, **config})
    return Engine(random_model("llama"), tiny_tokenizer(), keys, seed=3)


def free(e: Engine) -> bool:
    assert e.loop._scheduler is not None
    return e.loop.idle and e.loop._scheduler.cache.available == e.loop._scheduler.cache.blocks


async def samples(e: Engine, n: int, prompt: list[int] = PROMPT) -> list[Completion]:
    return await asyncio.gather(*(e.loop.generate(prompt, PARAMS, 7, i) for i in range(n)))


def test_awaited_completions_are_those_of_generate() -> None:
    one, other = engine(max_num_seqs=3), engine(max_num_seqs=3)
    with one.generating(), other.generating():
        [expected] = one.generate([PROMPT], SamplingParams(n=5, **as_keys(PARAMS)), [7])
        awaited = asyncio.run(samples(other, 5))
    assert awaited == expected
    ours, theirs = one.take_stats(), other.take_stats()
    assert ours.prefill_tokens == theirs.prefill_tokens
    assert ours.decode_steps == theirs.decode_steps


def as_keys(params: SamplingParams) -> dict[str, Any]:
    names = ("max_new_tokens", "logit_bias", "temperature")
    return {name: getattr(params, name) for name in names}


def test_the_samples_of_a_tick_are_a_group_whose_prompt_is_computed_once() -> None:
    e = engine()
    with e.generating():
        asyncio.run(samples(e, 6))
    done = e.take_stats()
    assert done.prefill_tokens == len(PROMPT) and done.shared_tokens == 5 * len(PROMPT)


def test_the_event_loop_is_entered_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    e, entered = engine(), [0]
    sleep = asyncio.sleep

    async def counted(seconds: float) -> None:
        entered[0] += 1
        await sleep(seconds)

    monkeypatch.setattr("gearshift.engine.loop.asyncio.sleep", counted)
    with e.generating():
        asyncio.run(samples(e, 8))
    assert entered[0] <= e.take_stats().decode_steps + 3


def test_a_call_that_is_cancelled_ends_its_request() -> None:
    e = engine()

    async def main() -> list[Completion]:
        long = SamplingParams(max_new_tokens=200, logit_bias={2: -100.0})
        lost = asyncio.create_task(e.loop.generate(PROMPT, long, 1))
        kept = await samples(e, 2)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        assert e.loop.idle
        return kept

    with e.generating():
        asyncio.run(main())
    assert free(e)


@pytest.mark.parametrize("read", [0, 3])
def test_a_stream_that_is_lost_holds_up_nobody(read: int) -> None:
    e = engine()

    async def half() -> None:
        stream = e.loop.stream(PROMPT, PARAMS)
        for _ in range(read):
            await anext(stream)

    with e.generating():
        stream = e.stream(PROMPT, PARAMS)
        for _ in range(read):
            next(stream)
        del stream
        e.weights_changed()
        asyncio.run(half())
        gc.collect()
        e.weights_changed()
        for token in e.stream(PROMPT, PARAMS):
            assert token >= 0
            break
        e.generate([PROMPT], PARAMS)
    assert free(e)


def test_streams_are_read_beside_each_other_by_tasks() -> None:
    e = engine()

    async def read(i: int) -> list[int]:
        return [token async for token in e.loop.stream(PROMPTS[i], PARAMS, i)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*map(read, range(len(PROMPTS))))

    with e.generating():
        expected = [g[0].token_ids for g in e.generate(PROMPTS, PARAMS)]
        assert asyncio.run(main()) == expected


def test_synchronous_calls_work_inside_a_running_event_loop() -> None:
    """As in a notebook: what is awaited meanwhile goes on with them."""
    e = engine()

    async def cell() -> tuple[list[Completion], list[Completion]]:
        awaited = asyncio.create_task(samples(e, 2))
        await asyncio.sleep(0)
        called = e.generate(PROMPTS, PARAMS)
        return [group[0] for group in called], await awaited

    with e.generating():
        expected = [g[0] for g in e.generate(PROMPTS, PARAMS)]
        called, awaited = asyncio.run(cell())
        alone = asyncio.run(samples(e, 2))
        assert_same(written([called, awaited]), written([expected, alone]))


def test_an_error_in_a_step_reaches_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()

    async def main() -> list[Any]:
        return await asyncio.gather(*(samples(e, 2), samples(e, 1)), return_exceptions=True)

    with e.generating():
        expected = asyncio.run(samples(e, 2))
        decoder = e.loop._decoder
        monkeypatch.setattr(decoder, "decode_steps", lambda *_: 1 / 0)
        ends = asyncio.run(main())
        assert [type(end) for end in ends] == [ZeroDivisionError] * 2
        assert e.loop.idle
        assert asyncio.run(samples(e, 2)) == expected


def test_a_gear_that_is_left_is_an_error_and_no_hang() -> None:
    e = engine()

    async def main() -> Any:
        with pytest.raises(GearshiftError, match="needs the generation gear"):
            await e.loop.generate(PROMPT, PARAMS, 1)
        with e.generating():
            late = asyncio.create_task(e.loop.generate(PROMPT, PARAMS, 1))
            await asyncio.sleep(0)
        with pytest.raises(GearshiftError, match="needs the generation gear"):
            await late

    asyncio.run(main())
    e.weights_changed()


def test_a_request_that_cannot_be_is_refused_when_it_comes() -> None:
    e = engine()
    with e.generating(), pytest.raises(CapacityError, match="The prompt is empty"):
        asyncio.run(e.loop.generate([], PARAMS, 1))


def test_weights_are_replaced_and_named_by_their_version(tmp_path: Path) -> None:
    e, other = engine(), engine()
    with torch.no_grad():
        other.model.base_model.embed_tokens.weight.add_(0.3)
    save_model(tmp_path, other.model, other.tokenizer, "card", None, None)
    tensors = {name: p.clone() for name, p in other.model.named_parameters()}
    with e.generating():
        before = asyncio.run(samples(e, 2))
        asyncio.run(e.loop.update_weights(tmp_path, 7))
        from_folder = asyncio.run(samples(e, 2))
        asyncio.run(e.loop.update_weights(tensors, 9))
        from_tensors = asyncio.run(samples(e, 2))
        with pytest.raises(ConfigError, match="a new one is greater, and not 9"):
            e.update_weights(tensors, 9)
        with pytest.raises(ModelError, match="The new weights lack"):
            e.update_weights(dict(list(tensors.items())[1:]), 10)
        assert asyncio.run(samples(e, 2)) == from_tensors
        running = e.stream(PROMPT, PARAMS, 7)
        with pytest.raises(GearshiftError, match="while requests were running"):
            e.update_weights(tensors, 11)
        assert list(running) == from_tensors[0].token_ids
    with other.generating():
        expected = asyncio.run(samples(other, 2))
    for c, version in ((from_folder, 7), (from_tensors, 9)):
        assert [s.token_ids for s in c] == [s.token_ids for s in expected]
        assert {v for s in c for v in s.weights_versions} == {version}
    assert [s.token_ids for s in before] != [s.token_ids for s in expected]


def test_figures_are_those_since_they_were_last_asked_for() -> None:
    e = engine()
    with e.generating():
        e.generate([PROMPT], SamplingParams(n=2, max_new_tokens=4))
    stats = e.loop.stats()
    assert stats["shared_tokens"] == len(PROMPT) and stats["decode_seconds"] > 0
    assert e.loop.stats()["shared_tokens"] == 0
