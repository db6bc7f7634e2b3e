"""Loads a model with Hugging Face's library, and checks it before and after: every weight comes
from the files, nothing is logged, and errors are Gearshift's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from gearshift.errors import ModelError
from gearshift.models.adapter_files import file_of
from gearshift.models.attention import ATTENTION, NO_INTERFACE
from gearshift.models.embedded import source_of
from gearshift.models.read_in_parts import read_in_parts, why_whole
from gearshift.models.saved_config import check_settings, is_folder
from gearshift.models.saved_weights import (
    check_experts,
    check_layers,
    check_loaded,
    check_size,
    saved_weights,
)
from gearshift.runtime.distributed import world
from gearshift.runtime.hub import hub_is_reachable
from gearshift.runtime.terminal import echo, one_line

_COMPLETE: dict[str, Any] = {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}


def held(name: str, file: str) -> bool:
    """Whether a model has this file."""
    return file_of(source_of(name), file) is not None


def files_of_model(name: str) -> Path | None:
    """The folder with a model's files: a local one, or the hub's cache; None where they have not
    been loaded from the hub.
    """
    source = source_of(name)
    if is_folder(source):
        return Path(source)
    found = file_of(source, "config.json")
    return found.parent if found else None


def config_of(name: str, trust_remote_code: bool, **kwargs: Any) -> PreTrainedConfig:
    folder = files_of_model(name)
    if folder and not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; give a folder with a saved model.")
    if folder:
        check_settings(folder)
    found: PreTrainedConfig = from_pretrained(AutoConfig, name, trust_remote_code, **kwargs)
    found._attn_implementation = None  # a config may name code of the hub there
    return found


def model_of(
    auto: Any,
    name: str,
    trust_remote_code: bool,
    dtype: torch.dtype,
    attention: str | None,
    device: torch.device,
    fresh_head: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """A model whose every weight is the files', and which weights of its head are fresh. Where
    models are split over the ranks, each rank reads its part of the files if it can; `device` is
    where such a model is then.
    """
    settings = config_of(name, trust_remote_code, **kwargs)
    folder, weights = files_of_model(name), None
    if folder and is_folder(source_of(name)):
        weights = saved_weights(folder)
        check_layers(folder, weights)
        with torch.random.fork_rng(devices=[]), torch.device("meta"), loading(name):
            skeleton = auto.from_config(settings, trust_remote_code=trust_remote_code)
        check_size(folder, weights, skeleton)
    if world().sharded:
        model = _in_parts(auto, name, settings, dtype, device, trust_remote_code, attention)
        if model is not None:
            return model, set()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, report = from_pretrained(
                auto, name, trust_remote_code, config=settings, dtype=dtype,
                attn_implementation=attention, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except ModelError:
        if folder and weights:
            check_experts(folder, weights, even=True)  # with a clearer error
        raise
    if weights is None:  # the hub's files are here now
        weights = saved_weights(files_of_model(name) or Path(name))
    return model, check_loaded(name, model, report, weights, fresh_head)


def _in_parts(
    auto: Any,
    name: str,
    settings: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    attention: str | None,
) -> PreTrainedModel | None:
    """The model, of whose files each rank has read its part; None, and a line that says why, where
    each rank must load them whole.
    """
    folder = files_of_model(name) or Path(name)
    try:
        weights = saved_weights(folder)
    except ModelError:
        weights, whole = {}, "its files are not on this host yet"
    else:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), loading(name):
            skeleton = auto.from_config(settings, trust_remote_code=trust_remote_code)
        whole = why_whole(skeleton, weights, dtype)
    whole = next(filter(None, world().gather(whole, "how a model is read")), "")
    if whole:
        echo(f"{name}: each rank loads the whole model, because {whole}")
        return None
    with loading(name):
        model, read = read_in_parts(
            auto, settings, folder, dtype, device, trust_remote_code, attention
        )
    echo(f"{name}: this rank has read {read / 2**20:.1f} MiB of the weights")
    check_loaded(name, model, _COMPLETE, weights)
    return model


def from_pretrained(auto: Any, name: str, trust_remote_code: bool, **kwargs: Any) -> Any:
    source = source_of(name)
    local = is_folder(source) or not hub_is_reachable()
    with loading(name, "The tokenizer of" if auto is AutoTokenizer else "Model"):
        return auto.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local, **kwargs
        )


@contextmanager
def loading(name: str, what: str = "Model") -> Iterator[None]:
    """Inside, the library logs nothing, and its errors become a `ModelError`."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config, a file or code that is not ours may fail in any way
        raise ModelError(
            f"{what} {name!r} could not be loaded ({said(error)}); give a folder with a saved "
            "model, a Hugging Face name, or `embedded`."
        ) from error
    finally:
        hf_logging.set_verbosity(level)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, the library shows no progress of its own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def said(error: Exception) -> str:
    """A library's error, in one line."""
    if isinstance(error, KeyError) and error.args == (ATTENTION,):
        return NO_INTERFACE
    line = one_line(str(error), 300)
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"
