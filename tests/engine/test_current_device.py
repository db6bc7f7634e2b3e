"""On a machine of several GPUs everything is launched on the GPU of the weights, in any thread."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.engine import Engine
from gearshift.engine.decoder import Decoder
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, pack_completions, random_model


class FakeDevices:
    """Stands for `torch.cuda.device_of`, and knows whose device is the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.entered: list[Tensor] = []
        patch.setattr(torch.cuda, "device_of", lambda tensor: FakeDevice(self, tensor))


class FakeDevice:
    def __init__(self, devices: FakeDevices, tensor: Tensor) -> None:
        self._devices, self._tensor = devices, tensor

    def __enter__(self) -> None:
        self._devices.entered.append(self._tensor)

    def __exit__(self, *_: object) -> None:
        assert self._devices.entered.pop() is self._tensor


def test_both_gears_run_on_the_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    devices, engine = FakeDevices(monkeypatch), Engine(random_model("llama"), tiny_tokenizer())
    first, seen = next(engine.model.parameters()), []

    def noting(kind: type, name: str) -> None:
        run = getattr(kind, name)

        def noted(*arguments: Any, **keys: Any) -> Any:
            seen.append((name, bool(devices.entered) and devices.entered[0] is first))
            return run(*arguments, **keys)

        monkeypatch.setattr(kind, name, noted)

    noting(Decoder, "run")
    noting(ModelRunner, "logprobs")

    def use() -> None:
        with engine.generating():
            groups = engine.generate(PROMPTS, SamplingParams(max_new_tokens=3))
        with engine.training():
            engine.logprobs(pack_completions(PROMPTS, groups))

    use()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(use).result()
    assert {name for name, _ in seen} == {"run", "logprobs"}
    assert all(right for _, right in seen)
    assert devices.entered == []
