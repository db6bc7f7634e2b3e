"""What cannot be loaded gets an error of one line, whatever a library raises."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from gearshift.cli.main import main
from gearshift.errors import ModelError
from gearshift.models.load import ModelConfig, load_policy, resolve_device, resolve_dtype
from tests.models.families import random_model, small_config


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_policy(ModelConfig(dtype="float32", device="cpu"), str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["falcon", "gptj", "gpt_neo"])
def test_a_fixed_table_of_attentions(kind: str, tmp_path: Path) -> None:
    message = refused(saved(random_model(small_config(kind)), tmp_path))
    assert "does not go through Hugging Face's attention interface" in message


def test_the_gpu_of_a_model_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams are made there, and its memory is measured."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(
        torch, "empty", lambda _, device: SimpleNamespace(device=torch.device(device))
    )
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
    assert current == [torch.device("cuda", 1)]


def test_a_gpu_that_only_emulates_bf16_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


def test_broken_files(tmp_path: Path) -> None:
    folder = saved(random_model(small_config("llama")), tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder)
    weights.write_bytes(b"")
    refused(folder)
    weights.write_bytes(whole)
    config = folder / "config.json"
    good = json.loads(config.read_text())
    for bad in ("{", "[]", "null", json.dumps({**good, "hidden_size": "many"})):
        config.write_text(bad)
        refused(folder)
    for change in ({"hidden_size": 32}, {"model_type": "no_such_type"}):
        config.write_text(json.dumps({**good, **change}))
        refused(folder)


def test_weights_that_are_not_there_are_not_drawn(tmp_path: Path) -> None:
    config = small_config("llama")
    config.num_labels = 1
    for tied in (False, True):
        config.tie_word_embeddings = tied
        model = AutoModelForSequenceClassification.from_config(config)
        message = refused(saved(model, tmp_path / str(tied)))
        assert "gives scores and writes no text" in message
    folder = saved(random_model(small_config("llama")), tmp_path / "shallow")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    assert "others; they would be random" in refused(folder)


@pytest.mark.parametrize("kind", ["mamba", "gemma4", "falcon"])
def test_a_dry_run_tells_or_refuses(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a traceback, whatever the config has."""
    folder = saved(random_model(small_config(kind)), tmp_path)
    recipe = Path(__file__).parents[1] / "smoke" / "tiny.yaml"
    # Short rows: the memory of a pass is measured, and Mamba goes token by token through it.
    keys = ("sft.max_length", "sft.micro_batch_tokens", "reward.max_length",
            "reward.micro_batch_tokens", "rl.update.micro_batch_tokens")  # fmt: skip
    few = [f"{key}=64" for key in keys]
    main(["run", str(recipe), f"model.name={folder}", *few, "--dry-run"])
    assert "Traceback" not in capsys.readouterr().err
