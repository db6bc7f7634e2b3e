"""One update: in bf16 too its gradient does not depend on how the batch was cut, and where any
gradient is not finite nothing moves.
"""

import pytest
import torch
from torch import Tensor, nn

from gearshift.errors import NumericalError
from gearshift.kernels.cuda_graphs import HostWaits
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.update import _gradients, update

SIZE = MicroBatchSize(1)


def gradient(micros: int, rows: int = 1024) -> tuple[Tensor, float]:
    """(what the optimizer steps along, the norm) of one update on the same rows in bf16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 1)).bfloat16()
    x_RD, y_R = torch.randn(rows, 24).bfloat16(), torch.randn(rows)
    optimizer = MasterAdamW(net.parameters(), OptimizerConfig(), total_steps=1)
    found: list[Tensor] = []

    def keep(norm: float) -> float:
        found.extend(flat.gather(1.0) for flat in optimizer.flats)
        return norm

    optimizer.step = keep  # type: ignore[method-assign, assignment]

    def loss_of(part: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return ((net(x_RD[part])[:, 0].float() - y_R[part]) ** 2).sum() / rows, {}

    norm = update(lambda *_: torch.arange(rows).chunk(micros), SIZE, loss_of, optimizer)[
        "grad_norm"
    ]
    assert all(p.grad is None for p in net.parameters())
    return torch.cat(found), norm


@pytest.mark.parametrize("micros", [2, 64, 1024])
def test_a_gradient_in_bf16_does_not_depend_on_the_number_of_micro_batches(micros: int) -> None:
    (one, norm), (many, norms) = gradient(1), gradient(micros)
    assert (many - one).norm() <= 4e-3 * one.norm()  # one rounding to bf16
    assert norms == pytest.approx(norm, rel=1e-3)


def test_micro_batches_add_up_to_the_bit_of_an_fp32_sum() -> None:
    """Gradients of 3, 1/256 and -3: in bf16 the small one is lost."""
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], OptimizerConfig(), total_steps=1)
    metrics = update(
        lambda *_: [3.0, 2.0**-8, -3.0], SIZE, lambda scale: ((weight * scale).sum(), {}), optimizer
    )
    assert metrics["grad_norm"] == pytest.approx(4 * 2.0**-8)
    assert optimizer.flats[0].sums is None and weight.grad is None


def test_the_metrics_of_a_micro_batch_are_read_in_one_go() -> None:
    """Each number that is read alone makes the host wait for its GPU."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = MasterAdamW([weight], OptimizerConfig(), total_steps=1)

    def loss_of(scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        third = torch.tensor(1 / 3)
        return (weight * scale).sum(), {"a": third, "b": third.bfloat16(), "c": third.double()}

    with HostWaits() as waits:
        found = _gradients([(1.0, 1.0), (2.0, 1.0)], loss_of, [optimizer])
    assert waits.found is None
    values = {"a": float(torch.tensor(1 / 3)), "b": 0.333984375, "c": float(torch.tensor(1 / 3))}
    assert found == [{"loss": 16.0, **values}, {"loss": 32.0, **values}]


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("micros", [1, 2])
def test_where_any_gradient_is_not_finite_no_optimizer_steps(broken: int, micros: int) -> None:
    """The loss is finite; the gradient of one of two nets is not."""
    nets = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizers = [MasterAdamW([net], OptimizerConfig(lr=1.0), total_steps=4) for net in nets]

    def loss_of(fault: bool) -> tuple[Tensor, dict[str, Tensor]]:
        terms = [
            net.sum().sqrt() if fault and i == broken else net.sum() for i, net in enumerate(nets)
        ]
        return terms[0] + terms[1], {}

    rates = [optimizer.lr for optimizer in optimizers]
    with pytest.raises(NumericalError, match="nothing was updated"):
        update(lambda *_: [True, False][:micros], SIZE, loss_of, *optimizers)
    for net, optimizer, rate in zip(nets, optimizers, rates, strict=True):
        assert (net == 0).all() and net.grad is None and optimizer.flats[0].sums is None
        assert not optimizer.optimizer.state and optimizer.lr == rate
    update(
        lambda *_: [False], SIZE, loss_of, *optimizers
    )  # and the next one is as if nothing had been
    assert all((net == -1).all() for net in nets)


def test_a_loss_that_is_not_finite_leaves_no_gradient_for_the_next_update() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], OptimizerConfig(), total_steps=1)
    with pytest.raises(NumericalError, match="The loss is nan"):
        update(lambda *_: [1.0, float("nan")], SIZE, lambda s: ((weight * s).sum(), {}), optimizer)
    assert weight.grad is None and optimizer.flats[0].sums is None
