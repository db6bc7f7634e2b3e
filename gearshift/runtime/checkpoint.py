"""Checkpoints: a step's whole state in one folder that is either complete or not there. No pickle.

A folder `step-000012` holds tensors.safetensors, state.json, and manifest.json with the digests of
both. It knows nothing of what the state is: optimizers, schedules and generators come as dicts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.errors import CheckpointError
from gearshift.runtime.files import digest, sync

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-NNNNNN` and prune to the `keep` newest up to this step; returns its path.

    state: JSON with string keys (`flatten` makes it). Everything is on the disk before the rename
    that makes it visible, so a crash leaves the checkpoint before. One process writes to a folder.
    Raises `CheckpointError` if the disk refuses.
    """
    final = folder / f"step-{step:06d}"
    partial, replaced = (final.with_name(f"{final.name}.tmp-{end}") for end in (os.getpid(), "old"))
    try:
        _drop(folder.glob("step-*.tmp-*"))
        partial.mkdir(parents=True)
        save_file(_owned(tensors), partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
        digests = {name: digest(partial / name) for name in (_TENSORS, _STATE)}
        (partial / _MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        if final.exists():  # Damaged, or of a run that was resumed from before it.
            final.rename(replaced)
        partial.rename(final)
        sync(folder)
        # Later steps stay: they may be of a longer run, begun anew in its folder by mistake.
        upto = [path for number, path in _steps(folder) if number <= step]
        _drop([*upto[keep:], *folder.glob("step-*.tmp-*")])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {final} cannot be written ({error}); make room, or use another folder."
        ) from error
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is complete, or None; `load` verifies its content.

    Raises `CheckpointError` for a link that leads nowhere, and for what may not be read: a run that
    took either for nothing would begin anew.
    """
    for path in (folder, *(path for _, path in _steps(folder))):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}, which is not there; put it back, "
                "or delete the link to begin anew."
            )
    return next((path for _, path in _steps(folder) if _manifest(path) is not None), None)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state. Raises `CheckpointError` if a file is not as was written."""
    digests = _manifest(path)
    if digests is None:
        raise CheckpointError(f"{path} is not a complete checkpoint; name another one.")
    for name, known in digests.items():
        if not (path / name).exists() or digest(path / name) != known:
            raise CheckpointError(
                f"{path / name} is damaged (its digest is wrong); delete {path}, and the run goes"
                " on from the checkpoint before it."
            )
    return load_file(path / _TENSORS), json.loads((path / _STATE).read_text(encoding="utf-8"))


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take nested dicts, lists and tuples apart into tensors by path and a JSON skeleton.

    For the state of optimizers, schedules, generators: `unflatten` gives the same types back, dict
    keys included. Raises TypeError, with the path, on anything that is not data.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _skeleton(state, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The state that `flatten` took apart; tensors are those of the mapping, not copies."""
    if isinstance(skeleton, list):
        return [unflatten(tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unflatten(tensors, item) for item in value)
    return {unflatten(tensors, k): unflatten(tensors, v) for k, v in value}


class Interrupt:
    """While it is open, SIGTERM and SIGINT only set `signal`; a second one acts as it used to.

    A loop that looks at `requested` between steps can so save and leave. Signals belong to the main
    thread: elsewhere it does nothing.
    """

    signal: int = 0
    """Number of the signal that came; 0 for none."""

    @property
    def requested(self) -> bool:
        """Whether one came."""
        return self.signal != 0

    def __enter__(self) -> Interrupt:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _skeleton(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of the state: tensors, tuples and dicts become `{kind: ...}`, the rest is itself."""
    if state is None or isinstance(state, bool | int | float | str):
        return state
    if isinstance(state, Tensor):
        # Numbered, because two paths may read alike: the key 1 and the key "1".
        name = f"{len(tensors)}{path}"
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, list | tuple):
        items = [_skeleton(item, f"{path}.{i}", tensors) for i, item in enumerate(state)]
        return items if isinstance(state, list) else {"tuple": items}
    if isinstance(state, Mapping):
        pairs = [
            [_skeleton(key, path, tensors), _skeleton(value, f"{path}.{key}", tensors)]
            for key, value in state.items()
        ]
        return {"dict": pairs}
    raise TypeError(f"A checkpoint cannot hold the {type(state).__name__} at `{path.strip('.')}`.")


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor on the CPU in a storage of its own: views of one buffer are cut apart."""
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


def _manifest(path: Path) -> dict[str, str] | None:
    """The digest of each file; None if the manifest is missing or broken."""
    try:
        digests = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check its rights."
        ) from None
    whole = isinstance(digests, dict) and set(digests) == {_TENSORS, _STATE}
    return digests if whole else None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints, complete or not, the newest first."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)


def _drop(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_symlink():  # what it leads to was put there by the user
            folder.unlink()
        else:
            shutil.rmtree(folder)
