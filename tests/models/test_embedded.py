"""The embedded model in the cache is what was converted, or it is converted anew."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gearshift.models import embedded

FILES = {"model.safetensors": b"weights" * 99, "config.json": b"{}", "tokenizer.json": b"[1, 2]"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


DAMAGES: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""),
    lambda path: os.truncate(path, 1),
    lambda path: path.unlink(),
    flip,
    lambda path: (path.unlink(), path.mkdir()),
]


def test_what_is_damaged_is_converted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    conversions = []

    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        conversions.append(source)

    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "_file_of", lambda *_: tmp_path / "model.gguf")
    monkeypatch.setenv("GEARSHIFT_CACHE", str(tmp_path / "cache"))

    def used() -> Path:
        embedded._embedded_in.cache_clear()
        return embedded.embedded_folder()

    folder = used()
    for path in folder.iterdir():
        os.utime(path, ns=(5, 5))  # as in a copied cache
    assert used() == folder and len(conversions) == 1 and not caplog.text
    for damage in DAMAGES:
        for name in [*FILES, embedded._RECORD]:
            damage(folder / name)
            conversions.clear()
            caplog.clear()
            assert used() == folder and used() == folder
            assert len(conversions) == 1 and "is made again" in caplog.text
            assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in FILES} == FILES
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    embedded._embedded_in.cache_clear()
