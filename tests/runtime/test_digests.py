"""Digests tell a file that changed, and are not computed twice."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.errors import StorageError
from gearshift.runtime import digests
from gearshift.runtime.digests import (
    check_unchanged,
    describe_difference,
    file_digest,
    file_digests,
    first_change,
    sealed,
    unsealed,
)


def test_how_a_file_is_not_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    known = file_digests(tmp_path, ["model.safetensors"])
    check_unchanged(tmp_path, known, "delete it.")
    for content, how in ((b"w", "it has 1 of 7 bytes"), (b"weighty", "its digest is wrong")):
        path.write_bytes(content)
        with pytest.raises(StorageError) as caught:
            check_unchanged(tmp_path, known, "delete it.")
        assert str(caught.value) == (
            f"{path} is not as the run wrote it ({how}); put it back as it was, or delete it."
        )
    assert not describe_difference(path, known["model.safetensors"], whole=False), (
        "the size is right"
    )
    path.unlink()
    assert describe_difference(path, known["model.safetensors"]) == "it is gone"


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "large", []
    path.write_bytes(b"a")
    plain = digests.digest
    monkeypatch.setattr(digests, "digest", lambda p: (reads.append(p), plain(p))[1])
    fresh = file_digest(path), file_digest(path)
    assert len(set(fresh)) == 1 and len(reads) == 2, "what was just written may change once more"
    monkeypatch.setattr(digests, "_GRAIN", -(10**12))
    assert {file_digest(path), file_digest(path)} == {fresh[0]} and len(reads) == 3
    path.write_bytes(b"b")
    os.utime(path, ns=(time.time_ns(), 0))
    assert file_digest(path) != fresh[0]


def test_which_file_changed() -> None:
    assert first_change({"a": "1"}, {"a": "1"}) == ""
    assert first_change({"a": "1", "b": "1"}, {"a": "1", "b": "2"}) == "b changed"
    assert (
        first_change({"a": "1"}, {}) == "a is gone" and first_change({}, {"a": "1"}) == "a is new"
    )


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text().filter(lambda key: key != "digest"), values))
def test_what_is_sealed_comes_back(value: dict[str, Any]) -> None:
    written = digests.json.loads(digests.json.dumps(sealed(value)))
    assert unsealed(written) == value
    assert unsealed({**value, "more": 1, "digest": sealed(value)["digest"]}) is None
    assert unsealed([]) is None and unsealed({"old": 1}) == {"old": 1}
