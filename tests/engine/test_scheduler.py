"""Sequences come, share, are put back, are aborted, and none of it shows in what they write."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from gearshift.engine import Engine, EngineConfig
from gearshift.engine.cached_forward import CachedForward
from gearshift.errors import CapacityError, GearshiftError, NumericalError
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import AttentionMetadata
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, random_model


def engine(**config: object) -> Engine:
    """A GPU looks after each step, as a CPU does."""
    keys = EngineConfig.model_validate({"decode_steps_per_sync": 1, **config})
    return Engine(random_model("llama"), tiny_tokenizer(), keys, seed=3)


def available(e: Engine) -> tuple[int, int]:
    assert e.loop._scheduler is not None
    return e.loop._scheduler.cache.available, e.loop._scheduler.cache.blocks


def test_a_cache_too_small_for_all_puts_sequences_back() -> None:
    params = SamplingParams(n=6, max_new_tokens=40)
    small, large = engine(kv_cache_tokens=7 * 16), engine()
    with small.generating(), large.generating():
        ours, theirs = small.generate(PROMPTS, params), large.generate(PROMPTS, params)
    assert small.take_stats().preemptions > 0
    assert large.take_stats().preemptions == 0
    assert [[c.token_ids for c in g] for g in ours] == [[c.token_ids for c in g] for g in theirs]
    free, blocks = available(small)
    assert free == blocks == 7


def test_a_request_longer_than_the_cache_is_refused() -> None:
    e = engine(kv_cache_tokens=40)
    with e.generating(), pytest.raises(CapacityError, match=r"engine.kv_cache_tokens of 32"):
        e.generate([[3] * 20], SamplingParams(max_new_tokens=16))


@pytest.mark.parametrize("kernels", [None, ChunkedKernels()])
def test_a_long_prompt_is_computed_in_pieces(kernels: Kernels | None) -> None:
    """By the kernels of this machine, and by those of a GPU."""
    prompts = [[3 + i % 200 for i in range(n)] for n in (100, 33, 5, 64, 1)]
    params, forward = SamplingParams(n=2, max_new_tokens=8), CachedForward.__call__
    written, longest = [], []

    def counted(self: CachedForward, ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        longest[-1] = max(longest[-1], len(ids))
        return forward(self, ids, metadata)

    for most in (32, 4096):
        e = engine(max_num_batched_tokens=most)
        e.runner.kernels = kernels or e.runner.kernels
        longest.append(0)
        with e.generating(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(CachedForward, "__call__", counted)
            groups = e.generate(prompts, params)
        written.append([(c.token_ids, c.logprobs) for group in groups for c in group])
    assert longest[0] == 32 and longest[1] > 100
    assert [tokens for tokens, _ in written[0]] == [tokens for tokens, _ in written[1]]
    for (_, ours), (_, theirs) in zip(*written, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_completion_says_how_much_of_its_prompt_was_in_the_cache() -> None:
    prompt = list(range(10, 50))  # two blocks and a half
    params = SamplingParams(n=3, max_new_tokens=4)
    e = engine()
    with e.generating():
        [first], [again] = e.generate([prompt], params), e.generate([prompt], params)
        [other] = e.generate([prompt[1:]], params)
    assert [c.cached_tokens for c in first] == [0, 40, 40]
    assert [c.cached_tokens for c in again] == [32, 40, 40]
    assert [c.cached_tokens for c in other] == [0, 39, 39]
    assert first == again  # the cache changes nothing that is sampled


def test_a_sequence_that_is_put_back_keeps_what_it_found_in_the_cache() -> None:
    e = engine(kv_cache_tokens=7 * 16)
    with e.generating():
        groups = e.generate(PROMPTS, SamplingParams(n=6, max_new_tokens=40))
    assert e.take_stats().preemptions > 0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert all(c.cached_tokens <= len(prompt) for c in group)


def test_a_common_beginning_is_computed_once() -> None:
    system = list(range(10, 58))  # three blocks
    prompts = [[*system, 100 + i, 3] for i in range(5)]
    params = SamplingParams(n=2, max_new_tokens=6)
    e = engine()
    with e.generating():
        together = e.generate(prompts, params)
        stats = e.take_stats()
        assert stats.prefill_tokens == 50 + 4 * 2
        assert stats.shared_tokens == 10 * 50 - stats.prefill_tokens
        e.generate(prompts, params)
        assert e.take_stats().prefill_tokens == 5 * 2
    lone = engine()
    with lone.generating():
        for i, prompt in enumerate(prompts):
            lone.weights_changed()  # forgets
            [alone] = lone.generate([prompt], params, [i])
            assert [c.token_ids for c in alone] == [c.token_ids for c in together[i]]
            assert lone.take_stats().prefill_tokens == 50


def test_a_conversation_goes_on_from_its_cache() -> None:
    e, params = engine(), SamplingParams(max_new_tokens=40, temperature=0.0)
    with e.generating():
        [[first]] = e.generate([[5] * 20], params)
        e.take_stats()
        turn = [*([5] * 20), *first.token_ids, 7, 8]
        [[second]] = e.generate([turn], params)
        assert e.take_stats().prefill_tokens <= 16 + 3
        e.weights_changed()
        [[anew]] = e.generate([turn], params)
    assert second.token_ids == anew.token_ids


def test_streams_run_side_by_side() -> None:
    e, params = engine(), SamplingParams(max_new_tokens=12)
    with e.generating():
        expected = [g[0].token_ids for g in e.generate(PROMPTS, params)]
        streams = [e.stream(p, params, request_id=i) for i, p in enumerate(PROMPTS)]
        heard: list[list[int]] = [[] for _ in streams]
        for _ in range(12):
            for i, stream in enumerate(streams):
                heard[i] += [token for token in [next(stream, None)] if token is not None]
    assert heard == expected
    assert streams[0].completion.finish_reason in ("stop", "length")


def test_generate_runs_beside_a_stream() -> None:
    e, params = engine(), SamplingParams(max_new_tokens=20)
    with e.generating():
        [[alone]] = e.generate(PROMPTS[:1], params, [4])
        stream = e.stream(PROMPTS[0], params, request_id=4)
        start = [next(stream), next(stream)]
        e.generate(PROMPTS[1:], params)
        assert start + list(stream) == alone.token_ids


def test_an_aborted_stream_gives_its_blocks_back() -> None:
    e = engine(max_num_seqs=2)
    with e.generating():
        long = SamplingParams(max_new_tokens=40, logit_bias=((2, -100.0),))
        streams = [e.stream(p, long, request_id=i) for i, p in enumerate(PROMPTS)]
        next(streams[0])
        streams[0].abort()  # live
        streams[3].abort()  # waiting
        assert list(streams[3]) == [] and len(list(streams[1])) == 40
        assert streams[0].completion.finish_reason == "abort"
        assert len(streams[0].completion.token_ids) == 1
        list(streams[2])
    free, blocks = available(e)
    assert free == blocks


def test_weights_do_not_change_under_a_running_request() -> None:
    e = engine()
    with e.generating():
        stream = e.stream(PROMPTS[0], SamplingParams(max_new_tokens=30))
        next(stream)
        with pytest.raises(GearshiftError, match="while requests were running"):
            e.weights_changed()
        stream.abort()
        e.weights_changed()


def test_a_write_that_nobody_announced_is_noticed() -> None:
    e, params = engine(), SamplingParams(max_new_tokens=12)
    prompt = list(range(10, 60))
    with e.generating():
        e.generate([prompt], params)
    with torch.no_grad():
        e.model.base_model.embed_tokens.weight.add_(0.3)
    version = e.weights_version
    with e.generating():
        ours = e.generate([prompt], params)[0][0].token_ids
        assert e.weights_version == version + 1 and e.take_stats().prefill_tokens > 0
        e.weights_changed()
        assert ours == e.generate([prompt], params)[0][0].token_ids


def test_broken_weights_say_so() -> None:
    e = engine()
    e.model.base_model.norm.weight.data.fill_(float("nan"))
    with e.generating():
        for temperature in (0.0, 1.0):
            with pytest.raises(NumericalError, match="not finite"):
                e.generate([[3, 4]], SamplingParams(max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_an_error_in_the_middle_loses_nothing_but_its_requests(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, params = engine(kv_cache_tokens=200), SamplingParams(n=2, max_new_tokens=12)
    with e.generating():
        expected = [c.token_ids for g in e.generate(PROMPTS, params) for c in g]
        stream = e.stream(PROMPTS[0])
        calls = 0

        def interrupted(*args: object) -> None:
            nonlocal calls
            calls += 1
            if calls == (1 if when == "prefill" else 4):
                raise KeyboardInterrupt

        assert e.loop._decoder is not None
        patched = e.loop._decoder.forward if when == "prefill" else e.loop._decoder
        name = "_logits" if when == "prefill" else "decode_steps"
        forward = getattr(patched, name)
        monkeypatch.setattr(patched, name, lambda *a: (interrupted(), forward(*a))[1])
        with pytest.raises(KeyboardInterrupt):
            e.generate(PROMPTS, params)
        with pytest.raises(GearshiftError, match="send it again"):
            list(stream)
        assert expected == [c.token_ids for g in e.generate(PROMPTS, params) for c in g]
    free, blocks = available(e)
    assert free == blocks


def test_a_soak_of_ten_thousand_requests() -> None:
    """Random lengths, shared beginnings, aborts, a cache for a few: every block comes back, and
    what was not aborted is what it is alone.
    """
    rng = random.Random(0)
    e = engine(kv_cache_tokens=24 * 16, max_num_seqs=48, max_num_batched_tokens=200)
    beginnings = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 60))] for _ in range(30)]
    requests = [
        (
            [*rng.choice(beginnings), *(rng.randrange(3, 250) for _ in range(rng.randrange(1, 8)))],
            SamplingParams(n=1, max_new_tokens=rng.choice([1, 2, 5, 8, 30, 70]), seed=i),
        )
        for i in range(10_000)
    ]
    ended, running = {}, {}
    with e.generating():
        waiting = iter(enumerate(requests))
        while True:
            for i, (prompt, params) in itertools.islice(waiting, 100 - len(running)):
                running[i] = e.stream(prompt, params, request_id=i)
            if not running:
                break
            e.loop.step()
            if rng.random() < 0.3:
                running[rng.choice(list(running))].abort()
            for i in [i for i, s in running.items() if s._sequence.finish_reason is not None]:
                ended[i] = running.pop(i).completion
    assert len(ended) == 10_000
    free, blocks = available(e)
    assert free == blocks == 24
    stats = e.take_stats()
    assert stats.preemptions > 0 and stats.shared_tokens > 0
    reasons = [c.finish_reason for c in ended.values()]
    assert {"stop", "length", "abort"} <= set(reasons)
    lone = engine()
    with lone.generating():
        for i in rng.sample(range(10_000), 300):
            lone.weights_changed()
            [[alone]] = lone.generate([requests[i][0]], requests[i][1], [i])
            wrote = ended[i].token_ids
            assert wrote == alone.token_ids[: len(wrote)]
            assert ended[i].finish_reason == "abort" or wrote == alone.token_ids
