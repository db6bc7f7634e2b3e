"""How fast a stage trains, in its metrics."""

from types import SimpleNamespace

import pytest
import torch

from gearshift.engine import stats
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers import speed
from tests.trainers.rl_runs import small, trainer


def runner(tokens: int, operations: float, device: str = "cuda") -> SimpleNamespace:
    model = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    return SimpleNamespace(
        model=model, kept=model, work=SimpleNamespace(take=lambda: (tokens, operations))
    )


def test_utilisation_is_the_work_of_all_models_over_the_gpus_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "peak_flops", lambda device, dtype: 1e12)
    policy, critic = runner(100, 3e11), runner(70, 1e11)
    assert speed.training_speed(2.0, [policy, critic]) == {  # type: ignore[list-item]
        "speed/tokens_per_second": 50.0,
        "speed/mfu": pytest.approx(0.2),
    }
    assert "speed/mfu" not in speed.training_speed(2.0, [runner(100, 3e11, "cpu")])  # type: ignore[list-item]
    assert "speed/mfu" not in speed.training_speed(2.0, [runner(100, 0.0)])  # type: ignore[list-item]
    assert speed.training_speed(2.0, [runner(0, 0.0)]) == {}  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("card", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", 7),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", 7),
    ],
)  # fmt: skip
def test_a_gpus_rate_is_its_makers_or_measured(
    card: str, tera: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    rate = stats.Roofline(1.0, 7e12)
    monkeypatch.setattr(stats, "measure_if_it_fits", lambda device, dtype: rate)
    device = torch.device("cuda")
    assert stats.peak_flops(device, torch.bfloat16) == tera * 1e12
    assert stats.peak_flops(device, torch.float32) == 7e12


def test_every_epoch_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    speeds = []
    for epochs in (1, 2):
        run = trainer(small(steps=1, update={"epochs": epochs}), tmp_path_factory.mktemp("run"))
        run.train()
        [record] = read_metrics(run.stage.folder / "metrics.jsonl")
        speeds.append(record["speed/tokens_per_second"] * record["seconds/train"])
        assert speeds[-1] == pytest.approx(epochs * record["num_tokens"])
