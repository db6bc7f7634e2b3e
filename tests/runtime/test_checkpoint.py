"""A checkpoint is whole or not there; what was saved comes back bit for bit."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gearshift.errors import CheckpointError
from gearshift.runtime import checkpoint
from gearshift.runtime.checkpoint import (
    flatten,
    latest,
    load,
    newest_step,
    save,
    unflatten,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit, nested, the order of keys included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_names(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4).bfloat16(), "n": torch.tensor(7), "none": torch.zeros(0, 2)}
    state = {"step": 12, "text": "ä", "lr": 0.1, "deep": {"list": [1, None, True]}}
    path = save(tmp_path / "run" / "ckpt", 12, tensors, state)
    assert path.name == "step-000012"
    back, values = load(path)
    assert same({k: back[k] for k in tensors}, tensors)
    assert same(values, state)


def test_views_of_one_buffer_come_back_apart(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).reshape(4, 3)
    tensors = {"q": buffer[:2], "k": buffer[2:], "all": buffer, "tied": buffer, "t": buffer.T}
    back, _ = load(save(tmp_path, 1, tensors, {}))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert len({t.data_ptr() for t in back.values()}) == 5


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4, 1_000_000):
        save(tmp_path, step, {}, {"step": step}, keep=2)
    assert names(tmp_path) == ["step-000030", "step-1000000"]
    assert load(latest(tmp_path) or tmp_path)[1] == {"step": 1_000_000}


def test_a_run_begun_anew_destroys_nothing_of_a_longer_one(tmp_path: Path) -> None:
    save(tmp_path, 50, {}, {}, keep=1)
    save(tmp_path, 1, {}, {}, keep=1)
    save(tmp_path, 2, {}, {}, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000050"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, {}, {"take": 1})
    path = save(tmp_path, 5, {}, {"take": 2})
    assert load(path)[1] == {"take": 2}
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("point", ["save_file", "digest", "sync", "rename"])
def test_a_kill_at_any_point_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    before = save(tmp_path, 1, {"w": torch.ones(2)}, {"step": 1})
    child = os.fork()
    if child == 0:
        owner = Path if point == "rename" else checkpoint
        monkeypatch.setattr(owner, point, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            save(tmp_path, 2, {"w": torch.zeros(2)}, {"step": 2})
        finally:
            os._exit(1)  # Not reached: the kill comes first.
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert names(tmp_path) == ["step-000001", f"step-000002.tmp-{child}"]
    assert latest(tmp_path) == before
    assert load(before)[1] == {"step": 1}
    save(tmp_path, 2, {}, {})
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_what_a_crash_left_is_not_in_the_way(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {}, {"take": 1})
    for end in (os.getpid(), "old"):
        (tmp_path / f"step-000001.tmp-{end}").mkdir()
        (tmp_path / f"step-000001.tmp-{end}" / "file").touch()
    save(tmp_path, 1, {}, {"take": 2})
    assert load(path)[1] == {"take": 2}
    assert names(tmp_path) == ["step-000001"]


def test_a_failing_disk_is_told_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 1, {}, {})

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be written.*No space left"):
        save(tmp_path, 2, {}, {})
    assert latest(tmp_path) == before


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, {"w": torch.ones(8)}, {"a": 1})
    data = bytearray((path / name).read_bytes())
    data[-2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is damaged .it is gone.*begins this stage"):
        load(path)


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", "[" * 100_000, "\0" * 40])
def test_a_broken_manifest_is_told_and_never_passed_over(
    tmp_path: Path, manifest: str | None
) -> None:
    save(tmp_path, 1, {}, {})
    for step, then in ((2, "goes on from step-000001"), (1, "begins this stage anew")):
        broken = save(tmp_path, step, {}, {})
        (broken / "manifest.json").unlink()
        if manifest is not None:
            (broken / "manifest.json").write_text(manifest)
        for use in (latest, lambda _, path=broken: load(path)):
            with pytest.raises(CheckpointError) as caught:
                use(tmp_path)
            said = str(caught.value)
            assert f"{broken}: manifest.json is " in said and said.endswith(f"the run then {then}.")
        assert newest_step(tmp_path) == step
        shutil.rmtree(broken)
    assert latest(tmp_path) is None and newest_step(tmp_path) == -1


def test_a_file_in_a_folders_place_is_told(tmp_path: Path) -> None:
    save(tmp_path / "all", 1, {}, {})
    (tmp_path / "all" / "step-000002").write_text("")
    with pytest.raises(CheckpointError, match=r"step-000002: manifest\.json is gone \(Not a dir"):
        latest(tmp_path / "all")
    with pytest.raises(CheckpointError, match="step-000002 is a file; move it away"):
        latest(tmp_path / "all" / "step-000002")


def test_latest_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "step-000003.tmp-77").mkdir()
    for name in ("step-old", "step-000012.tmp", "step-000012.bak", "step-", "step-\u0663"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


keys = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.none(), st.floats())
tensors_ = st.builds(
    lambda dtype, n, shift: (torch.arange(n) + shift).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.integers(0, 3),
    st.integers(-5, 5),
)
states = st.recursive(
    st.one_of(keys, tensors_),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


@given(state=states)
@settings(max_examples=60, deadline=None)
def test_flatten_gives_back_what_it_took(
    state: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors, skeleton = flatten(state)
    path = save(tmp_path_factory.mktemp("flat"), 0, tensors, {"state": skeleton})
    back, values = load(path)
    assert same(unflatten(back, values["state"]), state)


def test_flatten_names_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"the set at `a\.1\.b`"):
        flatten({"a": [0, {"b": {1}}]})


def train(model: nn.Module, optimizer: Any, schedule: Any, draws: torch.Generator) -> None:
    model(torch.randn(4, 3, generator=draws)).square().sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def test_a_resumed_training_is_the_one_that_went_on(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Any, Any, torch.Generator]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups: list[dict[str, Any]] = [
            {"params": [model.weight]},
            {"params": [model.bias], "lr": 0.05},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.1, amsgrad=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        return model, optimizer, schedule, torch.Generator().manual_seed(1)

    run = build()
    train(*run)
    train(*run)
    state = [thing.state_dict() for thing in run[:3]] + [run[3].get_state()]
    tensors, skeleton = flatten(state)
    path = save(tmp_path, 2, tensors, {"all": skeleton})
    resumed = build()
    loaded, values = load(path)
    *dicts, draws = unflatten(loaded, values["all"])
    for thing, saved in zip(resumed[:3], dicts, strict=True):
        thing.load_state_dict(saved)
    resumed[3].set_state(draws)
    train(*run)
    train(*resumed)
    assert same([t.state_dict() for t in run[:3]], [t.state_dict() for t in resumed[:3]])


def test_a_checkpoint_moved_behind_a_link_is_found_and_kept(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "disk"
    save(folder, 1, {"a": torch.ones(2)}, {})
    (folder / "step-000001").rename(elsewhere)
    (folder / "step-000001").symlink_to(elsewhere)
    assert latest(folder) == folder / "step-000001"
    save(folder, 2, {"a": torch.ones(2)}, {}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    assert load(elsewhere)[0]["a"].sum() == 2, "the moved files are the user's"


def test_the_whole_folder_may_stand_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    save(tmp_path / "checkpoints", 1, {"a": torch.ones(2)}, {})
    save(tmp_path / "checkpoints", 2, {"a": torch.ones(2)}, {}, keep=1)
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-000002"


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-000001"])
def test_a_link_that_leads_nowhere_is_no_new_beginning(name: str, tmp_path: Path) -> None:
    link = tmp_path / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=rf"{link.name} is a link to .*unmounted"):
        latest(tmp_path / "checkpoints")


def test_what_may_not_be_read_is_no_new_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, {"a": torch.ones(2)}, {})

    def refuse(self: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        CheckpointError, match=rf"{path.name}/manifest.json cannot be read \(Permission"
    ):
        latest(tmp_path)
