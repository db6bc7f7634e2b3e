"""Weights that another library splits over processes, or keeps in a buffer of its own, are refused
where the engine could not follow them.
"""

from collections.abc import Callable

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from gearshift.engine import Engine
from gearshift.errors import ModelError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.models.test_fused import flatten
from tests.models.test_units import one_process
from tests.zoo import PROMPTS, random_model


def empty(model: PreTrainedModel) -> None:
    """As ZeRO-3 leaves the parameters of a layer that does not run."""
    for parameter in model.base_model.layers[1].parameters():
        parameter.data = torch.empty(0)


def marked(model: PreTrainedModel) -> None:
    """As FSDP1 marks the one parameter of a wrapped module."""
    model.base_model.norm.weight._is_flat_param = True


SPLIT: list[Callable[[PreTrainedModel], object]] = [fully_shard, empty, marked]


@pytest.mark.parametrize("split", SPLIT)
def test_weights_split_over_processes_are_refused(
    split: Callable[[PreTrainedModel], object],
) -> None:
    early, late = random_model("llama"), Engine(random_model("llama"), tiny_tokenizer())
    with one_process():
        for model in (early, late.model):
            split(model)
        with pytest.raises(ModelError, match="is split over processes"):
            Engine(early, tiny_tokenizer())
        for gear in (late.generating, late.training):
            with pytest.raises(ModelError, match="is split over processes"), gear():
                pass


def test_a_buffer_of_another_library_is_refused_where_its_order_is_no_use() -> None:
    """Biases lie between the weights. What moved out of the buffer would be trained no longer."""
    early, late = random_model("qwen2"), Engine(random_model("qwen2"), tiny_tokenizer())
    for model in (early, late.model):
        flatten(model)
    places = [p.data_ptr() for p in early.parameters()]
    with pytest.raises(ModelError, match="keeps the weights in a buffer of its own"):
        Engine(early, tiny_tokenizer())
    assert [p.data_ptr() for p in early.parameters()] == places
    for gear in (late.generating, late.training):
        with pytest.raises(ModelError, match="keeps the weights in a buffer of its own"), gear():
            pass
    for parameter in early.parameters():  # the way out
        parameter.data = parameter.data.clone()
    Engine(early, tiny_tokenizer())


def test_a_buffer_of_another_library_is_used_where_weights_lie_end_to_end() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer())
    params = SamplingParams(max_new_tokens=8)
    with engine.generating():
        before = engine.generate(PROMPTS, params)
    flat = flatten(engine.model)
    with engine.generating():
        same = engine.generate(PROMPTS, params)
    flat.mul_(-1.5)
    engine.weights_changed()
    with engine.generating():
        after = engine.generate(PROMPTS, params)
    tokens = [[c.token_ids for group in groups for c in group] for groups in (before, same, after)]
    assert tokens[0] == tokens[1] != tokens[2]
