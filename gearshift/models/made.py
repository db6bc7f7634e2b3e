"""Digests of a model's files, which are recorded when a stage starts from the model or writes it,
and compared before it is used.
"""

from __future__ import annotations

import os
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from gearshift.errors import StorageError
from gearshift.models.adapter_files import adapter_folder, base_of
from gearshift.models.embedded import EMBEDDED, source_of
from gearshift.models.tiny import SIZES
from gearshift.runtime.digests import (
    Digests,
    check_unchanged,
    describe_difference,
    file_digest,
    read_sealed,
)

DONE = "done.json"
_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template*", "*.model", "*.py",
)  # fmt: skip
_PLACES = ("", "adapter", "ema", "ema/adapter")
"""Where in a stage's folder models lie."""


def files_of(folder: Path) -> list[str]:
    """The names of the files in a folder that belong to a model."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _FILES)]


def written_by(stage: Path) -> list[str]:
    """Names of the files that a stage's models are made of, and of its records."""
    places = [place for place in _PLACES if (stage / place).is_dir()]
    models = [str(Path(place, name)) for place in places for name in files_of(stage / place)]
    records = [name for name in ("metrics.jsonl", "rollouts.jsonl") if (stage / name).is_file()]
    return models + records


def made_of(name: str) -> Digests:
    """The files of the model of this name by their names, those under an adapter by `base/`; of one
    on the hub the commit, once it was loaded. Nothing where the folder is not there.
    """
    if name in SIZES:
        return {}
    source = Path(source_of(name))
    if not os.path.isdir(source):  # also where the name is too long to be one
        with suppress(ValueError):  # no name of the hub; loading it is an error that says so
            config = try_to_load_from_cache(name, "config.json")
            return {"commit": Path(config).parent.name} if isinstance(config, str) else {}
        return {}
    # Each machine converts the embedded model itself, and its library writes the settings.
    files = [f for f in files_of(source) if name != EMBEDDED or f.endswith(".safetensors")]
    found = {file: file_digest(source / file) for file in files}
    if adapter_folder(source):
        found |= {f"base/{file}": known for file, known in made_of(base_of(source)).items()}
    return found


def check_made(name: str) -> None:
    """Raises `StorageError` if a stage of a run wrote the model of this name, and its files, or
    those of the model that it is an adapter of, are not as they were.
    """
    folder = Path(name)
    homes = (folder, *folder.parents)[:3] if os.path.isdir(name) else ()
    home = next((place for place in homes if (place / DONE).is_file()), None)
    if home is None:
        return
    way_out = f"delete {home} to do this stage again."
    done = read_sealed(home / DONE, way_out)
    place = folder.relative_to(home)
    written = {n: m for n, m in done.get("digests", {}).items() if not n.endswith(".jsonl")}
    check_unchanged(home, {n: m for n, m in written.items() if Path(n).parent == place}, way_out)
    if (base := done.get("base")) and adapter_folder(folder):
        check_unchanged(Path(source_of(base_of(folder))), base, "name another model.")


def check_kept(stage: Path) -> str:
    """Raises `StorageError` if a file of a stage that is kept is not as it was; weights are read
    when they are used, and count by their size till then. Records may be deleted. What is not known
    of an earlier version's stage, in words.
    """
    way_out = f"delete {stage} to do this stage again."
    known = read_sealed(stage / DONE, way_out).get("digests")
    for name, was in (known or {}).items():
        path = stage / name
        record = name.endswith(".jsonl")
        how = describe_difference(path, was, whole=not name.endswith(".safetensors"))
        if how and not (record and not path.exists()):
            raise StorageError(
                f"{path} is not as the run wrote it ({how}); put it back as it was, or "
                f"{'delete it.' if record else way_out}"
            )
    return "" if known else "; an earlier version made it, and its files cannot be checked"
