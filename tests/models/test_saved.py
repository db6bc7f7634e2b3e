"""A saved model is loaded only if every weight is its files'; else one line names what is wrong, in
bounded time and memory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from gearshift.errors import ModelError
from gearshift.models.load import (
    ModelConfig,
    load_classifier,
    load_config,
    load_policy,
    load_tokenizer,
    save_model,
)
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.rewards.models import ModelReward
from gearshift.trainers.rl.critic import load_critic
from tests.models.families import random_model, small_config

CPU = ModelConfig(dtype="float32", device="cpu")
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
Change = Callable[[Path], object]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, its head the embedding, in `policy`; a reward model of its kind in `reward`, one of
    steps in `steps`, an encoder's in `encoder`.
    """
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder / "policy", tiny_model(), tiny_tokenizer(), "card")
    for name, of_tokens in (("reward", False), ("steps", True)):
        model = load_classifier(CPU, "tiny", of_tokens)
        save_model(folder / name, model, tiny_tokenizer(), "card")
    config = small_config("bert", num_labels=1, pad_token_id=2)
    save_model(
        folder / "encoder",
        AutoModelForSequenceClassification.from_config(config),
        tiny_tokenizer(),
        "card",
    )
    return folder


@pytest.fixture
def policy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "policy", tmp_path / "policy"))


def refused(load: Callable[..., object], folder: Path | str, *message: str) -> None:
    with pytest.raises(ModelError) as error:
        load(CPU, str(folder))
    line = str(error.value)
    assert "\n" not in line and len(line) < 900
    for part in message:
        assert re.search(part, line), line


def weights(change: Callable[[State], State | None], file: str = "model.safetensors") -> Change:
    """Change the tensors of a file."""

    def apply(folder: Path) -> None:
        state = dict(load_file(folder / file))
        changed = change(state)
        # A new file: the old one may be mapped by a model.
        (folder / file).unlink()
        save_file(state if changed is None else changed, folder / file, {"format": "pt"})

    return apply


def without(*names: str) -> Change:
    return weights(lambda state: {k: v for k, v in state.items() if k not in names})


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return weights(lambda state: {**state, name: make(state[name]).contiguous()})


def written(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def setting(file: str = "config.json", **values: Any) -> Change:
    def apply(folder: Path) -> None:
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(known | values))

    return apply


NAN = float("nan")
LONG = '{"a": 1' + "0" * 5000 + "}"
DEEP = "[" * 100_000 + "]" * 100_000
HEADER = {name: {"dtype": "F32", "shape": [8], "data_offsets": at} for name, at in
          (("a", [0, 32]), ("b", [16, 48]))}  # fmt: skip
OVERLAP = json.dumps(HEADER).encode()
WEIGHTS: list[tuple[Change, str]] = [
    (without(QUERY), f"no weights for {QUERY}; they would be random"),
    (without("model.embed_tokens.weight"), "lm_head.weight, model.embed_tokens.weight"),
    (weights(lambda state: {}), "no weights for lm_head.weight, model.embed.* and 1[0-9] others"),
    (weights(lambda s: {**s, "extra.weight": s[NORM].clone()}), "no place for: extra.weight"),
    (weights(lambda s: {k.replace("q_proj", "qproj"): v for k, v in s.items()}), QUERY),
    (weights(lambda s: {f"x.{k}": v for k, v in s.items()}), "no weights for"),
    (put(QUERY, lambda t: t[:-1]), rf"{QUERY} of shape \[31, 32\].*asks for \[32, 32\]"),
    (put(QUERY, lambda t: t.T[None]), r"of shape \[1, 32, 32\]"),
    (put(NORM, lambda t: t * torch.nan), f"not finite.*{NORM}"),
    (put(NORM, lambda t: torch.cat([t[:-1], torch.tensor([torch.inf])])), f"not finite.*{NORM}"),
    (put(QUERY, lambda t: t.to(torch.int8)), f"whole numbers for {QUERY}"),
    (put(QUERY, lambda t: t.to(torch.float8_e4m3fn)), f"F8_E4M3: {QUERY}"),
    (written("model.safetensors", b""), "model.safetensors is no whole safetensors file"),
    (written("model.safetensors", pickle.dumps([1] * 999)), "no whole safetensors file"),
    (written("model.safetensors", (10**15).to_bytes(8, "little") + b"{}"), "no whole safetensors"),
    (written("model.safetensors", len(DEEP).to_bytes(8, "little") + DEEP.encode()), "no whole"),
    (
        written("model.safetensors", len(OVERLAP).to_bytes(8, "little") + OVERLAP + b"0" * 64),
        "no whole safetensors file",
    ),
    (lambda f: os.truncate(f / "model.safetensors", 60_000), "no whole safetensors file"),
    (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "as pytorch_model.bin"),
    (lambda f: (f / "model.safetensors").rename(f / "m.gguf"), "its weights as m.gguf"),
    (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "no file"),
]
CONFIGS: list[tuple[Change, str]] = [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    *[
        (written(name, content), f"{name} cannot be read")
        for name in ("config.json", "generation_config.json")
        for content in ("", "{", "[]", DEEP, b"\0" * 9, b'{"a": "\xff"}', LONG)
    ],
    *[
        (setting(**{key: value}), f"has {key}: {str(value)[:9]}")
        for key, value in {
            "num_hidden_layers": 10**6, "num_attention_heads": 0, "max_position_embeddings": 0,
            "vocab_size": -1, "head_dim": 10**400, "num_labels": 10**9, "rms_norm_eps": NAN,
        }.items()
    ],
    (setting(num_hidden_layers=9000), "num_hidden_layers: 9000 and the files hold 20 tensors"),
    (setting(num_hidden_layers=3), "no weights for model.layers.2"),
    (setting(num_hidden_layers=1), "no place for: model.layers.1"),
    (setting(hidden_size=10**8), "asks for .* weights and the files hold 26,880"),
    (setting(vocab_size=10**7), "asks for .* weights and the files hold 26,880"),
    (setting(vocab_size=260), r"of shape \[259, 32\]"),
    (setting(hidden_size="many"), "hidden_size.* expected int"),
    (setting(rope_parameters="x"), "rope_parameters"),
    (setting(architectures=[5]), "architectures"),
    (setting(model_type="evil", auto_map={"AutoConfig": "evil.C"}), "custom code"),
    *[
        (setting(quantization_config={"quant_method": how}), rf"quantised weights \({how}\)")
        for how in ("bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "of tomorrow")
    ],
]  # fmt: skip


def without_words(kind: str) -> Change:
    """What a class of tokenizers makes of a folder without its vocabulary knows no words."""

    def apply(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        setting("tokenizer_config.json", tokenizer_class=kind)(folder)

    return apply


TOKENIZERS: list[tuple[Change, str]] = [
    *[
        (without_words(kind), "has neither tokenizer.json nor (tokenizer.[mj]|vocab)")
        for kind in ("LlamaTokenizer", "GPT2Tokenizer", "GemmaTokenizer", "BertTokenizer")
    ],
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "holds no tokenizer"),
    (lambda f: os.truncate(f / "tokenizer.json", 500), "tokenizer.json cannot be read"),
    (written("tokenizer.json", DEEP), "tokenizer.json cannot be read"),
    (written("tokenizer.json", "{}"), "The tokenizer of"),
    (lambda f: os.truncate(f / "tokenizer.json", 2**29 + 1), "tokenizer.json has 536,870,913"),
    (lambda f: os.truncate(f / "tokenizer_config.json", 2**26 + 1), "it has 67,108,865 bytes"),
    (written("tokenizer_config.json", DEEP), "tokenizer_config.json cannot be read"),
    (written("special_tokens_map.json", "{"), "special_tokens_map.json cannot be read"),
    (written("added_tokens.json", "[1]"), "added_tokens.json cannot be read"),
    (written("chat_template.jinja", b"\xff"), "chat_template.jinja cannot be read"),
    (setting("tokenizer_config.json", model_max_length="x"), "has model_max_length: x"),
    (setting("tokenizer_config.json", chat_template=5), "has chat_template: 5"),
    (setting("tokenizer_config.json", eos_token=5), "The tokenizer of"),
]


@pytest.mark.parametrize(("change", "message"), [*WEIGHTS, *CONFIGS])
def test_what_a_policy_is_not(change: Change, message: str, policy: Path) -> None:
    change(policy)
    refused(load_policy, policy, message, re.escape(str(policy)))


@pytest.mark.parametrize(("change", "message"), TOKENIZERS)
def test_what_a_tokenizer_is_not(change: Change, message: str, policy: Path) -> None:
    change(policy)
    refused(load_tokenizer, policy, message, re.escape(str(policy)))


def test_a_dry_run_refuses_a_hostile_config_too(policy: Path) -> None:
    setting(num_hidden_layers=10**12)(policy)
    refused(load_config, policy, "num_hidden_layers")


@pytest.mark.parametrize("kind", ["reward", "encoder"])
def test_what_a_reward_model_is_not(kind: str, saved: Path, tmp_path: Path) -> None:
    """Wherever one is asked: as a reward, as a critic."""
    score = {"reward": "score.weight", "encoder": "classifier.weight"}[kind]
    inner = {"reward": QUERY, "encoder": "bert.pooler.dense.weight"}[kind]
    changes: list[tuple[Change, str]] = [
        (without(score), f"no weights for {score}"),
        (without(inner), f"no weights for {inner}"),
        (weights(lambda s: {**s, "lm_head.weight": s[score].clone()}), "no place for: lm_head"),
        (put(score, lambda t: t.repeat(3, 1)), rf"{score} of shape \[3, "),
        (put(score, lambda t: t * torch.nan), f"not finite.*{score}"),
    ]
    for i, (change, message) in enumerate(changes):
        folder = Path(shutil.copytree(saved / kind, tmp_path / str(i)))
        change(folder)
        refused(load_classifier, folder, message)
        refused(lambda config, name: ModelReward(config, Path(name)), folder, message)
        refused(lambda config, name: load_critic(config, name, str), folder, message)


def test_one_task_is_not_another(saved: Path) -> None:
    refused(load_policy, saved / "reward", "gives scores and writes no text")
    refused(load_classifier, saved / "policy", "no weights for score.weight")
    refused(load_classifier, saved / "steps", "scores each token")
    refused(lambda c, n: load_classifier(c, n, of_tokens=True), saved / "reward", "each answer")
    refused(lambda c, n: ModelReward(c, Path(n)), saved / "policy", "gives no scores")
    refused(lambda c, n: ModelReward(c, Path(n)), saved / "steps", "scores each token")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", "distilbert", "albert"])
@pytest.mark.parametrize("of_tokens", [False, True])
def test_a_fresh_head_is_for_training_alone(kind: str, of_tokens: bool, tmp_path: Path) -> None:
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    auto.from_config(small_config(kind, num_labels=1)).base_model.save_pretrained(tmp_path / "base")
    model = load_classifier(CPU, str(tmp_path / "base"), of_tokens, fresh_head=True)
    refused(lambda c, n: load_classifier(c, n, of_tokens), tmp_path / "base", "no weights for")
    model.save_pretrained(tmp_path / "trained")
    again = load_classifier(CPU, str(tmp_path / "trained"), of_tokens).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    layer = next(n for n in again if re.search("query|c_attn|q_proj|q_lin", n))
    without(layer)(tmp_path / "trained")
    refused(
        lambda c, n: load_classifier(c, n, of_tokens, fresh_head=True), tmp_path / "trained", layer
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_the_embedding_or_its_own(tied: bool, tmp_path: Path) -> None:
    config = small_config("llama")
    config.tie_word_embeddings = tied
    random_model(config).save_pretrained(tmp_path)
    if not tied:
        without("lm_head.weight")(tmp_path)
        refused(load_policy, tmp_path, "no weights for lm_head.weight")
        return
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_policy(CPU, str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights(lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"] + 1})(tmp_path)
    model = load_policy(CPU, str(tmp_path))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)
    assert not model.config.tie_word_embeddings
    save_model(tmp_path / "again", model, tiny_tokenizer(), "card")
    again = load_policy(CPU, str(tmp_path / "again")).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_names_that_are_of_no_weight_may_be_there(policy: Path, tmp_path: Path) -> None:
    weights(lambda s: {**s, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(policy)
    load_policy(CPU, str(policy))
    random_model(small_config("gpt2")).save_pretrained(tmp_path / "gpt2")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    weights(lambda s: {**s, "transformer.h.0.attn.bias": mask})(tmp_path / "gpt2")
    load_policy(CPU, str(tmp_path / "gpt2"))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_all_there_and_in_order(kind: str, tmp_path: Path) -> None:
    random_model(small_config(kind)).save_pretrained(tmp_path / "whole")
    load_policy(CPU, str(tmp_path / "whole"))
    name = next(n for n in load_file(tmp_path / "whole/model.safetensors") if ".experts.1." in n)
    last = name.replace(".experts.1.", ".experts.3.")
    changes: list[tuple[Change, str]] = [
        (without(name), re.escape(name)),
        (without(last), "down_proj|experts.3"),
        (put(name, lambda t: t[:-1]), re.escape(name)),
        (weights(lambda s: {k.replace(".experts.1.", ".experts.7."): v for k, v in s.items()}),
         "no weights for .*experts.1."),
    ]  # fmt: skip
    for i, (change, message) in enumerate(changes):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(i)))
        change(folder)
        refused(load_policy, folder, message)


def sharded(folder: Path) -> Path:
    random_model(small_config("llama")).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_shards(tmp_path: Path) -> None:
    whole = sharded(tmp_path / "whole")
    load_policy(CPU, str(whole))
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    first, last = files[0], files[-1]
    inside = {f: [n for n, at in index["weight_map"].items() if at == f] for f in (first, last)}
    shutil.copy(whole / first, tmp_path / "outside.safetensors")

    def moved(to: str) -> Change:
        places = {n: to if at == first else at for n, at in index["weight_map"].items()}
        return setting("model.safetensors.index.json", weight_map=places)

    def linked(folder: Path) -> None:
        (folder / first).unlink()
        (folder / first).symlink_to(tmp_path / "outside.safetensors")

    own = Path(shutil.copytree(whole, tmp_path / "own"))
    linked(own)
    load_policy(CPU, str(own))  # a link is the user's, as that of a single file
    changes: list[tuple[Change, str]] = [
        (lambda f: (f / last).unlink(), f"names {last}, which is not there"),
        (lambda f: os.truncate(f / last, 3000), f"{last} is no whole safetensors file"),
        (without_in(last, inside[last][0]), f"lacks {inside[last][0]}"),
        (weights(lambda s: {**s, inside[first][0]: torch.ones(2)}, last), "as another file does"),
        (moved("../outside.safetensors"), "outside of its folder"),
        (moved(str(tmp_path / "outside.safetensors")), "outside of its folder"),
        (setting("model.safetensors.index.json", weight_map=5), "has no weight_map"),
        (written("model.safetensors.index.json", DEEP), "nested too deep"),
    ]
    for i, (change, message) in enumerate(changes):
        folder = Path(shutil.copytree(whole, tmp_path / str(i)))
        change(folder)
        refused(load_policy, folder, message)


def without_in(file: str, name: str) -> Change:
    return weights(lambda state: {k: v for k, v in state.items() if k != name}, file)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    whole = sharded(tmp_path / "whole")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(whole.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    load_policy(CPU, str(snapshot))


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_bigcode", ["transformer.h.0.attn.bias"]),
        ("opt", ["model.decoder.layers.0.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_buffers_of_older_versions_may_be_there(
    kind: str, buffers: list[str], tmp_path: Path
) -> None:
    model = random_model(small_config(kind))
    model.save_pretrained(tmp_path)
    weights(lambda state: {**state, **{name: torch.ones(2) for name in buffers}})(tmp_path)
    loaded = load_policy(CPU, str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_two_scores_are_not_one(tmp_path: Path) -> None:
    config = small_config("bert", num_labels=2, pad_token_id=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    refused(load_classifier, tmp_path, "gives 2 scores")


def test_attention_is_ours_whatever_a_config_names(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "reward", tmp_path / "reward"))
    for name in ("flash_attention_2", "somebody/kernels"):
        setting(_attn_implementation=name, attn_implementation=name)(folder)
        assert load_classifier(CPU, str(folder)).config._attn_implementation == "sdpa"
