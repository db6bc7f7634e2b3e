"""Policies that differ by an adapter alone share the weights of their base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gearshift.engine import Engine
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.load import ModelConfig, load_policy, save_model
from gearshift.models.shared_base import copy_on_base, separable, with_adapter
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import Completion, SamplingParams
from tests.zoo import tiny_model

CPU = ModelConfig(dtype="float32", device="cpu")


def saved_base(folder: Path) -> Path:
    save_model(folder, tiny_model(), tiny_tokenizer(), "")
    return folder


def saved_adapter(folder: Path, base: Path, seed: int, save: str = "adapter") -> Path:
    """An adapter that changes what the base model says."""
    model = load_policy(CPU, str(base))
    config = AdapterConfig.model_validate({"rank": 4, "save": save})
    add_adapter(model, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(folder, model, tiny_tokenizer(), "", config, str(base))
    return folder


def written(model: Any) -> list[Completion]:
    engine = Engine(model, tiny_tokenizer())
    with engine.generating():
        [found] = engine.generate([[5, 6, 7]], SamplingParams(n=3, max_new_tokens=12))
    return found


@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_two_adapters_and_their_base_have_one_copy_of_its_weights(
    save: str, tmp_path: Path
) -> None:
    base = saved_base(tmp_path / "base")
    places = [saved_adapter(tmp_path / f"{seed}", base, seed, save) for seed in (1, 2)]
    model = load_policy(CPU, str(base))
    before = written(load_policy(CPU, str(base)))
    twins, said = [], []
    for place in places:
        found = separable(str(place))
        assert found is not None and Path(found[1]).resolve() == base.resolve()
        twins.append(with_adapter(copy_on_base(model), found[0]))
    for twin, place in zip(twins, places, strict=True):
        own, alone = written(twin), written(load_policy(CPU, str(place)))
        assert [c.token_ids for c in own] == [c.token_ids for c in alone]
        for one, other in zip(own, alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        said.append([c.token_ids for c in own])
    assert said[0] != said[1]
    assert [(c.token_ids, c.logprobs) for c in written(model)] == [
        (c.token_ids, c.logprobs) for c in before
    ]
    shared = {p.data_ptr() for p in model.parameters()}
    for twin in twins:
        own = {name: p for name, p in twin.named_parameters() if p.data_ptr() not in shared}
        assert own and all("lora_" in name for name in own)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"use_dora": True}, ""),
        ({"peft_type": "IA3"}, ""),
        ({"lora_bias": True}, ""),
        ({}, "base_model.model.lm_head.weight"),
        ({}, "base_model.model.model.embed_tokens.lora_embedding_A"),
    ],
)
def test_what_changes_more_than_linear_layers_is_merged(
    changes: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    base = saved_base(tmp_path / "base")
    place = saved_adapter(tmp_path / "one", base, 1)
    assert separable(str(base)) is None and separable("tiny") is None
    assert separable(str(place)) is not None
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    if tensor:
        weights = load_file(place / "adapter_model.safetensors")
        save_file({**weights, tensor: torch.ones(1)}, place / "adapter_model.safetensors")
    assert separable(str(place)) is None
