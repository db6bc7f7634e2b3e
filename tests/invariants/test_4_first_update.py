"""Invariant 4: at the first update the ratio is 1, nothing is clipped and the KL to the reference
is 0, also with dropout configured.
"""

from pathlib import Path

import pytest

from gearshift.runtime.metrics import read_metrics
from tests.trainers.rl_runs import small, trainer
from tests.zoo import tiny_model


@pytest.mark.parametrize("advantage", ["value_baseline", "grpo"])
def test_first_update_is_on_policy(tmp_path: Path, advantage: str) -> None:
    model = tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    config = small(
        steps=2,
        advantage={"name": advantage},
        loss={"name": "ppo_clip"},
        kl={"beta": 0.1, "estimator": "k3", "where": "loss"},
    )
    trainer(config, tmp_path, model=model).train()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["clip_ratio/region_mean"] == 0
    assert abs(first["kl"]) <= 1e-9
    assert first["sampling/sampling_logp_difference/mean"] <= 1e-5
    assert second["kl"] > 0  # the measure is not stuck at nothing
    assert second["sampling/sampling_logp_difference/mean"] <= 1e-5


def test_several_updates_of_one_rollout_leave_the_old_policy(tmp_path: Path) -> None:
    config = small(
        steps=1, update={"epochs": 2, "minibatches": 2}, loss={"name": "ppo_clip"}, kl={"beta": 0}
    )
    trainer(config, tmp_path).train()
    [metrics] = read_metrics(tmp_path / "metrics.jsonl")
    assert abs(metrics["ratio"] - 1.0) > 1e-4
