"""How each model runs is printed before a run, at its start, and by `gearshift doctor`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from gearshift.cli import doctor
from gearshift.cli.main import main
from gearshift.models.load import save_model
from gearshift.models.tiny import tiny_tokenizer
from tests.models.families import random_model, small_config

RECIPE = Path(__file__).parents[1] / "smoke" / "tiny.yaml"


def saved(model: PreTrainedModel, folder: Path) -> str:
    save_model(folder, model, tiny_tokenizer(), "a card")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("llama", {}, "described layers (llama)"),
        (
            "gpt2",
            {},
            "described layers (gpt2); Hugging Face's modules, about 2 times slower, where",
        ),
        (
            "mixtral",
            {},
            "Hugging Face's modules, about 2 times slower, because its family (mixtral)",
        ),
        ("llama", {"hidden_act": "gelu"}, "because the activation 'gelu' is not described for its"),
    ],
)
def test_the_doctor_and_a_dry_run_say_how_a_model_runs(
    kind: str, options: dict[str, str], line: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = saved(random_model(small_config(kind, **options)), tmp_path / "model")
    main(["doctor", folder])
    assert f"model        {folder}: " in (printed := capsys.readouterr().out) and line in printed
    critic = f"rl.value={{kind: critic, init_from: {tmp_path / 'none'}}}"
    rl = ["rl.kl.beta=0.1", critic, "rl.advantage.name=gae"]
    main(["run", str(RECIPE), f"model.name={folder}", *rl, "--dry-run"])
    printed = capsys.readouterr().out
    lines = [one for one in printed.splitlines() if line in one]
    assert [told_line.split(":")[0] for told_line in lines] == [
        "#   policy", "#   reward model", "#   reference",
    ]  # fmt: skip
    assert f"#   critic: {tmp_path / 'none'} cannot be read yet" in printed


def test_a_stage_says_once_how_its_models_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": prompt, "chosen": "b", "rejected": "c"} for prompt in "ax"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "sources": [{"path": str(tmp_path / "rows.jsonl")}],
        "clean": {"drop_duplicates": False},
    }
    stage = {"data": data, "batch_size": 2}
    recipe = {
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu"},
        "preference": {**stage, "reference": "each_step"},
        "reward": stage,
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    main(["run", str(tmp_path / "r.yaml"), f"run.dir={tmp_path / 'run'}"])
    printed = capsys.readouterr().out.splitlines()
    for role in ("policy", "reference", "reward model"):
        assert printed.count(f"{role}: described layers (llama)") == 1


def test_the_doctor_says_what_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    text = "\n".join(doctor._gpu(device))
    for part in ("70.0 of 80.0 GiB", "capability   9.0", "driver 580.1", "cuDNN        91002"):
        assert part in text


def test_the_doctor_names_the_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "kernels      compiled for this CPU" in capsys.readouterr().out
