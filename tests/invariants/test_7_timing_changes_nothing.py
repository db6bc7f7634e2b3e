"""Invariant 7: a run does not depend on how fast environments answer, so that one that is cut and
resumed is the run that was not, to the bit.
"""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.models.adapters import AdapterConfig, add_adapter
from tests.device import bits
from tests.gyms import TwoTurns
from tests.trainers.rl_runs import small, trainer
from tests.trainers.test_resume import fingerprint
from tests.zoo import tiny_model


class Unsteady(TwoTurns):
    """Answers after a while that is never the same."""

    def reset(self, **given: Any) -> tuple[str, dict[str, Any]]:
        self._wait()
        return super().reset(**given)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._wait()
        return super().step(action)

    def _wait(self) -> None:
        time.sleep(random.Random(time.perf_counter_ns()).choice([0.0, 0.0, 0.003, 0.02]))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp32 adapter", "bf16 adapter"])
def test_how_fast_environments_answer_changes_nothing(tmp_path: Path, kind: str) -> None:
    if not bits(torch.bfloat16 if "bf16" in kind else torch.float32):
        pytest.skip("the promise is of compiled kernels, which this machine lacks")
    config = small(
        steps=2,
        rollout={"prompts": 4},
        importance={"mode": "token_truncate", "cap": 1.0},
        update={"epochs": 2},
        loss={"name": "ppo_clip"},
        kl={"beta": 0},
    )
    ends = []
    for nth in range(2):
        model = tiny_model()
        if "adapter" in kind:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                add_adapter(model, AdapterConfig(rank=2))
        if "bf16" in kind:
            model = model.bfloat16()
        run = trainer(config, tmp_path / str(nth), environment=Unsteady, model=model)
        run.train()
        ends.append(fingerprint(run))
    assert ends[0] == ends[1]
