"""fp32 masters: small updates to bf16 weights are not lost, and the update is torch's AdamW."""

import importlib.util

import pytest
import torch
from torch import nn

from gearshift.errors import ConfigError, NumericalError
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


@pytest.mark.parametrize("largest", [1 << 25, 300])
@pytest.mark.parametrize("clip", [1e9, 0.5])
@pytest.mark.parametrize("offload", ["never", "always", "while_generating"])
def test_it_is_adamw_of_all_parameters(
    largest: int, clip: float, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in several buffers: matrices decay, vectors do not, one norm clips all, and a parameter
    without a gradient moves no less than a gradient of zero would move it.
    """
    monkeypatch.setattr("gearshift.runtime.optimizer._LARGEST", largest)
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in ((17, 9), (5,), (8, 30), (1,), (3, 3, 3), (300, 2))]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=clip, offload=offload)
    optimizer = MasterAdamW(ours, config, total_steps=10)
    peer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for _ in range(5):
        for parameter in (*ours, *theirs):
            parameter.grad = parameter.detach().sin()
        optimizer.offload_state()
        norm = optimizer.step()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, clip)), rel=1e-5)
        peer.step()
        peer.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.grad is None


def test_moments_in_8_bits_learn_about_the_same() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    start, goal = torch.randn(64, 128), torch.randn(64, 128)
    ends = []
    for moments in ("float32", "8bit"):
        weight = nn.Parameter(start.clone())
        optimizer = MasterAdamW([weight], OptimizerConfig(lr=3e-2, moments=moments), 100)
        for step in range(60):
            weight.grad = (weight.detach() - goal) / 64
            optimizer.step()
            if step == 30:  # and they survive a checkpoint
                state = optimizer.state_dict()
                optimizer = MasterAdamW([weight], OptimizerConfig(lr=3e-2, moments=moments), 100)
                optimizer.load_state_dict(state)
        ends.append(((weight.detach() - goal).norm(), optimizer.nbytes()))
    assert ends[0][0] < 0.3 * (start - goal).norm()
    assert ends[1][0] < 1.5 * ends[0][0] + 0.05 * (start - goal).norm()
    assert ends[1][1] < 0.6 * ends[0][1]


def test_8_bits_without_torchao_is_told() -> None:
    if importlib.util.find_spec("torchao"):
        pytest.skip("torchao is here")
    with pytest.raises(ConfigError, match="needs torchao"):
        MasterAdamW([nn.Parameter(torch.ones(4))], OptimizerConfig(moments="8bit"), 1)


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
