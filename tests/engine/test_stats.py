"""How fast the machine is: a figure in the metrics, which takes little memory and ends no run."""

import math

import pytest
import torch

from gearshift.engine import stats
from gearshift.engine.stats import GenerationStats
from tests.zoo import tiny_model

DECODED = GenerationStats(decode_seconds=1.0, decode_tokens=8, decode_steps=4, decode_positions=64)


def test_a_full_device_has_no_figure_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_READ", 1 << 20)
    stats.measure.cache_clear()
    model = tiny_model()
    with monkeypatch.context() as full:
        full.setattr(stats, "free_bytes", lambda device: float(1 << 20))
        assert math.isnan(DECODED.roofline_fraction(model, 64))
    with monkeypatch.context() as full:
        error = torch.OutOfMemoryError("CUDA out of memory")
        full.setattr(torch, "ones", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        assert math.isnan(DECODED.roofline_fraction(model, 64))
    assert DECODED.roofline_fraction(model, 64) > 0
    monkeypatch.setattr(stats, "free_bytes", lambda device: 1e12)
    stats.measure.cache_clear()
