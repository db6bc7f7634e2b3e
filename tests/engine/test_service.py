"""Requests of other threads: the same completions, and nothing that the engine's owner notices."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.engine.service import EngineService, SampledToken
from gearshift.errors import CapacityError, GearshiftError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import Completion, SamplingParams, TokenScore
from tests.zoo import random_model

PARAMS = SamplingParams(max_new_tokens=12, logit_bias={2: -100.0})
LONG = SamplingParams(max_new_tokens=200, logit_bias={2: -100.0})
PROMPT = list(range(10, 50))


def engine(**config: object) -> Engine:
    keys = EngineConfig.model_validate({"decode_steps_per_sync": 1, **config})
    return Engine(random_model("llama"), tiny_tokenizer(), keys, seed=3)


def alone(requests: list[tuple[list[int], int]], params: SamplingParams) -> list[Completion]:
    one = engine()
    with one.generating():
        prompts, ids = zip(*requests, strict=True)
        return [group[0] for group in one.generate(prompts, params, ids)]


@pytest.fixture
def service() -> Iterator[EngineService]:
    with EngineService(engine(max_num_seqs=4)) as service:
        yield service


async def told(service: EngineService, *arguments: Any) -> list[SampledToken]:
    return [token async for token in service.stream(*arguments)]


async def settles(service: EngineService) -> None:
    """Wait until no request is left; then no block of the cache is."""
    while service.waiting or service.running:
        await asyncio.sleep(0.01)

    def free(e: Engine) -> bool:
        scheduler = e.loop._scheduler
        return scheduler is None or (
            scheduler.idle and scheduler.cache.available == scheduler.cache.blocks
        )

    while not await service.call(free):
        await asyncio.sleep(0.01)


def test_completions_and_streams_are_those_of_generate(service: EngineService) -> None:
    requests = [([*PROMPT, i], i) for i in range(10)]

    async def ask() -> tuple[list[Completion], list[list[SampledToken]]]:
        calls = [service.generate(prompt, PARAMS, i) for prompt, i in requests]
        streams = [told(service, prompt, PARAMS, i) for prompt, i in requests]
        return await asyncio.gather(*calls), await asyncio.gather(*streams)

    completions, streams = asyncio.run(ask())
    expected = alone(requests, PARAMS)
    assert completions == expected
    for tokens, completion in zip(streams, expected, strict=True):
        assert [t.token for t in tokens] == completion.token_ids
        assert [t.logprob for t in tokens] == completion.logprobs
        assert [t.drawn_logprob for t in tokens] == completion.drawn_logprobs
        assert [t.weights_version for t in tokens] == completion.weights_versions
        reasons = [t.finish_reason for t in tokens]
        assert reasons == [None] * (len(tokens) - 1) + [completion.finish_reason]


def test_a_stream_says_how_much_of_its_prompt_was_in_the_cache(service: EngineService) -> None:
    first = asyncio.run(service.generate(PROMPT, PARAMS, 0))
    again = asyncio.run(told(service, PROMPT, PARAMS, 1))
    assert first.cached_tokens == 0 and {t.cached_tokens for t in again} == {32}


def test_scores_of_sampled_and_of_given_tokens_are_the_engines(service: EngineService) -> None:
    params = replace(PARAMS, top_logprobs=2, temperature=0.5)
    texts = [[*PROMPT, i] for i in range(3)]

    async def ask() -> tuple[list[SampledToken], Completion, list[list[TokenScore]]]:
        stream, call = told(service, PROMPT, params, 0), service.generate(PROMPT, params, 0)
        scores = asyncio.gather(*(service.score(ids, 2) for ids in texts))
        return await asyncio.gather(stream, call, scores)

    tokens, completion, scores = asyncio.run(ask())
    [expected] = alone([(PROMPT, 0)], params)
    assert completion == expected and len(expected.top_logprobs[0]) == 2
    assert [t.raw_logprob for t in tokens] == expected.raw_logprobs
    assert [t.top for t in tokens] == expected.top_logprobs
    one = engine()
    with one.generating():
        assert scores == [one.score(ids, 2) for ids in texts]
    assert [t.raw_logprob for t in asyncio.run(told(service, PROMPT, PARAMS, 0))] == [None] * 12
    with pytest.raises(CapacityError, match="The text is empty"):
        asyncio.run(service.score([]))


def test_running_requests_advance_between_two_calls(service: EngineService) -> None:
    async def ask() -> list[int]:
        stream = service.stream(PROMPT, LONG, 0)
        await anext(stream)
        [request] = service._guests

        def length(_: Engine) -> int:
            return len(request.token_ids)

        found = await asyncio.gather(*(service.call(length) for _ in range(5)))
        await stream.aclose()
        return found

    found = asyncio.run(ask())
    assert found == list(range(found[0], found[0] + 5))


def test_requests_of_one_moment_share_their_prompt(service: EngineService) -> None:
    async def ask() -> None:
        await asyncio.gather(*(service.generate(PROMPT, PARAMS, 7, i) for i in range(4)))

    asyncio.run(ask())
    done = asyncio.run(service.call(lambda e: e.take_stats()))
    assert done.prefill_tokens == len(PROMPT)


def test_several_event_loops_ask_at_a_time(service: EngineService) -> None:
    found: dict[int, Completion] = {}

    def ask(i: int) -> None:
        found[i] = asyncio.run(service.generate(PROMPT, PARAMS, i))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == alone([(PROMPT, i) for i in range(6)], PARAMS)


def test_a_caller_that_leaves_ends_its_request_alone(service: EngineService) -> None:
    async def ask() -> None:
        tasks = [asyncio.create_task(service.generate(PROMPT, LONG, i)) for i in range(6)]
        stream = service.stream(PROMPT, LONG, 9)
        assert (await anext(stream)).finish_reason is None
        kept = asyncio.create_task(service.generate(PROMPT, PARAMS, 10))
        await stream.aclose()
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        assert [await kept] == alone([(PROMPT, 10)], PARAMS)
        await settles(service)
        assert service.waiting == service.running == 0

    asyncio.run(ask())
    sampled = asyncio.run(service.call(lambda e: e.take_stats().decode_tokens))
    assert sampled < LONG.max_new_tokens, "it sampled for those that had left"


def test_an_event_loop_that_ends_leaves_nothing_behind(service: EngineService) -> None:
    async def leaves() -> None:
        asyncio.get_running_loop().create_task(service.generate(PROMPT, LONG, 1))
        await asyncio.sleep(0.05)

    asyncio.run(leaves())
    gc.collect()
    asyncio.run(settles(service))


def test_a_request_that_cannot_run_is_refused_at_once(service: EngineService) -> None:
    with pytest.raises(CapacityError):
        asyncio.run(service.generate([], PARAMS, 0))
    assert service.waiting == 0


def test_an_error_in_a_step_ends_its_requests_and_the_next_one_works(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> list[Any]:
        await service.generate(PROMPT, PARAMS, 0)
        decoder = service._engine.loop._decoder
        monkeypatch.setattr(decoder, "run", lambda _: 1 / 0)
        calls = [service.generate(PROMPT, PARAMS, i) for i in range(3)]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    errors = asyncio.run(ask())
    assert all(isinstance(e, GearshiftError) and "send it again" in str(e) for e in errors)
    assert asyncio.run(service.generate(PROMPT, PARAMS, 5)) == alone([(PROMPT, 5)], PARAMS)[0]


def test_closing_ends_what_runs_with_an_error() -> None:
    service = EngineService(engine())

    async def ask() -> list[Any]:
        calls = [asyncio.create_task(service.generate(PROMPT, LONG, i)) for i in range(2)]
        calls.append(asyncio.create_task(told(service, PROMPT, LONG, 3)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(service.close)
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(e) for e in asyncio.run(ask())] == [GearshiftError] * 3
    with pytest.raises(GearshiftError, match="stopped"):
        asyncio.run(service.generate(PROMPT, PARAMS, 0))
    with service._engine.generating():  # whoever comes next has the engine
        service._engine.generate([PROMPT], PARAMS)


def test_what_a_call_raises_its_caller_gets(service: EngineService) -> None:
    def fails(_: Engine) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(service.call(fails))
    assert asyncio.run(service.call(lambda e: e.weights_version)) == 0


class Beside:
    """Requests in another thread while a run uses the engine, for as long as it is open."""

    def __init__(self, e: Engine) -> None:
        self.service = EngineService(e, own_thread=False)
        self.completions: list[Completion] = []
        self.thread = threading.Thread(target=asyncio.run, args=(self.ask(),))
        self.thread.start()
        while not self.service.waiting:
            pass

    async def ask(self) -> None:
        with suppress(GearshiftError):
            for i in range(1000):
                self.completions.append(await self.service.generate(PROMPT, LONG, i))

    def close(self) -> None:
        self.service.close()
        self.thread.join()


def steps(e: Engine) -> list[Any]:
    """A run: it samples, and changes its weights."""
    found: list[Any] = []
    for step in range(4):
        with e.generating():
            prompts = [[*PROMPT, step, i] for i in range(3)]
            found.append(e.generate(prompts, SamplingParams(n=2, max_new_tokens=30)))
        with e.training(), torch.no_grad():
            for parameter in e.model.parameters():
                parameter.mul_(1.01)
            e.weights_changed()
    return found


def test_requests_beside_a_run_change_none_of_its_samples() -> None:
    expected = steps(engine(max_num_seqs=4))
    e = engine(max_num_seqs=4)
    beside = Beside(e)
    found = steps(e)
    beside.close()
    assert found == expected


def test_a_request_goes_on_with_the_new_weights_and_its_tokens_say_so() -> None:
    e = engine()
    beside = Beside(e)
    steps(e)
    steps(e)
    steps(e)
    beside.close()
    done = beside.completions[0]
    assert done.finish_reason == "length" and len(done.token_ids) == LONG.max_new_tokens
    assert done.weights_versions == sorted(done.weights_versions)
    assert len(set(done.weights_versions)) > 3
    # The first version's tokens are those that it alone samples.
    first = done.weights_versions.count(0)
    assert done.token_ids[:first] == alone([(PROMPT, 0)], LONG)[0].token_ids[:first]
    # Each token has the log-prob that the weights of its version give it after all before it.
    newest = done.weights_versions[-1]
    at = [i for i, v in enumerate(done.weights_versions) if v == newest]
    model = random_model("llama")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for _ in range(newest):
            for parameter in model.parameters():
                parameter.mul_(1.01)
        ids = torch.tensor([[*PROMPT, *done.token_ids]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    scored = [float(logprobs[len(PROMPT) + i - 1, done.token_ids[i]]) for i in at]
    assert scored == pytest.approx([done.logprobs[i] for i in at], abs=1e-4)


def test_requests_that_wait_while_a_run_trains_have_no_row() -> None:
    e = engine()
    beside = Beside(e)
    while not beside.service.running:
        with e.generating():
            e.generate([PROMPT], SamplingParams(max_new_tokens=2))
    with e.training():
        e.weights_changed()
        assert (beside.service.running, beside.service.waiting) == (0, 1)
    beside.close()


def test_an_engine_has_one_service(service: EngineService) -> None:
    with pytest.raises(GearshiftError, match="has a service already"):
        EngineService(service._engine)
