"""Whether the settings and the tokenizer of a saved model can be read: a hostile or broken file is
refused by its name before a library reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gearshift.errors import ModelError
from gearshift.runtime.terminal import counted, one_line

INDEX = "model.safetensors.index.json"
_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", INDEX,
)  # fmt: skip
_TOKENIZERS = "tokenizer*.json", "vocab.*", "*.model", "merges.txt", "*.tiktoken", "tekken.json"
_LARGEST, _LARGEST_TOKENIZER = 2**26, 2**29
"""Bytes of a file of settings, and of a tokenizer."""
_COUNTS = {
    re.compile(r"(^|_)(layers|heads|experts|blocks)$|^n_(layer|head)$"): 10_000,
    re.compile(r"^num_labels$"): 100_000,
    re.compile(r"^((vocab|hidden|intermediate)_size|n_embd|d_model|head_dim)$"): 2**31,
    re.compile(r"^(max_position_embeddings|n_positions)$"): 2**31,
}
"""The greatest numbers under these keys: a greater one takes hours or all memory to refuse."""
_POSITIVE = {
    "vocab_size", "hidden_size", "n_embd", "d_model", "head_dim", "max_position_embeddings",
    "n_positions", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads",
}  # fmt: skip


def is_folder(name: str | Path) -> bool:
    """Whether a model's name is a folder's; a name may be one of the hub, or of nothing."""
    try:
        return Path(name).is_dir()
    except OSError:  # too long, for example
        return False


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    every = sorted(names)
    more = f" and {counted(len(every) - 3, 'other')}" if every[3:] else ""
    return ", ".join(one_line(name, 100) for name in every[:3]) + more


def settings_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a saved model."""
    with _reading(path):
        value = json.loads(_text(path))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value


def _text(path: Path) -> str:
    if not path.is_file():
        raise ValueError("it is no file")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"it has {size:,} bytes")
    return path.read_text(encoding="utf-8")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deep" if deep else getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"{path} cannot be read ({one_line(reason, 150)}); save the model again, or copy this "
            "file again."
        ) from error


def check_settings(folder: Path) -> None:
    """Raises `ModelError` for a file of settings that is broken, or has a value that no model
    has.
    """
    if (template := folder / "chat_template.jinja").exists():
        with _reading(template):
            _text(template)
    for name in _SETTINGS:
        if (folder / name).exists():
            found = settings_in(folder / name)
            if name == "config.json":
                _check_config(folder / name, found)
            if name == "tokenizer_config.json":
                _check_kind(folder / name, found, "chat_template", (str, list))
                _check_kind(folder / name, found, "model_max_length", (int, float))


def check_tokenizer_files(folder: Path) -> None:
    """Raises `ModelError` that names the file for which a tokenizer could not be loaded."""
    if not any(True for pattern in _TOKENIZERS for _ in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json of its "
            "model into it."
        )
    for path in folder.glob("tokenizer*.json"):
        if path.is_file() and path.stat().st_size <= _LARGEST:
            settings_in(path)


def check_tokenizer_size(folder: Path) -> None:
    """Raises `ModelError` for a tokenizer that fills the memory."""
    path = folder / "tokenizer.json"
    if path.is_file() and path.stat().st_size > _LARGEST_TOKENIZER:
        refuse(path, f"has {path.stat().st_size:,} bytes", "give the model's own tokenizer")


def _check_config(path: Path, config: dict[str, Any]) -> None:
    for where in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(where, dict) and where.get(key) is not None:
                given = where[key]
                how = given.get("quant_method", key) if isinstance(given, dict) else given
                refuse(
                    path.parent, f"holds quantised weights ({one_line(str(how), 40)})",
                    "give the model in bf16 or fp32; if it is, take "
                    f"{key} out of its config.json",
                )  # fmt: skip
    kinds = config.get("architectures")
    if not (kinds is None or (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds))):
        refuse(path, "has architectures that are no list of names", "name the model's class")
    for key, value in numbers_in(config):
        shown = f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {str(value)[:40]}"
        if value != value:
            refuse(path, f"has {shown}", "set it to a number")
        if type(value) is int and ((key in _POSITIVE and value <= 0) or _beyond(key, value)):
            refuse(path, f"has {shown}, which no model has", "set it to the model's own")


def _beyond(key: str, value: int) -> bool:
    return any(not 0 <= value <= most for pattern, most in _COUNTS.items() if pattern.search(key))


def numbers_in(value: Any) -> Iterator[tuple[str, int | float]]:
    """Each number of a nested config, with its key."""
    stack = [("", value)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.items())
        elif isinstance(value, list):
            stack.extend((key, v) for v in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _check_kind(path: Path, found: dict[str, Any], key: str, kinds: tuple[type, ...]) -> None:
    if found.get(key) is not None and not isinstance(found[key], kinds):
        refuse(path, f"has {key}: {one_line(str(found[key]), 40)}", "give the model's own file")


def refuse(path: Path, what: str, way_out: str) -> NoReturn:
    raise ModelError(f"{path} {what}; {way_out}.")
