"""Whichever write of a run fails, it is one line that names the file; and when there is space
again, the same command ends with the bits of the run whose writes did not fail.
"""

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch

from gearshift.cli.main import main
from tests.chaos.runs import fingerprint

RECIPE = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
NTH = [1, 4, 9, 16, 23, 31, 40, 50]
"""The writes of the short run that the fast suite makes fail."""


class Disk:
    """Counts what is written, made, renamed and synced in a folder; the `full`-th fails."""

    def __init__(self, folder: Path, full: int = 0, number: int = errno.ENOSPC) -> None:
        self.folder, self.full, self.number = str(folder), full, number
        self.count = 0

    def __enter__(self) -> "Disk":
        self._patches = ExitStack()
        opened, descriptor = io.open, os.open

        def writes(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if set(mode) & set("wax+") and isinstance(path, str | os.PathLike):
                self.look(path)
            return opened(path, mode, *rest, **named)

        def opens(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.look(path)
            return descriptor(path, flags, *rest, **named)

        for owner in (io, builtins):
            self._patch(owner, "open", writes)
        self._patch(os, "open", opens)
        for name in ("mkdir", "replace", "rename"):
            self._patch(os, name, self._first(getattr(os, name)))
        synced = os.fsync

        def syncs(handle: int) -> None:
            self.look(os.readlink(f"/proc/self/fd/{handle}"), named=False)
            synced(handle)

        self._patch(os, "fsync", syncs)
        wrote = safetensors.torch.serialize_file

        def serialises(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
            self.look(path, named=False)
            wrote(tensors, path, *rest, **named)

        self._patch(safetensors.torch, "serialize_file", serialises)
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def look(self, path: Any, named: bool = True) -> None:
        """Fail, if it is the turn of this one. `named`: whether the error names the file."""
        if not os.fspath(path).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.full:
            name = (os.fspath(path),) if named else ()
            raise OSError(self.number, os.strerror(self.number), *name)

    def _patch(self, owner: Any, name: str, to: Any) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, to))

    def _first(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def looked(path: Any, *rest: Any, **named: Any) -> Any:
            if not (call.__name__ == "mkdir" and Path(path).is_dir()):  # there is nothing to write
                self.look(path)
            return call(path, *rest, **named)

        return looked


def short(folder: Path) -> list[str]:
    """Two steps of supervised tuning, each with its checkpoint."""
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "on"}) + "\n" for i in "ab")
    )
    return [
        "sft", RECIPE, f"run.dir={folder / 'run'}", "task=null", "sft.batch_size=1",
        "sft.save_every=1", f"sft.data.sources=[{{path: '{rows}'}}]",
    ]  # fmt: skip


def whole(folder: Path) -> list[str]:
    """All stages of the smoke test, each with its checkpoints."""
    return [
        "run", RECIPE, f"run.dir={folder / 'run'}", "eval.limit=2", "sft.save_every=1",
        "rl.save_every=1", "eval.perplexity=true",
    ]  # fmt: skip


def bits(folder: Path) -> dict[str, str]:
    """What a run ends with, without what measures the sampler."""
    return {k: v for k, v in fingerprint(folder).items() if not k.endswith("metrics.jsonl")}


def fails_and_goes_on(
    words_of: Callable[[Path], list[str]],
    folder: Path,
    nth: int,
    number: int,
    uncut: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_of(folder)
    capsys.readouterr()
    with Disk(folder / "run", nth, number), pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    line = said.strip().splitlines()[-1]
    assert ended.value.code == 1, (nth, line)
    assert line.startswith("gearshift: ") and "Traceback" not in said, (nth, said)
    assert str(folder / "run") in line and os.strerror(number) in line, (nth, line)
    main(words)
    assert bits(folder) == uncut, nth


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("uncut")
    with Disk(folder / "run") as disk:
        main(short(folder))
    return disk.count, bits(folder)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
@pytest.mark.parametrize("nth", NTH)
def test_a_write_that_fails_is_one_line_and_loses_nothing(
    nth: int,
    uncut: tuple[int, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    count, wanted = uncut
    assert count >= NTH[-1]
    number = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)[nth % 4]
    fails_and_goes_on(short, tmp_path, nth, number, wanted, capsys)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
@pytest.mark.parametrize("words_of", [short, whole])
def test_every_write_may_fail(
    words_of: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Disk(tmp_path / "uncut" / "run") as disk:
        main(words_of(tmp_path / "uncut"))
    wanted = bits(tmp_path / "uncut")
    every = 1 if words_of is short else 7
    for nth in range(1, disk.count + 1, every):
        fails_and_goes_on(words_of, tmp_path / str(nth), nth, errno.ENOSPC, wanted, capsys)
