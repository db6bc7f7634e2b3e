"""Checkpoints: the whole state of a step in one folder, which is either complete or not there. It
uses no pickle.

A folder `step-000012` holds tensors.safetensors, state.json, and manifest.json with the digests of
both. This file does not know what the state means: optimizers, schedules and generators hand it
over as dicts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.errors import CheckpointError
from gearshift.runtime import tagged_json
from gearshift.runtime.digests import sealed, unsealed
from gearshift.runtime.files import digest, sync

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-NNNNNN`, delete all but the `keep` newest checkpoints up to this step, and
    return the new one's path.

    `state` is JSON with string keys (`flatten` makes it). Everything is on the disk before the
    rename that makes it visible, so a crash leaves the earlier checkpoint. Only one process may
    write to a folder. Raises `CheckpointError` if the disk refuses.
    """
    final = folder / f"step-{step:06d}"
    partial, replaced = (final.with_name(f"{final.name}.tmp-{end}") for end in (os.getpid(), "old"))
    try:
        _drop(folder.glob("step-*.tmp-*"))
        partial.mkdir(parents=True)
        save_file(_owned(tensors), partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
        digests = {name: digest(partial / name) for name in (_TENSORS, _STATE)}
        (partial / _MANIFEST).write_text(json.dumps(sealed(digests)), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if final.exists():  # it is damaged, or of a run that was resumed from an earlier step
            final.rename(replaced)
        partial.rename(final)
        sync(folder)
        # Later steps stay: they may belong to a longer run that was started again in its folder by
        # mistake.
        upto = [path for number, path in _steps(folder) if number <= step]
        _drop([*upto[keep:], *folder.glob("step-*.tmp-*")])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {final} cannot be written ({error}); make room, or use another folder."
        ) from error
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, or None; `load` verifies its content.

    A checkpoint was complete when it got its name. So this raises `CheckpointError` for an
    incomplete one, for a link to nothing, and for one that cannot be read: a run that ignored them
    would silently go on from an older step, or start again.
    """
    steps = _steps(folder)
    for path in (folder, *(path for _, path in steps)):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}, which is not there; put it back, "
                "or delete the link to start again."
            )
    if not steps:
        return None
    _manifest(steps[0][1])
    return steps[0][1]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, complete or not; -1 if there is none."""
    return next((step for step, _ in _steps(folder)), -1)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state. Raises `CheckpointError` if a file has changed since
    it was written.
    """
    for name, known in _manifest(path).items():
        with _told(path):
            there = (path / name).is_file()
            if not there or digest(path / name) != known:
                what = "its digest is wrong" if there else "it is gone"
                raise _damaged(path, f"{name} is damaged ({what})")
    with _told(path):
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return load_file(path / _TENSORS), state


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take nested dicts, lists and tuples apart into tensors by path and a JSON skeleton.

    This is for the state of optimizers, schedules and generators: `unflatten` restores the same
    types, those of dict keys included. Raises TypeError, with the path, on anything that is not
    data.
    """
    tensors: dict[str, Tensor] = {}

    def leaf(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if not isinstance(value, Tensor):
            kind, where = type(value).__name__, path.strip(".")
            raise TypeError(f"A checkpoint cannot hold the {kind} at `{where}`.")
        # The number distinguishes two paths that look alike: those of the key 1 and of the key "1".
        name = f"{len(tensors)}{path}"
        tensors[name] = value
        return {"tensor": name}

    return tensors, tagged_json.encode(state, leaf)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The inverse of `flatten`; its tensors are those of the mapping, not copies."""
    return tagged_json.decode(skeleton, lambda _, name: tensors[name])


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor on the CPU in a storage of its own; views of one buffer are separated."""
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        alone = tensor.detach().cpu().contiguous()
        storage = alone.untyped_storage()
        if storage.nbytes() != alone.nbytes or storage.data_ptr() in storages:
            alone = alone.clone()
        storages.add(alone.untyped_storage().data_ptr())
        owned[name] = alone
    return owned


def _manifest(path: Path) -> dict[str, str]:
    """The digest of each file. Raises `CheckpointError` if the manifest is missing or broken."""
    try:
        with _told(path):
            digests = unsealed(json.loads((path / _MANIFEST).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _damaged(path, f"{_MANIFEST} is gone ({error.strerror})") from None
    except (ValueError, RecursionError):
        digests = None
    if digests is None or set(digests) != {_TENSORS, _STATE}:
        raise _damaged(path, f"{_MANIFEST} is damaged")
    return digests


def _damaged(path: Path, what: str) -> CheckpointError:
    """An error that names the way out and its consequence."""
    names = [other.name for _, other in _steps(path.parent)]
    older = names[names.index(path.name) + 1 :] if path.name in names else []
    then = f"goes on from {older[0]}" if older else "begins this stage anew"
    return CheckpointError(
        f"{path}: {what}; put it back as it was, or delete that folder: the run then {then}."
    )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn an error of reading into one line."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read ({error.strerror}); check its rights."
        ) from None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints, complete or not, the newest first."""
    try:
        with _told(folder):
            names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(
            f"{folder} is a file; move it away, because checkpoints need a folder of that name."
        ) from None
    found = [(re.fullmatch(r"step-([0-9]+)", name), name) for name in names]
    return sorted(((int(m[1]), folder / name) for m, name in found if m), reverse=True)


def _drop(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_symlink():  # the user put its target there
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink()
