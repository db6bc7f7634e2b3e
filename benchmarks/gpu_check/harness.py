"""Runs the parts of steps in forked children, each within its time, and keeps what they report.

This process must not touch CUDA: a child that is forked afterwards could not use the card.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.common import versions
from benchmarks.gpu_check.probe import Line, Probe, described

_GRACE = 2.0
"""Seconds after its alarm at which a child is killed."""
_STUCK = 10.0
"""Seconds that a killed child may take to end; a driver can hold it for longer."""
_BLANK: Line = {"want": None, "got": None, "unit": "", "seconds": None, "peak_gb": None}
_TINY = 0.2
"""The share of its budget that a part may need on a CPU, where sizes are tiny."""
_TURN = 0.2
"""Seconds after which a silent child is looked at."""


@dataclass(frozen=True)
class Part:
    """A function of a step. It runs in a child of its own, so that an error of CUDA, which no later
    call of the process survives, costs only this part.
    """

    run: Callable[[Probe], None]
    seconds: float
    """Its budget. What earlier parts leave of theirs is added to it."""
    tiny: bool = True
    """Whether a CPU runs it; in tiny sizes some parts are the same as others."""


@dataclass(frozen=True)
class Step:
    """The parts that are reported under one name."""

    name: str
    parts: tuple[Part, ...]
    error: str = ""
    """Why it cannot run."""


@dataclass
class Check:
    """The run of some steps on one device, and its file, which is rewritten after each step."""

    folder: Path
    device: torch.device
    seconds: float
    """The time for everything."""
    header: dict[str, Any] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    """How each step ended, by the step's name; `done` where nothing went wrong."""
    lines: list[Line] = field(default_factory=list)

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps in order. One that does not fit into the time that is left is skipped."""
        end = time.monotonic() + self.seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.header = {"device": str(self.device), **card(), "versions": versions(*PACKAGES)}
        if self.device.type != "cuda":
            steps = [replace(s, parts=tuple(p for p in s.parts if p.tiny)) for s in steps]
        budgets = [self._budget(*step.parts) for step in steps]
        with (self.folder / "gpu_check.log").open("w", encoding="utf-8") as log:
            for i, step in enumerate(steps):
                self._step(step, end - sum(budgets[i + 1 :]), end, log)
                self.header["clocks_after"] = clocks()
                self.header["parent_used_cuda"] = torch.cuda.is_initialized()
                self._write()

    @property
    def failed(self) -> bool:
        """Whether an assertion failed, or a step did not come to its end."""
        wrong = any(line["ok"] is False for line in self.lines)
        return wrong or any(state != "done" for state in self.states.values())

    def _step(self, step: Step, own_end: float, end: float, log: IO[str]) -> None:
        """`own_end`: when the step must end so that all later ones fit."""
        self.states[step.name] = "done"
        if step.error:
            self._ended(step.name, "died", step.error)
        for i, part in enumerate(step.parts):
            budget, left = self._budget(part), end - time.monotonic()
            if left < budget:
                why = f"it may take {budget:g} s, and {left:.0f} s are left"
                self._ended(step.name, "skipped", why)
                continue
            later = self._budget(*step.parts[i + 1 :])
            seconds = max(budget, own_end - later - time.monotonic() - 2 * _GRACE)
            why = in_child(step.name, part, seconds, self.device, log, self._received)
            if why:
                self._ended(step.name, "died", why)

    def _budget(self, *parts: Part) -> float:
        share = 1.0 if self.device.type == "cuda" else _TINY
        return share * sum(part.seconds for part in parts)

    def _received(self, line: Line) -> None:
        line = {**_BLANK, **line}
        self.lines.append(line)
        print(shown(line), flush=True)

    def _ended(self, name: str, state: str, why: str) -> None:
        self.states[name] = state
        ok = None if state == "skipped" else False
        self._received({"step": name, "case": f"({state})", "ok": ok, "error": why})

    def _write(self) -> None:
        told = {"header": self.header, "steps": self.states, "lines": self.lines}
        path = self.folder / "gpu_check.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
        new.replace(path)


def in_child(
    name: str,
    part: Part,
    seconds: float,
    device: torch.device,
    log: IO[str],
    receive: Callable[[Line], None],
) -> str:
    """Run a part in a child, and pass its lines on as they come. Returns why it did not come to its
    end; empty if it did. What the child prints goes to the log.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    log.write(f"\n== {name}: {part.run.__name__}\n")
    log.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(name, part, seconds, device, log, write)
    os.close(write)
    try:
        return _followed(pid, read, seconds, receive)
    finally:
        os.close(read)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what it started, too


def _child(
    name: str, part: Part, seconds: float, device: torch.device, log: IO[str], write: int
) -> None:
    """The child's whole life. It ends without Python's and CUDA's clean-up, which can hang after an
    error of the device.
    """
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", 1)
        faulthandler.enable(sys.stderr)

        def send(line: Line) -> None:
            data = json.dumps(line, default=str).encode() + b"\n"
            while data:
                data = data[os.write(write, data) :]

        probe = Probe(name, device, time.monotonic() + seconds, send)
        try:
            if not probe.cuda:
                torch.set_num_threads(1)  # threads that spin cost tiny sizes more than they give
            torch.manual_seed(0)
            gc.freeze()  # what the parent has made is no garbage, and takes long to look through
            part.run(probe)
            probe.sync()
            status = 0
        except BaseException as error:
            traceback.print_exc()
            send({"step": name, "case": part.run.__name__, "ok": False, "error": described(error)})
            status = 2
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _followed(pid: int, read: int, seconds: float, receive: Callable[[Line], None]) -> str:
    """Receive a child's lines until it ends, or kill it at its time; see `in_child`."""
    end, killed, rest = time.monotonic() + seconds + _GRACE, False, b""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        while select.select([read], [], [], 0 if ended else _TURN)[0]:
            data = os.read(read, 1 << 16)
            if not data:
                if not ended:
                    time.sleep(_TURN / 10)
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                receive(json.loads(line))
        if ended:
            return _reason(status, seconds)
        if time.monotonic() > end and not killed:
            killed = True
            os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end + _STUCK:
            return f"it was killed after {seconds:.3g} s, and its process does not end"


def _reason(status: int, seconds: float) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGKILL):
            return f"it was killed after {seconds:.3g} s ({signal.Signals(number).name})"
        return f"it died of {signal.Signals(number).name}; see gpu_check.log"
    code = os.WEXITSTATUS(status)
    return {0: "", 2: "an error ended it; see gpu_check.log"}.get(code, f"it exited with {code}")


PACKAGES = ("triton", "numpy", "pydantic", "peft", "torchao", "deepspeed")
"""Beside those that every benchmark names."""
_QUERY = "name,driver_version,memory.total,power.limit"


def card() -> dict[str, Any]:
    """The card by `nvidia-smi`, for this process must not ask CUDA; empty where there is none."""
    found = _smi(_QUERY)
    if not found:
        return {"card": None}
    values = dict(zip(("card", "driver", "memory", "power_limit"), found, strict=False))
    return {**values, "cuda": torch.version.cuda, "clocks_before": clocks()}


def clocks() -> dict[str, str]:
    """The card's clocks, temperature and power now; empty where there is none."""
    names = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return dict(zip(names.split(","), _smi(names), strict=False))


def _smi(query: str) -> list[str]:
    order = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(order, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [x.strip() for x in done.stdout.strip().split(",")] if done.returncode == 0 else []


def shown(line: Line) -> str:
    """A line of the table."""
    mark = {True: "ok", False: "FAILED", None: "-"}[line["ok"]]
    got = line.get("error") or line.get("why") or f"{_text(line.get('got'))} {line.get('unit', '')}"
    want = f"  (want {line['want']})" if line.get("want") and line["ok"] is not True else ""
    seconds, peak = line.get("seconds"), line.get("peak_gb")
    cost = "" if seconds is None else f"  [{seconds:g} s]"
    cost = cost if peak is None else f"{cost[:-1]}, {peak:g} GiB]"
    return f"{line['step']:9} {mark:7}{line['case']:46} {got.strip()}{want}{cost}"


def _text(got: Any) -> str:
    if isinstance(got, dict):
        return ", ".join(f"{name} {_text(x)}" for name, x in got.items())
    if isinstance(got, list):
        return ", ".join(map(_text, got))
    return f"{got:g}" if isinstance(got, float) else str(got)


def table(check: Check) -> str:
    """What the check found, by step, and how each step ended."""
    header = ", ".join(f"{name} {_text(x)}" for name, x in check.header.items() if x)
    failed = sum(line["ok"] is False for line in check.lines)
    ends = ", ".join(f"{name} {state}" for name, state in check.states.items())
    lines = [header, *map(shown, check.lines), f"steps: {ends}"]
    return "\n".join([*lines, f"{failed} of {len(check.lines)} lines failed"])


def checked(files: Mapping[str, str], folder: Path, seconds: float, cpu: bool) -> int:
    """Run the steps, whose parts are in these files; print the table; returns the exit code."""
    check = Check(folder, torch.device("cpu" if cpu else "cuda"), seconds)
    if not cpu and in_child("card", Part(_touch, 60), 60, check.device, sys.stderr, _say):
        print("CUDA does not work here; --cpu runs the same code in tiny sizes.")
        return 2
    check.run([load(name, file) for name, file in files.items()])
    print(f"\n{table(check)}\n{folder / 'gpu_check.json'}")
    return int(cpu and check.failed)


def load(name: str, file: str) -> Step:
    """The step of this name. A package that it lacks is its own error."""
    try:
        return Step(name, importlib.import_module(f"benchmarks.gpu_check.{file}").PARTS)
    except ImportError as error:
        return Step(name, (), described(error))


def _touch(probe: Probe) -> None:
    torch.zeros(1, device=probe.device)


def _say(line: Line) -> None:
    print(line["error"])
