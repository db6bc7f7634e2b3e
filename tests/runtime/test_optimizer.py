"""fp32 masters: small updates to bf16 weights are not lost, and the update is torch's AdamW."""

import pytest
import torch
from torch import nn

from gearshift.errors import NumericalError
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig


def test_small_updates_of_bf16_weights_add_up() -> None:
    weight = nn.Parameter(torch.full((4, 4), 0.5, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], OptimizerConfig(lr=1e-5), total_steps=1000)
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 400 steps of 1e-5; one alone is 1/200 of a bf16 step at 0.5
    assert torch.allclose(weight.float(), torch.full((4, 4), 0.5 - 4e-3), atol=2e-3)
    assert (weight < 0.5).all()


def test_an_fp32_model_is_its_own_master_and_moves_as_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=1e9)
    optimizer = MasterAdamW([ours], config, total_steps=10)
    peer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for parameter in (ours, theirs):
            parameter.grad = parameter.detach().sin()
        optimizer.step()
        peer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_norm_is_clipped_and_reported() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = MasterAdamW([weight], OptimizerConfig(lr=1.0, max_grad_norm=1.0), total_steps=1)
    weight.grad = torch.full((4,), 10.0)
    assert optimizer.step() == pytest.approx(20.0)


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], OptimizerConfig(lr=1.0), total_steps=1)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0], dtype=torch.bfloat16)
    with pytest.raises(NumericalError, match="nothing was updated"):
        optimizer.step()
    assert (weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_where_it_stopped(dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Parameter, MasterAdamW]:
        weight = nn.Parameter(torch.linspace(-1, 1, 8).to(dtype))
        config = OptimizerConfig(lr=1e-2, schedule="cosine", warmup=2)
        return weight, MasterAdamW([weight], config, total_steps=10)

    def step(weight: nn.Parameter, optimizer: MasterAdamW) -> None:
        weight.grad = weight.detach().cos()
        optimizer.step()

    weight, optimizer = make()
    for _ in range(6):
        step(weight, optimizer)
    half, half_optimizer = make()
    for _ in range(3):
        step(half, half_optimizer)
    again, again_optimizer = make()
    again.data.copy_(half.data)
    again_optimizer.load_state_dict(half_optimizer.state_dict())
    for _ in range(3):
        step(again, again_optimizer)
    assert torch.equal(weight, again)
    assert optimizer.lr == again_optimizer.lr
