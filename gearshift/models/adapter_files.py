"""The files of an adapter: where they are, what they contain, and which model it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from gearshift.errors import ModelError
from gearshift.models.saved_config import is_folder, settings_in
from gearshift.models.saved_weights import FLOATS, Saved, check_kinds, tensors_in
from gearshift.runtime.hub import hub_is_reachable
from gearshift.runtime.yaml_text import read_yaml

SETTINGS = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MOST = 8
"""The greatest number of adapters of which each was trained on the one before."""


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of the adapter that this name means, a local folder's or one of the hub; None
    where it means a model.
    """
    found = [file_of(name, file) for file in (SETTINGS, _WEIGHTS)]
    if found[0] is None:
        return None
    if found[1] is None:
        raise ModelError(f"The adapter in {name} has no {_WEIGHTS}; save it as safetensors.")
    return found[0].parent


def file_of(name: str | Path, file: str) -> Path | None:
    """A file of a model, in a local folder or of the hub; None where there is none."""
    if is_folder(name):
        return Path(name, file) if Path(name, file).is_file() else None
    try:
        found = cached_file(
            name,
            file,
            local_files_only=not hub_is_reachable(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # no name of the hub; loading it is an error
        return None
    return Path(found) if found else None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The adapter's own config. Raises `ModelError`."""
    return settings_in(folder / SETTINGS)


def tensors_of(folder: Path) -> dict[str, Saved]:
    """Shape and type of each tensor in an adapter's file. Raises `ModelError`."""
    return check_kinds(folder, tensors_in(folder / _WEIGHTS), FLOATS)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter was trained on: a folder's is meant from here or from
    the adapter's folder. Raises `ModelError` if it is not given, or if adapters stand on each other
    in a circle.
    """
    found, seen = _named_base(folder), {folder.resolve()}
    below = Path(found)
    while is_folder(below) and (below / SETTINGS).is_file():
        if below.resolve() in seen or len(seen) > _MOST:
            how = (
                "names itself" if len(seen) == 1 else f"stands on {len(seen)} others, or on itself,"
            )
            raise ModelError(
                f"The adapter in {folder} {how} as the model it was trained on; give its base "
                f"model as base_model_name_or_path in {folder / SETTINGS}."
            )
        seen.add(below.resolve())
        below = Path(_named_base(below))
    return found


def _named_base(folder: Path) -> str:
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"The adapter in {folder} does not say which model it was trained on; write its name "
            f"or folder as base_model_name_or_path into {folder / SETTINGS}."
        )
    places = filter(is_folder, (Path(base).expanduser(), folder / base, *_beside(folder, base)))
    return next(
        (str(p) for p in places if any((p / f).is_file() for f in (SETTINGS, "config.json"))), base
    )


def _beside(folder: Path, base: str) -> list[Path]:
    """The stage of the base's name in the run that the adapter is of, which may have been moved;
    none where the base was a stage of another run.
    """
    recipe = folder.parent / "recipe.yaml"
    if not recipe.is_file():
        return []
    tree = read_yaml(recipe)
    run = tree.get("run") if isinstance(tree, dict) else None
    own = isinstance(run, dict) and Path(str(run.get("dir"))).name == Path(base).parent.name
    return [folder.parent / Path(base).name] if own else []
