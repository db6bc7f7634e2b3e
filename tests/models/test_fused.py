"""Weights that are used together lie together: adopted where they already do, copied else, and
aliased again after they were moved.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from gearshift.engine import Engine
from gearshift.models.fused import FusedLinear
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from tests.zoo import random_model


def flatten(model: nn.Module) -> Tensor:
    """Lay all parameters into one tensor in their order, as DeepSpeed's ZeRO-1 and 2 do."""
    parameters = list(model.parameters())
    flat = torch.cat([p.data.flatten() for p in parameters])
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def places(model: nn.Module) -> list[int]:
    return [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox"])
def test_weights_that_lie_end_to_end_are_not_copied(family: str) -> None:
    model = random_model(family)
    values = copy.deepcopy(model.state_dict())
    flat = flatten(model)
    before = places(model)
    engine = Engine(model, tiny_tokenizer())
    assert places(model) == before
    weights = engine.runner.weights
    assert weights is not None and weights.restore() == 0
    held = {t.untyped_storage().data_ptr() for linear in weights for t in [linear.weight]}
    assert held == {flat.untyped_storage().data_ptr()}
    with engine.generating():
        assert places(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_what_a_flat_optimizer_writes_is_read() -> None:
    model = random_model("llama")
    flat = flatten(model)
    engine = Engine(model, tiny_tokenizer())
    flat.mul_(0.5)
    fused = engine.runner.weights.qkv[0]
    attention = model.base_model.layers[0].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(fused.weight, torch.cat(parts))


def test_a_second_runner_of_a_model_shares_its_buffers() -> None:
    model = random_model("llama")
    first = ModelRunner(model)
    before = places(model)
    second = ModelRunner(model)
    assert places(model) == before
    assert first.weights is not None and second.weights is not None
    assert first.weights.restore() == second.weights.restore() == 0


def linears(sizes: list[int], bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(4, size, bias) for size in sizes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2]])
def test_only_their_own_order_is_adopted(order: list[int], bias: bool) -> None:
    modules = linears([3, 2, 5], bias)
    flatten(nn.ModuleList([modules[i] for i in order]))
    expected = [m.weight.detach().clone() for m in modules]
    before = [m.weight.data_ptr() for m in modules]
    fused = FusedLinear(modules)
    adopted = order == [0, 1, 2] and not bias  # biases lie between the weights
    assert ([m.weight.data_ptr() for m in modules] == before) == adopted
    assert torch.equal(fused.weight, torch.cat(expected))
    x = torch.randn(6, 4)
    assert torch.allclose(fused(x), torch.cat([m(x) for m in modules], 1), atol=1e-6)


@pytest.mark.parametrize("adopted", [True, False])
def test_aliasing_that_was_broken_is_found_and_restored(adopted: bool) -> None:
    modules = linears([3, 2], bias=False)
    if adopted:
        flatten(nn.ModuleList(modules))
    fused = FusedLinear(modules)
    assert fused.is_aliased()
    modules[1].weight.data = torch.ones(2, 4)
    assert not fused.is_aliased()
    fused.realias()
    assert fused.is_aliased() and (fused.weight[3:] == 1).all()
    modules[0].weight.data.fill_(2.0)
    assert (fused.weight[:3] == 2).all()


def test_weights_that_stay_apart_give_the_same() -> None:
    """Gradients too: a sharded layer has no buffer to keep them in."""
    for bias in (True, False):
        modules = linears([3, 2], bias)
        apart = FusedLinear(copy.deepcopy(modules), fuse=False)
        before = [m.weight.data_ptr() for m in apart.linears]
        fused = FusedLinear(modules)
        x = torch.randn(6, 4)
        assert torch.allclose(fused(x), apart(x))
        for linear in (fused, apart):
            linear(x).square().sum().backward()
        for a, b in zip(fused.linears, apart.linears, strict=True):
            assert torch.allclose(a.weight.grad, b.weight.grad, atol=1e-5)
        assert [m.weight.data_ptr() for m in apart.linears] == before and apart.is_aliased()
