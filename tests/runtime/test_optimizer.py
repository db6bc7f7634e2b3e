"""fp32 masters: small updates to bf16 weights are not lost, and the update is torch's AdamW."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gearshift.errors import ConfigError, NumericalError
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.transfers import Staging, Transfers


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
    monkeypatch.setattr("gearshift.runtime.flat.LARGEST", largest)
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


class Queue(Transfers):
    """A GPU that copies as late as it may; here its memory is the host's, too."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.buffers: list[Tensor] = []

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        self.buffers.append(torch.zeros(size, dtype=dtype))
        return self.buffers[-1]

    @torch.no_grad()
    def copy(self, into: Tensor, source: Tensor) -> None:
        assert into.shape == source.shape and into.dtype == source.dtype
        into.fill_(float("nan") if into.is_floating_point() else 0)
        self.queue.append((into, source.detach()))

    def join(self) -> None:
        host = {x.untyped_storage().data_ptr() for x in self.buffers}
        to_gpu = [into.untyped_storage().data_ptr() not in host for into, _ in self.queue]
        self._run(max((i + 1 for i, is_so in enumerate(to_gpu) if is_so), default=0))

    def wait(self) -> None:
        self._run(len(self.queue))

    @torch.no_grad()
    def _run(self, count: int) -> None:
        for into, source in self.queue[:count]:
            into.copy_(source)
        del self.queue[:count]


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("offload", ["always", "while_generating"])
@pytest.mark.parametrize("micros", [1, 3])
def test_state_that_comes_and_goes_is_the_same(moments: str, offload: str, micros: int) -> None:
    """Copies that end as late as they may change no bit, and take the same memory each time."""
    if moments == "8bit":
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    values = [torch.randn(64, 80).bfloat16(), torch.randn(7), torch.randn(9).bfloat16()]

    def run(queue: Queue | None) -> tuple[list[Tensor], dict[str, Any]]:
        parameters = [nn.Parameter(v.clone()) for v in values]
        config = OptimizerConfig.model_validate(
            {"lr": 1e-2, "offload": offload, "moments": moments}
        )
        optimizer = MasterAdamW(parameters, config, total_steps=10)
        optimizer.transfers = queue
        for flat in optimizer.flats:
            flat._staging = Staging(queue) if queue and offload == "always" else None
        for _ in range(4):
            optimizer.offload_state()
            optimizer.offload_state()  # as for the greedy completions of the same step
            made.append(len(queue.buffers) if queue else 0)
            for micro in range(micros):
                for parameter in parameters[: 2 + micro % 2]:
                    new = parameter.detach().sin() + micro
                    parameter.grad = new if parameter.grad is None else parameter.grad + new
                if micros > 1:
                    optimizer.accumulate()
            optimizer.step()
        optimizer.offload_state()
        return [p.detach() for p in parameters], optimizer.state_dict()

    queue, made = Queue(), list[int]()
    (plain, state), (moved, again) = run(None), run(queue)
    for a, b in zip(plain, moved, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(state["masters"], again["masters"], strict=True):
        assert torch.equal(a.own, b.own)
    assert 0 < made[-3] == made[-1]


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


def test_the_norm_of_many_numbers_is_right_in_its_sixth_digit() -> None:
    """One sum in float32 over them is off by a thousandth."""
    parameter = nn.Parameter(torch.zeros(1 << 24))
    gradient = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e-3
    optimizer = MasterAdamW([parameter], OptimizerConfig(), 1)
    parameter.grad = gradient
    assert optimizer.norm() == pytest.approx(float(gradient.double().norm()), rel=1e-6)
