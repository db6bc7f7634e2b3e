"""Loads models (the embedded one, a tiny one, a local folder, or a Hugging Face name), and saves
them. Weights are read from safetensors only, never from a pickle.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gearshift.errors import ModelError
from gearshift.models.adapter_files import adapter_folder, adapter_settings, base_of, tensors_of
from gearshift.models.adapter_merge import merge_adapter
from gearshift.models.adapters import (
    AdapterConfig,
    adapted_layers,
    is_tied,
    merged_state,
    save_adapter,
    untie,
)
from gearshift.models.attention import ATTENTION
from gearshift.models.embedded import EMBEDDED, EMBEDDED_FOLDER, source_of
from gearshift.models.from_pretrained import (
    config_of,
    files_of_model,
    from_pretrained,
    held,
    model_of,
    without_bars,
)
from gearshift.models.made import check_made
from gearshift.models.saved_config import (
    check_settings,
    check_tokenizer_files,
    check_tokenizer_size,
    is_folder,
    listed,
)
from gearshift.models.saved_weights import check_finite
from gearshift.models.tiny import SIZES, tiny_model, tiny_tokenizer
from gearshift.runtime.chat_template_arguments import bind_arguments
from gearshift.runtime.config import Config, PathText

_ENCODER_TEMPLATE = (
    "{{ cls_token }}"
    "{% for message in messages %}{{ message['content'] }}{{ sep_token }}{% endfor %}"
)
Loaded = TypeVar("Loaded")
_HEADS = ("SEQ_CLS", "TOKEN_CLS")
"""The task types of adapters that have a score head."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelConfig(Config):
    """Which model, in what precision, on which device."""

    name: PathText = EMBEDDED
    """`embedded` (SmolLM2-135M-Instruct, no download), `minilm` (an encoder of 22M weights, for
    reward models), `tiny` (random, for tests), `small` (random, to train from nothing), a folder,
    or a Hugging Face name.
    """
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The precision of the weights in training and in generation; the optimizer's master weights
    are always float32. `auto` is bfloat16 where the hardware multiplies it fast, and float32
    elsewhere."""
    device: str = "auto"
    """`auto` takes a GPU if there is one; otherwise a torch device such as `cpu` or `cuda:1`."""
    threads: int | None = Field(default=None, ge=1)
    """How many CPU threads torch uses; null leaves the choice to torch."""
    lora: AdapterConfig | None = None
    """Low-rank adapters (LoRA), which are trained in place of the whole policy; null trains the
    policy."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the policy's chat template, in training, rollouts, evaluation and chat;
    for example `{enable_thinking: false}`. Reward models do not get them."""
    date: datetime.date | None = None
    """The date that chat templates use as today. null is the day on which the run began, also after
    a resume."""
    trust_remote_code: bool = False
    """Whether the model's repository may run its own Python code on this machine."""


def resolve_device(name: str) -> torch.device:
    """The device of this name; `auto` is a GPU if there is one. A GPU becomes this thread's current
    one, whose memory and waits the metrics measure. Raises `ModelError` for a device that this
    machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"Device {name!r} is not available here; use device=auto or cpu."
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 if the device multiplies it fast, else float32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_policy(config: ModelConfig, name: str | None = None) -> PreTrainedModel:
    """A causal language model that is ready for the engine: with our attention, in evaluation mode,
    in one dtype. Raises `ModelError` for a model that does not write text.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    name = name or config.name
    check_made(name)
    if name in SIZES:
        model: PreTrainedModel = tiny_model(**SIZES[name]).to(dtype)
        model.set_attn_implementation(ATTENTION)
    elif folder := adapter_folder(source_of(name)):
        if adapter_settings(folder).get("task_type") in _HEADS:
            raise ModelError(f"The adapter in {name} makes a reward model, which writes no text.")
        model = merge_adapter(_base(folder, lambda base: load_policy(config, base)), folder)
    else:
        kinds = load_config(config, name).architectures or ()
        if any(kind.endswith("Classification") for kind in kinds):
            raise ModelError(  # if its embedding can be the head, it would load
                f"{name} contains a model that gives scores and writes no text; name a language "
                "model."
            )
        model, _ = model_of(
            AutoModelForCausalLM, name, config.trust_remote_code, dtype, ATTENTION, device
        )
        if not is_tied(model):  # the saved head differs from the embedding
            untie(model)
    check_finite(name, model)
    return model.to(device).eval()


def load_classifier(
    config: ModelConfig, name: str | None = None, of_tokens: bool = False, fresh_head: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one label (a reward model) from a decoder or an encoder; with
    `of_tokens` a token classifier with one label (a process reward model).

    Raises `ModelError` for a model without a trained score head. With `fresh_head` the model gets a
    new head instead, which is drawn from a fixed seed.
    """
    name = name or config.name
    check_made(name)
    model, untrained = _classifier(config, name, of_tokens, fresh_head)
    if untrained and not fresh_head:
        raise ModelError(
            f"The adapter in {name} has no trained score head ({listed(untrained)} would be "
            "random); give a reward model."
        )
    check_finite(name, model)
    return model


def _classifier(
    config: ModelConfig, name: str, of_tokens: bool, fresh_head: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the weights of its head that are not trained."""
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    untrained: set[str] = set()
    if name in SIZES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = tiny_model(**SIZES[name])
            tiny.config.num_labels = 1
            model: PreTrainedModel = auto.from_config(tiny.config)
        model.base_model.load_state_dict(tiny.base_model.state_dict())
        model = model.to(dtype)
    elif folder := adapter_folder(source_of(name)):
        base, lacks = _base(folder, lambda base: _classifier(config, base, of_tokens, True))
        model = merge_adapter(base, folder)
        brought = tensors_of(folder)
        untrained = {key for key in lacks if not any(n.endswith(f".{key}") for n in brought)}
    else:
        other = "ForSequenceClassification" if of_tokens else "ForTokenClassification"
        kinds = load_config(config, name).architectures or ()
        if not fresh_head and any(kind.endswith(other) for kind in kinds):
            one, two = ("answer", "token") if of_tokens else ("token", "answer")
            raise ModelError(
                f"{name} contains a model that scores each {one}, but a model that scores each "
                f"{two} is needed; name another model."
            )
        model, untrained = model_of(
            auto, name, config.trust_remote_code, dtype, None, device, fresh_head, num_labels=1
        )
    return model.to(device).eval(), untrained


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter was saved in this folder."""
    # `adapter_folder` would ask the hub for a folder that does not exist.
    return folder.is_dir() and (
        (folder / "config.json").is_file() or adapter_folder(folder) is not None
    )


def load_config(config: ModelConfig, name: str | None = None) -> PreTrainedConfig:
    """The model's own config; for an adapter, the config of the model that it was trained on."""
    name = name or config.name
    if name in SIZES:
        return tiny_model(**SIZES[name]).config
    if folder := adapter_folder(source_of(name)):
        return _base(folder, lambda base: load_config(config, base))
    return config_of(name, config.trust_remote_code)


def writes_text(config: ModelConfig, name: str) -> bool:
    """Whether the model of this name is a causal language model; other models give scores, or
    hidden states for a score head.
    """
    if name in SIZES:
        return True
    folder = adapter_folder(source_of(name))
    if folder and adapter_settings(folder).get("task_type") in _HEADS:
        return False
    if folder:
        return _base(folder, lambda base: writes_text(config, base))
    kinds = load_config(config, name).architectures or ["ForCausalLM"]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return any(kind in known or kind.endswith("ForCausalLM") for kind in kinds)


def load_tokenizer(
    config: ModelConfig, name: str | None = None, of_policy: bool = True
) -> PreTrainedTokenizerBase:
    """The model's tokenizer. If it has no pad token, the end token becomes its pad token. An
    encoder's tokenizer without a chat template gets one that separates the messages. `of_policy`:
    the chat template gets the config's `chat_template_kwargs`. Raises `ConfigError` if the template
    does not use one of them.
    """
    name = name or config.name
    check_made(name)
    tokenizer = tiny_tokenizer() if name in SIZES else _tokenizer(config, name)
    bind_arguments(tokenizer, config.chat_template_kwargs if of_policy else {}, config.date)
    return tokenizer


def _tokenizer(config: ModelConfig, name: str) -> PreTrainedTokenizerBase:
    if (folder := adapter_folder(source_of(name))) and not (
        folder / "tokenizer_config.json"
    ).is_file():
        return _base(folder, lambda base: _tokenizer(config, base))
    here = files_of_model(name)
    if here:
        check_settings(here)
        check_tokenizer_size(here)
    try:
        tokenizer: PreTrainedTokenizerBase = from_pretrained(
            AutoTokenizer, name, config.trust_remote_code
        )
    except ModelError:
        if here:
            check_tokenizer_files(here)  # its error is clearer
        raise
    named = tokenizer.vocab_files_names
    words = [named[key] for key in ("vocab_file", "merges_file") if key in named]
    lost = [f for f in words or named.values() if not held(name, f)]
    if lost and not (held(name, "tokenizer.json") or held(name, "tokenizer.model")):
        raise ModelError(  # transformers would make a tokenizer with an empty or a wrong vocabulary
            f"{name} has neither tokenizer.json nor {lost[0]}; copy the model's tokenizer into it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = _ENCODER_TEMPLATE
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion: those of the tokenizer and of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(t for t in (*listed, tokenizer.eos_token_id) if t is not None)


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    lora: AdapterConfig | None = None,
    base: str = "",
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files that `from_pretrained` reads: safetensors, config, generation config,
    tokenizer, chat template, and the model's card. `lora.save` decides how a model with adapters is
    saved; `base` names the model that they were trained on. `weights`, if they are given, stand in
    place of the model's state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Aliased parameters are slices of one buffer; the file has each as a separate tensor.
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if is_tied(model) else set()
    adapted = bool(adapted_layers(model))
    if adapted:
        alone = lora is not None and lora.save == "adapter"
        with without_bars():
            save_adapter(folder if alone else folder / "adapter", model, base)
    if not (adapted and alone):
        own = merged_state(model) if weights is None else weights
        state = {k: v for k, v in own.items() if k not in tied}
        model._hf_peft_config_loaded = False  # otherwise only the adapter is written
        with without_bars():
            model.save_pretrained(folder, state_dict=state)
        model._hf_peft_config_loaded = adapted
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _base(adapter: Path, load: Callable[[str], Loaded]) -> Loaded:
    """What `load` gives for the model that an adapter was trained on."""
    base = base_of(adapter)
    if Path(base).name == EMBEDDED_FOLDER and not is_folder(base):  # the cache of another machine
        base = EMBEDDED
    try:
        return load(base)
    except ModelError as error:
        raise ModelError(f"The adapter in {adapter} was trained on {base}. {error}") from error
