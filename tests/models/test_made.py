"""The models of a run's stages are as they were written when they are used."""

import json
from pathlib import Path

import pytest

from gearshift.errors import StorageError
from gearshift.models import made
from gearshift.models.load import ModelConfig, load_classifier, load_policy, load_tokenizer
from gearshift.models.made import check_kept, check_made, made_of, written_by
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.digests import file_digests, write_sealed


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage, with the policy's average."""
    folder = tmp_path / "run" / "rl"
    for place in (folder, folder / "ema"):
        tiny_model().save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "README.md").write_text("A card is the user's to change.")
    write_sealed(folder / "done.json", {"digests": file_digests(folder, written_by(folder))})
    return folder


def hurt(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


@pytest.mark.parametrize("load", [load_policy, load_classifier, load_tokenizer])
@pytest.mark.parametrize("place", ["", "ema"])
def test_a_flipped_bit_is_told_by_whoever_loads_it(stage: Path, load: object, place: str) -> None:
    other = stage / ("" if place else "ema")
    assert made_of(str(stage / place)) == made_of(str(other))
    hurt(stage / place / "model.safetensors")
    load_policy(ModelConfig(), str(other))
    with pytest.raises(StorageError, match=r"model\.safetensors is not as the run wrote it"):
        load(ModelConfig(), str(stage / place))  # type: ignore[operator]


def test_weights_of_a_stage_that_is_kept_count_by_their_size(stage: Path) -> None:
    (stage / "README.md").write_text("Changed.")
    assert check_kept(stage) == ""
    hurt(stage / "model.safetensors")
    assert check_kept(stage) == ""
    (stage / "metrics.jsonl").unlink()
    assert check_kept(stage) == "", "records may be deleted"
    (stage / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl .* or delete it\."):
        check_kept(stage)
    (stage / "metrics.jsonl").unlink()
    (stage / "tokenizer.json").unlink()
    with pytest.raises(StorageError, match=r"tokenizer\.json .*it is gone.* delete .*rl to do"):
        check_kept(stage)


def test_a_stage_of_an_earlier_version_is_taken_with_a_word(stage: Path) -> None:
    (stage / "done.json").write_text(json.dumps({"seconds": 1.0}))
    hurt(stage / "tokenizer_config.json")
    check_made(str(stage))
    assert check_kept(stage).startswith("; an earlier version made it")
    (stage / "done.json").unlink()
    check_made(str(stage))
    (stage / "done.json").write_text("{")
    with pytest.raises(StorageError, match=r"done\.json cannot be read .* delete .*rl to do this"):
        load_policy(ModelConfig(), str(stage))


def test_an_adapters_model_is_what_it_was_trained_on(tmp_path: Path) -> None:
    base, stage = tmp_path / "base", tmp_path / "run" / "sft"
    tiny_model().save_pretrained(base)
    stage.mkdir(parents=True)
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (stage / "adapter_config.json").write_text(json.dumps(settings))
    (stage / "adapter_model.safetensors").write_bytes(b"")
    write_sealed(stage / "done.json", {"digests": {}, "base": made_of(str(base))})
    check_made(str(stage))
    assert "base/model.safetensors" in made_of(str(stage))
    hurt(base / "model.safetensors")
    with pytest.raises(StorageError, match=r"base/model\.safetensors is not as"):
        check_made(str(stage))


def test_a_model_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "models--a--b" / "snapshots" / "0123abc" / "config.json"
    monkeypatch.setattr(made, "try_to_load_from_cache", lambda name, file: str(config))
    assert made_of("a/b") == {"commit": "0123abc"}


def test_other_models_are_not_asked(tmp_path: Path) -> None:
    assert made_of("tiny") == {} and made_of("./no/such/folder") == {} and made_of("a/b") == {}
    assert made_of("a" * 999) == {}
    check_made("a" * 999)
    check_made("tiny")
    check_made(str(tmp_path / "nowhere"))
