"""Metrics survive a crash and a resume; trackers get what they are asked to get."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.errors import ConfigError, StorageError
from gearshift.runtime.metrics import (
    Extent,
    MetricsLog,
    PhaseTimer,
    TrackerName,
    Trackers,
    read_metrics,
)


def test_one_line_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(0, {"reward": 0.1, "kl": 1e-7})
    log.append(1, {"reward": 0.25, "text": "two\nlines ä\u2028", "n": 3})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and lines[2] == ""
    assert read_metrics(log.path) == [
        {"step": 0, "reward": 0.1, "kl": 1e-7},
        {"step": 1, "reward": 0.25, "text": "two\nlines ä\u2028", "n": 3},
    ]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    inf, nan = float("inf"), float("nan")
    log.append(0, {"a": nan, "b": inf, "c": -inf, "deep": [{"x": (1.0, nan)}]})
    strict = json.loads(log.path.read_text(), parse_constant=pytest.fail)
    assert strict == {"step": 0, "a": None, "b": None, "c": None, "deep": [{"x": [1.0, None]}]}


def resumed(log: MetricsLog, extent: Extent | None) -> MetricsLog:
    """The log as the next process takes it up."""
    again = MetricsLog(log.path)
    again.begin(extent)
    return again


def test_a_resumed_run_drops_later_lines_and_the_torn_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.begin(None)
    for step in range(6):
        log.append(step, {"loss": 1 / 3 + step, "text": "\ud800 ä"})
    four = log.synced(4)
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(log.path)] == list(range(6))
    assert log.synced(4) == four and log.synced(6) == log.synced(7)
    for _ in range(2):
        log = resumed(log, four)
        assert log.synced(4) == four
        log.append(4, {"loss": 9.0})
    records = read_metrics(log.path)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[3]["loss"] == 1 / 3 + 3 and records[4]["loss"] == 9.0
    assert records[0]["text"] == "\ud800 ä"
    assert resumed(log, log.synced(5)).synced(5) == log.synced(5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_a_checkpoint_begins_its_records_anew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    nothing = log.synced(0)
    for extent in (None, nothing, None):
        log = resumed(log, extent)
        log.append(0, {})
    assert len(read_metrics(log.path)) == 1


@pytest.mark.parametrize("change", ["a line less", "a bit", "two lines the other way", "gone"])
def test_records_that_changed_since_the_checkpoint_are_told(tmp_path: Path, change: str) -> None:
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    for step in range(3):
        log.append(step, {"said": str(step)})
    extent = log.synced(3)
    log.append(3, {"said": "later"})
    before = log.path.read_bytes()
    lines = before.splitlines(keepends=True)
    changed = {
        "a line less": b"".join(lines[1:]),
        "a bit": before.replace(b'"1"', b'"3"'),
        "two lines the other way": b"".join([lines[1], lines[0], *lines[2:]]),
        "gone": b"",
    }[change]
    log.path.unlink() if change == "gone" else log.path.write_bytes(changed)
    with pytest.raises(StorageError) as caught:
        resumed(log, extent)
    assert f"{log.path} is not as the run wrote it (it " in str(caught.value)
    assert f"or delete {tmp_path} to do this stage again." in str(caught.value)
    assert not log.path.exists() or log.path.read_bytes() == changed, "nothing is cut off it"
    log.path.write_bytes(before)
    assert len(read_metrics(resumed(log, extent).path)) == 3


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_prefix_is_what_it_was_or_is_told(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("log") / "rollouts.jsonl")
    for step in range(4):
        log.append(step, {"said": data.draw(st.text(max_size=5))})
    kept = data.draw(st.integers(0, 4))
    extent, before = log.synced(kept), log.path.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    how = data.draw(st.sampled_from(["cut", "flipped"]))
    flipped = bytes([before[at] ^ (1 << data.draw(st.integers(0, 7)))])
    log.path.write_bytes(before[:at] + (b"" if how == "cut" else flipped + before[at + 1 :]))
    if at >= extent["bytes"]:
        assert resumed(log, extent).path.read_bytes() == before[: extent["bytes"]]
    else:
        with pytest.raises(StorageError, match=r"rollouts\.jsonl is not as the run wrote it"):
            resumed(log, extent)


def test_a_line_that_does_not_fit_on_the_disk_is_not_there(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(0, {"a": 1})
    before, limits = log.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(
            StorageError, match=r"metrics\.jsonl cannot be written \(File too large"
        ):
            log.append(1, {"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before
    log.append(1, {"a": 2})
    assert resumed(log, log.synced(2)).synced(2) == log.synced(2)


@pytest.mark.parametrize("line", ["nonsense", "[]", "3", '{"step": "0"}', "\0\0", "[" * 99_999])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl cannot be read \(line 2 is no record\)"
    ):
        read_metrics(path)


class Calls:
    """A library whose every function notes its call and returns the library."""

    run_id = "abc"

    def __init__(self) -> None:
        self.info = self
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Calls:
            self.made.append((name, args, kwargs))
            return self

        return call


CASES: list[tuple[TrackerName, str, list[str], str]] = [
    ("tensorboard", "torch.utils.tensorboard", ["SummaryWriter", "add_text"], "close"),
    ("trackio", "trackio", ["init"], "finish"),
    ("wandb", "wandb", ["init"], "finish"),
    ("mlflow", "mlflow", ["set_experiment", "start_run", "log_dict"], "end_run"),
]
LOGGED = {
    "tensorboard": [("add_scalar", ("reward", 0.5, 7), {}), ("add_scalar", ("kl", 0.1, 7), {})],
    "trackio": [("log", ({"reward": 0.5, "kl": 0.1},), {"step": 7})],
    "wandb": [("log", ({"reward": 0.5, "kl": 0.1},), {"step": 7})],
    "mlflow": [("log_metrics", ({"reward": 0.5, "kl": 0.1},), {"step": 7})],
}


@pytest.mark.parametrize(("name", "module", "opened", "closed"), CASES)
def test_each_tracker_gets_the_figures(
    name: TrackerName,
    module: str,
    opened: list[str],
    closed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, module, calls)
    trackers = Trackers([name], tmp_path, "run/rl", {"lr": 1e-5})
    trackers.open(0)
    assert [call[0] for call in calls.made] == opened
    calls.made.clear()
    trackers.log(7, {"reward": 0.5, "kl": 0.1})
    assert calls.made == LOGGED[name]
    calls.made.clear()
    trackers.close()
    assert [call[0] for call in calls.made] == [closed]


@pytest.mark.parametrize(("name", "module", "opened", "closed"), CASES)
def test_a_missing_library_names_its_install(
    name: TrackerName,
    module: str,
    opened: list[str],
    closed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'gearshift\[{name}\]'"):
        Trackers([name], tmp_path, "run", {})


@pytest.mark.parametrize(("name", "module", "opened", "closed"), CASES)
def test_a_resumed_run_goes_on_in_its_trackers_run(
    name: TrackerName,
    module: str,
    opened: list[str],
    closed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, module, calls)
    seen = []
    for step in (0, 50):
        calls.made.clear()
        Trackers([name], tmp_path, "run/rl", {"lr": 1e-5}).open(step)
        seen.append({call[0]: (call[1], call[2]) for call in calls.made})
    first, again = seen
    config = {"lr": 1e-5}
    if name == "tensorboard":
        assert first["SummaryWriter"][1] == {"purge_step": None}
        assert again["SummaryWriter"][1] == {"purge_step": 50}
        assert '"lr": 1e-05' in first["add_text"][0][1]
    elif name == "mlflow":
        assert first["start_run"][1] == {"run_name": "run/rl"}
        assert again["start_run"][1] == {"run_id": "abc"}
        assert first["log_dict"][0] == (config, "config.json")
    else:
        assert first["init"] == again["init"], "the same run"
        assert first["init"][1]["resume"] == "allow" and first["init"][1]["config"] == config
        key = {"trackio": "name", "wandb": "id"}[name]
        Trackers([name], tmp_path / "..", "run/rl", {}).open(0)
        assert calls.made[-1][2][key] != first["init"][1][key], "another folder, another run"


def test_the_files_of_a_resumed_tensorboard_have_each_step_once(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((0, 5), (3, 7)):
        trackers = Trackers(["tensorboard"], tmp_path, "run/rl", {"lr": 1e-5})
        trackers.open(first)
        for step in range(first, last):
            trackers.log(step, {"loss": float(first)})
        trackers.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in read.Scalars("loss")]
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3), (6, 3)]


def test_a_tracker_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no key\nlog in first")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(ConfigError, match=r"tracker wandb does not start \(no key\)"):
        Trackers(["wandb"], tmp_path, "run", {}).open(0)


def test_no_tracker_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, module, _, _ in CASES:
        monkeypatch.setitem(sys.modules, module, None)
    trackers = Trackers([], tmp_path, "run", {})
    trackers.open(0)
    trackers.log(0, {"reward": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    timer = PhaseTimer()
    for seconds in (1.0, 2.5):
        with timer("generate"):
            clock.now += seconds
        clock.now += 100
    with pytest.raises(ZeroDivisionError), timer("update"):
        clock.now += 4
        _ = 1 / 0
    assert timer.pop() == {"seconds/generate": 3.5, "seconds/update": 4.0}
    assert timer.pop() == {}


def test_phases_have_peaks_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak is that of its phase alone; of a phase that comes twice, the higher one."""
    gpu = SimpleNamespace(peak=0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(gpu, "peak", 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    timer = PhaseTimer()
    for phase, gibibytes in (("generate", 3), ("train", 2), ("train", 1)):
        with timer(phase):
            gpu.peak = max(gpu.peak, gibibytes * 2**30)
    peaks = {name: x for name, x in timer.pop().items() if name.startswith("memory/")}
    assert peaks == {"memory/peak_gib/generate": 3.0, "memory/peak_gib/train": 2.0}


@pytest.mark.parametrize(("name", "module", "opened", "closed"), CASES)
def test_a_tracker_that_fails_on_the_way_is_told_once_and_left_out(
    name: TrackerName,
    module: str,
    opened: list[str],
    closed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, module, calls)
    trackers = Trackers([name], tmp_path, "run/rl", {})
    trackers.open(0)
    trackers.log(0, {"reward": 0.5})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device\nat line 3")

    logs = LOGGED[name][0][0]
    setattr(calls, logs, fail)
    setattr(calls, closed, fail)
    for step in (1, 2, 3):
        trackers.log(step, {"reward": 0.5})
    said = capsys.readouterr().err
    assert f"the tracker {name} failed at step 1 (No space left on device)" in said
    assert said.count("\n") == 1
    trackers.close()
    assert f"{name} was not sent 3 steps" in capsys.readouterr().err
    assert trackers.lost == {name: 3}
    trackers.open(4)
    trackers.close()
    assert "did not close (No space left on device)" in capsys.readouterr().err
