"""Captured steps: how many there are and when, what they hold, and that they are never stale."""

import gc
import math
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from gearshift.engine import Engine, EngineConfig
from gearshift.engine import cache_size as sizes
from gearshift.engine.block_cache import KVCache
from gearshift.engine.cache_size import cache_capacity, position_bytes
from gearshift.engine.decoder import Decoder
from gearshift.engine.sequence import SamplingLimits
from gearshift.errors import CapacityError
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK
from gearshift.models.adapters import AdapterConfig, adapted_layers, adapters_off, add_adapter
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import Completion, SamplingParams
from tests.device import on_card
from tests.zoo import PROMPTS, random_model


class Ahead(Kernels):
    """Tensor functions that capture as a GPU does, and note the rows and columns of captures."""

    captures_ahead = True

    def __init__(self) -> None:
        self.captured: list[torch.Size] = []

    def padded_rows(self, rows: int) -> int:
        return 1 << (rows - 1).bit_length()

    def capture(self, prepare: Any, run: Any) -> Any:
        prepare()
        self.captured.append(run().shape)

        def again() -> Tensor:
            prepare()
            out: Tensor = run()
            return out

        return again


def engine(kernels: Kernels | None = None, name: str = "llama", **config: Any) -> Engine:
    one = Engine(random_model(name), tiny_tokenizer(), EngineConfig(**config), seed=3)
    if kernels is not None:
        one.runner.kernels = kernels
    return one


def on_gpu(**config: Any) -> Engine:
    model = random_model("llama").to(torch.bfloat16)
    return Engine(model, tiny_tokenizer(), EngineConfig(max_num_seqs=8, **config), seed=3)


def written(e: Engine, new: int = 6, n: int = 2) -> list[list[Completion]]:
    with e.generating():
        return e.generate(PROMPTS[:2], SamplingParams(n=n, max_new_tokens=new))


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in groups]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_all_sizes_are_captured_before_the_first_token_and_never_again() -> None:
    kernels = Ahead()
    e = engine(kernels, max_num_seqs=3)
    first = written(e, new=1)
    assert [rows for rows, _ in kernels.captured] == [4, 2, 1]
    decoder = e.loop._decoder
    assert decoder is not None
    columns = {step.tensors.block_tables.shape[1] for step in decoder._captured.values()}
    assert len(columns) == 1 and columns.pop() > e.max_length // BLOCK
    assert tokens(first) == tokens(written(engine(Kernels(), max_num_seqs=3), new=1))
    for new, n in ((3, 1), (40, 2), (200, 3)):
        assert tokens(written(e, new, n)) == tokens(
            written(engine(Kernels(), max_num_seqs=3), new, n)
        )
    assert len(kernels.captured) == 3 == len(decoder._captured)


def test_a_model_that_cannot_be_captured_is_not_tried() -> None:
    kernels = Ahead()
    e = engine(kernels)
    e.runner.plan = None
    e.runner.weights = None
    written(e)
    off = engine(kernels, capture_steps=False)
    assert tokens(written(off)) == tokens(written(engine(Kernels())))
    assert kernels.captured == [] and off.memory()["steps"] == 0


def test_the_cache_never_moves() -> None:
    e = engine(Ahead(), max_num_seqs=4)
    written(e, new=1, n=1)
    scheduler = e.loop._scheduler
    assert scheduler is not None
    cache = scheduler.cache
    capacity, places = cache.capacity, {i: store.data_ptr() for i, store in cache._layers.items()}
    written(e, new=200)
    assert e.loop._scheduler is scheduler and cache.capacity == capacity
    assert {i: store.data_ptr() for i, store in cache._layers.items()} == places


@pytest.mark.parametrize("how", ["shift", "error"])
def test_the_cache_is_freed_without_a_collection(
    no_collection: None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = engine(free_cache_while_training=True)
    written(e)
    scheduler, decoder = e.loop._scheduler, e.loop._decoder
    assert scheduler is not None and decoder is not None and decoder._captured
    held = [ref(scheduler.cache), ref(decoder), *map(ref, decoder._captured.values())]
    del scheduler, decoder
    if how == "shift":
        with e.training():
            pass
    else:
        monkeypatch.setattr(Decoder, "decode_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            written(e)
    assert [one() for one in held] == [None] * len(held)


def test_kernels_stay_while_the_model_does() -> None:
    """With them a GPU keeps its stream, and cuBLAS's workspace for it."""
    e = engine(free_cache_while_training=True)
    kernels = e.runner.kernels
    written(e)
    with e.training():
        assert e.memory()["steps"] == 0
    assert e.runner.kernels is kernels
    e.model.to(torch.bfloat16)
    written(e)
    assert e.runner.kernels is not kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_follow_adapters(dtype: torch.dtype) -> None:
    """What was captured without adapters is not replayed with them, nor the other way round."""

    def generations(**config: Any) -> list[list[list[list[int]]]]:
        model = random_model("llama").to(dtype)
        add_adapter(model, AdapterConfig(rank=4))
        for _, layer in adapted_layers(model):
            layer.lora_B["default"].weight.data.normal_()
        e = Engine(model, tiny_tokenizer(), EngineConfig(**config), seed=3)
        with adapters_off(model):
            off = tokens(written(e))
        on = tokens(written(e))
        with adapters_off(model):
            return [off, on, tokens(written(e))]

    torch.manual_seed(1)
    captured = generations()
    torch.manual_seed(1)
    assert captured == generations(capture_steps=False)
    assert captured[0] == captured[2] != captured[1]


def test_a_row_that_has_ended_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps ahead of its end may give anything."""
    e = engine(decode_steps_per_sync=8, kv_cache_tokens=512)
    steps = Decoder.decode_steps

    def broken(self: Decoder, *arguments: Any) -> Any:
        logits, drawn, logprobs = steps(self, *arguments)
        logprobs[2:, 0] = math.nan  # the first row ends with its third token
        return logits, drawn, logprobs

    monkeypatch.setattr(Decoder, "decode_steps", broken)
    params = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=9)]
    e.end_tokens = frozenset()
    with e.generating():
        groups = e.generate(PROMPTS[:2], params)
    assert [len(group[0].token_ids) for group in groups] == [3, 9]


class OnGPU:
    """A model as if it were on a GPU."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        model = random_model("llama")
        self.config, self.dtype, self.parameters = model.config, model.dtype, model.parameters


def test_a_gpus_cache_is_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = OnGPU()
    weights, block = sum(p.nbytes for p in model.parameters()), BLOCK * position_bytes(model, 4)
    monkeypatch.setattr(sizes, "total_bytes", lambda device: weights + 10.5 / 0.3 * block)
    config = EngineConfig(max_num_seqs=4)
    assert [cache_capacity(model, config, 256, needed) for needed in (1, 500)] == [10, 10]
    more = config.model_copy(update={"gpu_memory_utilization": 0.95})
    assert cache_capacity(model, more, 256, 1) > 20
    assert cache_capacity(model, more, 2 * BLOCK, 1) == 8  # 4 of the longest sequences
    bounded = EngineConfig(kv_cache_tokens=100 * BLOCK)
    assert cache_capacity(model, bounded, 256, 1) == 100
    full = EngineConfig(gpu_memory_utilization=0.01)
    with pytest.raises(CapacityError, match=r"raise engine\.gpu_memory_utilization"):
        cache_capacity(model, full, 256, 1)


def test_a_request_beyond_a_gpus_cache_names_the_key() -> None:
    limits = SamplingLimits(259, 256, 32, "gpu_memory_utilization", 0, frozenset())
    with pytest.raises(CapacityError, match=r"engine\.gpu_memory_utilization of 32"):
        limits.sequence([3] * 30, SamplingParams(max_new_tokens=5), 0)


def test_an_engine_that_nothing_uses_makes_room_for_the_cache(
    no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros, old = torch.zeros, engine()
    written(old)
    alive = ref(old)
    del old

    def full(*shape: Any, **how: Any) -> Tensor:
        if alive() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*shape, **how)

    monkeypatch.setattr(torch, "zeros", full)
    assert len(KVCache(4).layer(0, torch.empty(1, 2, 8, device="meta"))) == 5


def test_a_gpu_that_has_no_memory_for_the_cache_names_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    like = torch.empty(1, 2, 8, device="meta")
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(CapacityError, match=r"lower engine\.gpu_memory_utilization"):
        KVCache(4).layer(0, like)


@on_card
def test_a_card_gives_everything_back_without_a_collection(no_collection: None) -> None:
    """Cache and graphs, twice, while another engine keeps its own."""
    kept, e = on_gpu(), on_gpu(free_cache_while_training=True)
    expected = tokens(written(kept))
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        assert tokens(written(e)) == expected
        assert e.memory()["steps"] > 0
        with e.training():
            assert e.memory()["steps"] == e.memory()["cache"] == 0
            assert torch.cuda.memory_allocated() - before < 2**26  # cuBLAS's workspace
        assert tokens(written(kept)) == expected


@on_card
def test_a_card_captures_what_it_computes() -> None:
    e, plain = on_gpu(), on_gpu(capture_steps=False)
    for new, n in ((1, 1), (9, 3), (200, 2)):
        assert tokens(written(e, new, n)) == tokens(written(plain, new, n))
    with torch.no_grad():
        for one in (e, plain):
            one.model.model.layers[0].mlp.down_proj.weight.mul_(-2)
            one.weights_changed()
    assert tokens(written(e)) == tokens(written(plain))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@on_card
def test_a_card_survives_the_end_of_a_table_of_positions() -> None:
    e = Engine(random_model("gpt2"), tiny_tokenizer(), EngineConfig(decode_steps_per_sync=8))
    e.end_tokens = frozenset()
    with e.generating():
        [[c]] = e.generate([[5] * (e.max_length - 3)], SamplingParams(max_new_tokens=3))
    torch.cuda.synchronize()
    assert len(c.token_ids) == 3
