"""The files of a run: whole or not there, and one line for what fails."""

import errno
import os
from pathlib import Path

import pytest

from gearshift.errors import StorageError
from gearshift.runtime import files
from gearshift.runtime.files import digest, read_json, reading, write_json, write_text, writing


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_text_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse) if broken == "fsync" else monkeypatch.setattr(
        Path, "replace", refuse
    )
    with pytest.raises(StorageError, match=r"recipe\.yaml cannot be written \(No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_text_that_does_not_change_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "text")
    before = path.stat()
    write_text(path, "text")
    assert path.stat().st_ino == before.st_ino
    write_text(path, "tent")
    assert path.read_text() == "tent"


def test_half_a_surrogate_pair_comes_back_from_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"said": "\ud800 \\ud800"})
    assert read_json(tmp_path / "a.json") == {"said": "\ud800 \\ud800"}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00" * 9, "[" * 100_000, "null"])
def test_json_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "done.json"
    path.write_text(text)
    with pytest.raises(
        StorageError, match=r"done\.json cannot be read \(.+\); delete it\."
    ) as caught:
        read_json(path, "delete it.")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_in_its_place_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_json(tmp_path / "done.json")
    with pytest.raises(StorageError, match="Is a directory"), reading(tmp_path):
        tmp_path.read_bytes()
    with pytest.raises(StorageError, match="Is a directory"), writing(tmp_path):
        tmp_path.write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder cannot be written"):
        write_text(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.EACCES, "is not writable"), (errno.EPERM, "is not writable"),
        (errno.EROFS, "read-only"), (errno.ENOSPC, "free some space"), (errno.EIO, "give another"),
    ],
)  # fmt: skip
def test_the_way_out_is_that_of_the_error(number: int, way_out: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as refused, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert way_out in str(refused.value)
    assert ("space" in way_out) == ("free some space" in str(refused.value))


def test_digest_is_of_every_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


@pytest.mark.parametrize(
    "point", ["mkdir", "open", "fileno", "fsync", "replace", "sync", "unlink", "none"]
)
def test_a_kill_at_any_point_leaves_the_old_text_or_the_new(tmp_path: Path, point: str) -> None:
    path = tmp_path / "recipe.yaml"
    write_text(path, "old")
    child = os.fork()
    if child == 0:
        owner = {"fsync": os, "sync": files}.get(point, Path)

        def die(*_: object, **__: object) -> None:
            os._exit(9)

        if point == "fileno":  # half of the text is in the file
            os.fsync = lambda handle: (os.ftruncate(handle, 1), os._exit(9))  # type: ignore
        elif point != "none":
            setattr(owner, point, die)
        write_text(path, "new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if point == "none" else 9)
    assert path.read_text() == ("new" if point in ("sync", "unlink", "none") else "old")
    left = [other for other in tmp_path.iterdir() if other != path]
    assert all(other.match(files.UNFINISHED) for other in left) and len(left) <= 1
    write_text(path, "newer")
    assert path.read_text() == "newer"
