"""The check of a GPU runs on a CPU, and reports steps that fail, die, hang or do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check.__main__ import STEPS, main
from benchmarks.gpu_check.harness import Check, Part, Step, in_child, load
from benchmarks.gpu_check.probe import Line, Probe

ROOT = Path(__file__).parent.parent.parent


def test_every_step_runs_in_tiny_sizes(tmp_path: Path) -> None:
    order = [sys.executable, "-m", "benchmarks.gpu_check", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(order, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    told = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert told["steps"] == dict.fromkeys(STEPS, "done")
    assert told["header"]["parent_used_cuda"] is False
    assert {line["step"] for line in told["lines"]} == set(STEPS)
    for line in told["lines"]:
        assert line.keys() >= {"step", "case", "ok", "want", "got", "unit", "seconds", "peak_gb"}
        assert line["ok"] is not False


def run(folder: Path, *steps: Step, seconds: float = 60.0) -> Check:
    check = Check(folder, torch.device("cpu"), seconds)
    check.run(steps)
    told = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    assert told["steps"] == check.states and len(told["lines"]) == len(check.lines)
    return check


def right(probe: Probe) -> None:
    probe.at_most("a number", 1.0, 2.0, "s")


def wrong(probe: Probe) -> None:
    probe.at_most("a number", float("nan"), 2.0)


def raises(probe: Probe) -> None:
    right(probe)
    raise RuntimeError("the device\nfell over")


def dies(probe: Probe) -> None:
    right(probe)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(probe: Probe) -> None:
    """As a wait for the device does, it does not hear of the alarm."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    right(probe)
    time.sleep(60)


def test_what_runs_well_is_no_failure(tmp_path: Path) -> None:
    check = run(tmp_path, Step("good", (Part(right, 5),)))
    assert not check.failed
    assert [line["got"] for line in check.lines] == [1.0]


@pytest.mark.parametrize(
    ("part", "state", "words"),
    [
        (wrong, "done", ""),
        (raises, "died", "RuntimeError: the device fell over"),
        (dies, "died", "SIGSEGV"),
        (hangs, "died", "(SIGKILL)"),
    ],
)
def test_what_goes_wrong_is_reported(
    tmp_path: Path, part: Callable[[Probe], None], state: str, words: str
) -> None:
    """What it reported before is kept, and the steps after it run."""
    steps = Step("bad", (Part(part, 1),)), Step("good", (Part(right, 5),))
    check = run(tmp_path, *steps, seconds=7.0)
    assert check.failed
    assert check.states == {"bad": state, "good": "done"}
    bad = [line for line in check.lines if line["step"] == "bad"]
    assert any(line["ok"] is False and words in str(line.get("error", "")) for line in bad)
    assert part is wrong or bad[0]["ok"] is True
    assert check.lines[-1] == {**check.lines[-1], "step": "good", "ok": True}


def test_a_step_that_does_not_fit_is_skipped(tmp_path: Path) -> None:
    check = run(tmp_path, Step("long", (Part(right, 1000),)), Step("good", (Part(right, 5),)))
    assert check.states == {"long": "skipped", "good": "done"} and check.failed


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    def lacks(probe: Probe) -> None:
        import no_such_package  # noqa: F401

    check = run(tmp_path, Step("lacks", (Part(lacks, 5),)))
    assert any("the package no_such_package is missing" in x["error"] for x in check.lines)


def test_the_alarm_ends_a_child_that_waits(tmp_path: Path) -> None:
    received: list[Line] = []

    def waits(probe: Probe) -> None:
        time.sleep(60)

    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        why = in_child("x", Part(waits, 1), 0.3, torch.device("cpu"), log, received.append)
    assert "SIGALRM" in why and not received


def test_the_parent_leaves_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child could not use the card after that."""
    parent = os.getpid()

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(torch.cuda, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            assert os.getpid() != parent, f"the parent calls torch.cuda.{name}"
            return real(*args, **kwargs)

        return call

    for name in ("_lazy_init", "is_available", "device_count", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, watched(name))
    for name in ("TRITON_INTERPRET", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    steps = [load(name, file) for name, file in STEPS.items()]
    assert all(step.parts and not step.error for step in steps)
    assert sum(part.seconds for step in steps for part in step.parts) <= 520
    assert main(["--cpu", "--only", "env", "--out", str(tmp_path)]) == 0
