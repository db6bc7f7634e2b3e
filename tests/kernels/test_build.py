"""A kernel in the cache is loaded only if it is whole and the user's own; else it is built anew."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearshift.kernels import build

SOURCE = 'extern "C" int answer() { return 42; }\n'

pytestmark = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a source that compiles at once."""
    source = tmp_path / "small.cpp"
    source.write_text(SOURCE)
    monkeypatch.setattr(build, "_SOURCE", source)
    folder = tmp_path / "cache"
    monkeypatch.setenv("GEARSHIFT_CACHE", str(folder))
    yield folder


def built(cache: Path) -> Path:
    [path] = cache.glob("kernels-*")
    return path


def answer() -> int:
    """What the library says when it is loaded by a new process, which a bad one would end."""
    code = (
        "import sys; from pathlib import Path; from gearshift.kernels import build\n"
        f"build._SOURCE = Path({str(build._SOURCE)!r})\n"
        "sys.stdout.write(str(build.library.__wrapped__().answer()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def flipped(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 4
    path.write_bytes(whole)


DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\x7fELF" * 99),
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: (path.unlink(), os.mkfifo(path)),
    flipped,
]


def test_a_damaged_library_is_told_and_built_anew(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bytes] = []  # for to damage what this process has mapped would end it
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(Path(path).read_bytes()))
    build.library.__wrapped__()
    whole = loaded.pop()
    for damage in DAMAGES:
        damage(built(cache))
        caplog.clear()
        build.library.__wrapped__()
        assert loaded.pop() == built(cache).read_bytes() == whole
        assert caplog.text.count("is damaged and is built anew") == 1
        build.library.__wrapped__()
        assert caplog.text.count("\n") == 1


def test_a_torn_library_ends_no_process(cache: Path) -> None:
    assert answer() == 42
    os.truncate(built(cache), built(cache).stat().st_size // 2)
    assert answer() == 42


def test_a_library_that_others_may_write_is_not_loaded(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build.library.__wrapped__() is not None
    for path in (cache, built(cache)):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        caplog.clear()
        assert build.library.__wrapped__().answer() == 42
        assert "Others may write" in caplog.text
        path.chmod(mode)


def test_a_library_of_another_user_is_not_loaded(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    assert build.library.__wrapped__() is not None
    os.chown(built(cache), 12345, 12345)
    assert build.library.__wrapped__().answer() == 42
    assert "Others may write" in caplog.text


def test_a_cache_that_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file in the folder's place")
    assert build.library.__wrapped__().answer() == 42
    assert "built for this process alone" in caplog.text


def test_no_place_at_all(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file in the folder's place")
    monkeypatch.setattr(build.tempfile, "tempdir", str(cache))
    assert build.library.__wrapped__() is None
    assert "tensor functions run instead" in caplog.text
