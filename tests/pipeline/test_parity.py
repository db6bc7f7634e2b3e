"""`gearshift parity`: it finds a difference wherever it lies, and names the layer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedModel

from gearshift.cli.main import main
from gearshift.kernels.cpu import CPUKernels
from gearshift.models import runner
from gearshift.models.describe import Plan, described
from gearshift.models.load import ModelConfig
from gearshift.models.tiny import tiny_tokenizer
from gearshift.pipeline.parity import parity
from tests.zoo import CONFIGS

GEARS = [
    "generation and training",
    "training and Hugging Face",
    "generation and Hugging Face",
]


def test_a_right_model_is_within_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    main(["parity", "tiny", "--dtype", "float32", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["refused"] is None and found["layers"] == []
    pairs = [(gap["turns"], gap["between"]) for gap in found["gaps"]]
    assert pairs == [(turns, between) for turns in (1, 2) for between in GEARS]
    for gap in found["gaps"]:
        assert gap["tokens"] > 50 * gap["turns"]
        assert 0 < gap["mean"] <= gap["max"] < 2e-5 and gap["over_bound"] < 0.1


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_every_form_is_compared(family: str, tmp_path: Path) -> None:
    mixtral = MixtralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(mixtral if family == "mixtral" else CONFIGS[family])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = parity(ModelConfig(dtype="float32"), str(tmp_path))
    assert found.ok and len(found.gaps) == 6, found.table()
    assert ("Hugging Face's modules" in found.form) == (family == "mixtral")


def test_a_layer_that_is_computed_wrongly_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: PreTrainedModel) -> tuple[Plan | None, str | None]:
        plan, why = described(model)
        assert plan is not None
        first, *rest = plan.layers
        options = replace(rest[0].attention, scaling=2 * rest[0].attention.scaling)
        return replace(plan, layers=[first, replace(rest[0], attention=options), *rest[1:]]), why

    monkeypatch.setattr(runner, "described", wrong)
    with pytest.raises(SystemExit) as ended:
        main(["parity", "tiny", "--dtype", "float32"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "refused: " in out and "computed wrongly" in out
    found = parity(ModelConfig(name="tiny", dtype="float32"))
    before, after = found.layers[0], found.layers[1]
    assert before.training < 0.1 and before.generation is not None and before.generation < 0.1
    assert after.training > 1 and after.generation is not None and after.generation > 1


def test_a_fault_beyond_the_check_of_the_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what lies more than 40 tokens back is lost, and only while sampling."""
    attend = CPUKernels.attend

    def forgetful(self: Any, query: Tensor, store: Tensor, metadata: Any, options: Any) -> Tensor:
        out = attend(self, query, store, metadata, options)
        far = metadata.positions[metadata.seq_ids >= 0] > 40
        return torch.where(far[:, None, None], 0.5 * out, out)

    monkeypatch.setattr(CPUKernels, "attend", forgetful)
    found = parity(ModelConfig(name="tiny", dtype="float32"))
    assert found.refused is None and not found.ok
    over = {gap.between for gap in found.gaps if gap.over_bound > 1}
    assert over == {"generation and training", "generation and Hugging Face"}
    assert found.layers


@pytest.mark.parametrize("context", [64, 16])
def test_a_short_context_is_used_or_refused(
    context: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=context, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    if context == 64:
        main(["parity", str(tmp_path), "--dtype", "float32"])
        return
    with pytest.raises(SystemExit) as ended:
        main(["parity", str(tmp_path), "--dtype", "float32"])
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "context of 16 tokens" in line
