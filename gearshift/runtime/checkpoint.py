"""Checkpoints: the whole state of a step in one folder, which is either complete or not there. It
uses no pickle.

A folder `step-000012` holds tensors.safetensors, state.json, and manifest.json with the digests of
all files. Of several ranks each also writes its parts, as a file of torch.distributed.checkpoint in
the format of safetensors; any number of ranks reads them. This file does not know what the state
means: optimizers, schedules and generators hand it over as dicts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gearshift.errors import CheckpointError
from gearshift.runtime import tagged_json
from gearshift.runtime.digests import sealed, unsealed
from gearshift.runtime.distributed import Part, world
from gearshift.runtime.files import digest, sync
from gearshift.runtime.terminal import counted, one_line

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor | Part],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-NNNNNN`, delete all but the `keep` newest checkpoints up to this step, and
    return the new one's path.

    `state` is JSON with string keys (`flatten` makes it). Everything is on the disk before the
    rename that makes it visible, so a crash leaves the earlier checkpoint. Only one run may write
    to a folder; its ranks call this together, each writes its parts, and the main one the rest.
    Raises `CheckpointError` if the disk refuses.
    """
    final = folder / f"step-{step:06d}"
    parts = {name: x for name, x in tensors.items() if isinstance(x, Part)}
    whole = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    if world().size == 1:
        whole |= {name: part.own for name, part in parts.items()}
    state = {**state, "parts": {name: _described(part) for name, part in parts.items()}}
    refused = _refused(final)
    begin, write, end = refused(_begin), refused(_write_parts), refused(_end)
    partial = Path(world().says(lambda: begin(folder, final), "a checkpoint's folder"))
    found: list[dict[str, str]] = [{}]
    if world().size > 1:
        found = world().each(lambda: write(partial, parts), "the parts of a checkpoint")
    digests = {name: known for files in found for name, known in files.items()}
    world().says(lambda: end(partial, final, whole, state, digests, keep), "a checkpoint")
    return final


def _described(part: Part) -> dict[str, Any]:
    """What a reader must know of a tensor that is saved in parts."""
    shape = [part.rows, *part.own.shape[1:]] if part.rows is not None else [*part.own.shape]
    kind = str(part.own.dtype).removeprefix("torch.")
    return {"shape": shape, "dtype": kind, "ranks": None if part.rows is not None else world().size}


def _begin(folder: Path, final: Path) -> str:
    """Make the folder that becomes the checkpoint."""
    _drop(folder.glob("step-*.tmp-*"))
    partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    return str(partial)


def _write_parts(partial: Path, parts: Mapping[str, Part]) -> dict[str, str]:
    """Write this rank's parts, together with the other ranks; the digests of its files."""
    from torch.distributed.checkpoint import api, hf_storage, state_dict_saver

    whole = {_key(name, part.rows): _sharded(part.own, part.rows) for name, part in parts.items()}
    writer = hf_storage.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    try:
        state_dict_saver.save(whole, storage_writer=writer)
    except api.CheckpointException as error:
        raise _first_failure(error) from None
    own = sorted(partial.glob(f"shard-{world().rank + 1:05d}-*"))
    for path in own:
        sync(path)
    return {path.name: digest(path) for path in own}


def _key(name: str, rows: int | None) -> str:
    """The name in the files of a part; a rank's own tensor has a name of its own."""
    return name if rows is not None or world().size == 1 else f"{name}@{world().rank}"


def _sharded(own: Tensor, rows: int | None) -> Tensor:
    """The part as torch.distributed.checkpoint knows parts; one rank's part is the whole."""
    own = own.detach().cpu().contiguous()
    if rows is None or world().size == 1:
        return own
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (world().size,))
    shape = torch.Size((rows, *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _first_failure(error: Any) -> Exception:
    """What one of the ranks met when all of them wrote or read."""
    failures = [failure for failure, _ in error.failures.values()]
    known = [f for f in failures if isinstance(f, OSError | SafetensorError)]
    return known[0] if known else RuntimeError(one_line(str(failures[0])))


def _end(
    partial: Path,
    final: Path,
    whole: Mapping[str, Tensor],
    state: Mapping[str, Any],
    digests: dict[str, str],
    keep: int,
) -> None:
    """Write what is not in parts, and give the folder its name."""
    folder, replaced = final.parent, final.with_name(f"{final.name}.tmp-old")
    save_file(_owned(whole), partial / _TENSORS)
    (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
    digests |= {name: digest(partial / name) for name in (_TENSORS, _STATE)}
    (partial / _MANIFEST).write_text(json.dumps(sealed(digests)), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        sync(path)
    if final.exists():  # it is damaged, or of a run that was resumed from an earlier step
        final.rename(replaced)
    partial.rename(final)
    sync(folder)
    # Later steps stay: they may belong to a longer run that was started again in its folder by
    # mistake.
    step = int(final.name.removeprefix("step-"))
    upto = [path for number, path in _steps(folder) if number <= step]
    _drop([*upto[keep:], *folder.glob("step-*.tmp-*")])


@contextmanager
def _refused(final: Path) -> Iterator[None]:
    """Turn an error of the disk into one line, before the other ranks get it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {final} cannot be written ({error}); make room, or use another folder."
        ) from error


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
    """The tensors (on the CPU) and the state; of a tensor that was saved in parts, this rank's part
    by the present number of ranks. Raises `CheckpointError` if a file has changed since it was
    written.
    """
    files = sorted(_manifest(path).items())
    world().each(lambda: _refuse_foreign(path, dict(files)), "the files of a checkpoint")
    world().each(lambda: _verify(path, world().mine(files)), "the digests of a checkpoint")
    with _told(path):
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        described = state.pop("parts", {})
        with safe_open(path / _TENSORS, "pt") as file:
            names, one_rank = file.keys(), world().size == 1
            wanted = [name for name in names if one_rank or name not in described]
            tensors = {name: file.get_tensor(name) for name in wanted}
    left = {name: of for name, of in described.items() if name not in tensors}
    if left:
        tensors |= _read_parts(path, left)
    return tensors, state


def _refuse_foreign(path: Path, known: Iterable[str]) -> None:
    """Refuse files that a reader would take, though the manifest has no digest of them."""
    if foreign := sorted({file.name for file in path.glob("*.safetensors")} - {*known}):
        raise _damaged(path, f"{foreign[0]} is there, and it is of another checkpoint")


def _verify(path: Path, files: Iterable[tuple[str, str]]) -> None:
    for name, known in files:
        with _told(path):
            there = (path / name).is_file()
            if not there or digest(path / name) != known:
                what = "its digest is wrong" if there else "it is gone"
                raise _damaged(path, f"{name} is damaged ({what})")


def _read_parts(path: Path, described: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """This rank's parts of these tensors, together with the other ranks."""
    from torch.distributed.checkpoint import api, hf_storage, state_dict_loader

    own: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for name, of in described.items():
        if of["ranks"] not in (None, world().size):
            raise CheckpointError(
                f"{path} has an optimizer's state of {counted(of['ranks'], 'rank')}, which only as "
                f"many can take up; start as many processes, or delete that folder."
            )
        (rows, *rest), kind = of["shape"], getattr(torch, of["dtype"])
        if of["ranks"] is None:
            mine = world().part_of(rows)
            own[name] = torch.empty((mine.stop - mine.start, *rest), dtype=kind)
            keys[name] = _sharded(own[name], rows)
        else:
            own[name] = torch.empty(of["shape"], dtype=kind)
            keys[_key(name, None)] = own[name]
    reader = hf_storage.HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of one process, which is meant
            state_dict_loader.load(keys, storage_reader=reader, no_dist=world().size == 1)
    except api.CheckpointException as error:
        raise _damaged(path, one_line(str(_first_failure(error)))) from None
    return own


def flatten(state: Any) -> tuple[dict[str, Tensor | Part], Any]:
    """Take nested dicts, lists and tuples apart into tensors by path and a JSON skeleton.

    This is for the state of optimizers, schedules and generators: `unflatten` restores the same
    types, those of dict keys included. Raises TypeError, with the path, on anything that is not
    data.
    """
    tensors: dict[str, Tensor | Part] = {}

    def leaf(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if not isinstance(value, Tensor | Part):
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
    if digests is None or not set(digests) >= {_TENSORS, _STATE}:
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
