"""A kernel in the cache is loaded only if it is whole and the user's own; else it is built anew."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gearshift.errors import KernelError
from gearshift.kernels import build

SOURCE = """
extern "C" int answer() { return 42; }
extern "C" const char* signatures() { return ""; }
"""
TWICE = """
#include "common.h"
void twice(const float*, float) {}
EXPORT(twice, bf16, twice)
"""

pytestmark = pytest.mark.skipif(build.library() is None, reason="no compiled kernels here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a source that compiles at once."""
    sources = tmp_path / "cpp"
    sources.mkdir()
    shutil.copy(build._SOURCES / "common.h", sources)
    (sources / "small.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "_SOURCES", sources)
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
        f"build._SOURCES = Path({str(build._SOURCES)!r})\n"
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
    monkeypatch.setattr(build, "_load", lambda path: loaded.append(path.read_bytes()))
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


@pytest.mark.parametrize("arguments", ["int64_t, double", "double, int64_t*", "int64_t*", ""])
def test_a_kernel_that_takes_other_arguments_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setitem(build._ARGUMENTS, "twice", "Pd")
    source = build._SOURCES / "small.cpp"
    source.write_text(
        '#include "common.h"\nvoid twice(const float*, float) {}\nEXPORT(twice, bf16, twice)'
    )
    assert build.library.__wrapped__().twice_bf16
    source.write_text(source.read_text().replace("const float*, float", arguments))
    with pytest.raises(KernelError, match=r"kernel twice_bf16 takes the arguments .* gives Pd"):
        build.library.__wrapped__()


def test_a_kernel_that_nothing_calls_is_an_error(cache: Path) -> None:
    (build._SOURCES / "small.cpp").write_text(
        '#include "common.h"\nvoid twice() {}\nEXPORT(twice, bf16, twice)'
    )
    with pytest.raises(KernelError, match="twice_bf16"):
        build.library.__wrapped__()


def test_each_kernel_of_the_library_names_its_arguments() -> None:
    library = build.library()
    library.signatures.restype = ctypes.c_char_p
    named = {line.split(" ")[0] for line in library.signatures().decode().splitlines()}
    assert {f"{name}_float" for name in ("add_norm", "attend", "sample")} <= named
    for name in build._ARGUMENTS:
        for dtype, suffix in build._SUFFIX.items():
            assert build.has(name, dtype) == (f"{name}_{suffix}" in named)
