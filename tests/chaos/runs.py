"""The run that is hurt: its files, its process, and what it ended with."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gearshift.pipeline.run
from gearshift.cli.main import main as gearshift
from gearshift.runtime.metrics import MEASURED

HERE = Path(__file__).parent
RUN = ["gearshift", "run", "recipe.yaml", "run.dir=run"]
PATIENCE = 300.0
"""Seconds after which a command counts as hung."""


class BrokenError(Exception):
    """A promise that was not kept."""


def lay_out(folder: Path) -> Path:
    """A folder with the recipe, its rewards and its rows; the same rows in each."""
    folder.mkdir(parents=True)
    for name in ("recipe.yaml", "reward.py"):
        shutil.copy(HERE / name, folder)
    rng = random.Random(0)
    words = ["lamp", "door", "fan", "heat", "blind", "song", "clock", "stove"]

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 4)))

    files: dict[str, list[dict[str, Any]]] = {
        "rows": [{"prompt": f"{i} {text()}", "completion": text()} for i in range(40)],
        "labelled": [{"prompt": text(), "completion": text()} for _ in range(12)],
        "pairs": [
            {"prompt": f"{i} {text()}", "chosen": f"{text()} yes", "rejected": text()}
            for i in range(20)
        ],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@dataclass
class Command:
    """`gearshift run` in a folder, in a process of its own."""

    folder: Path
    pid: int
    output: Path
    code: int | None = field(default=None)
    """Its exit code; minus the signal's number where one ended it."""
    pipe: subprocess.Popen[bytes] | None = None
    """What writes the output, where the command itself may not write so much into a file."""
    ranks: int = 1

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code. Raises `BrokenError` if it hangs, or leaves processes behind."""
        until = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > until:
                self.kill()
                raise BrokenError(f"it hung for {seconds:.0f} s: {self.said()[-300:]}")
            time.sleep(0.01)
        until = time.monotonic() + 20
        while left := _members(self.pid):
            if time.monotonic() > until:
                raise BrokenError(f"processes outlived the run: {left}")
            time.sleep(0.05)
        assert self.code is not None
        return self.code

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        ranks = self.processes() if self.ranks > 1 else []
        self.signal(signal.SIGKILL)
        for process in ranks:  # they would outlive torchrun by a moment
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while self.running():
            time.sleep(0.01)

    def said(self) -> str:
        if self.pipe and self.code is not None:
            self.pipe.wait()
        if self.ranks == 1:
            return self.output.read_text(encoding="utf-8", errors="replace")
        # Each rank has files of its own. torchrun's words, with tracebacks, are in another one.
        files = sorted(self.output.with_suffix(".ranks").rglob("*.log"))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files)

    def processes(self) -> list[int]:
        """The ranks' processes, in their order, as far as they have begun."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError, KeyError):
                pairs = (x.partition("=") for x in path.read_text(errors="replace").split("\0"))
                words = {name: value for name, _, value in pairs}
                status = path.with_name("stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == self.pid:  # its parent
                    found[int(words["RANK"])] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]

    def message(self) -> str:
        """The one line that it ended with. Raises `BrokenError` for none, or for a traceback."""
        said = self.said()
        lines = [line for line in said.splitlines() if line.startswith("gearshift: ")]
        if "Traceback" in said or len(lines) != 1:
            raise BrokenError(f"exit {self.code} with {len(lines)} lines: {said[-1500:]}")
        return lines[0]

    def must_have_ended(self) -> None:
        if self.code != 0:
            raise BrokenError(f"exit {self.code}: {self.said()[-1500:]}")


def start_ranks(folder: Path, ranks: int, restarts: int) -> Command:
    """The command of a user under torchrun, which starts ranks that die again so often."""
    output = _output(folder)
    words = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    words += ["--redirects=3", f"--log-dir={output.with_suffix('.ranks')}"]
    with output.open("wb") as file:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, "-m", *RUN],
            cwd=folder, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        )  # fmt: skip
    return Command(folder, agent.pid, output, ranks=ranks)


def _output(folder: Path) -> Path:
    output = folder / f"output-{len(list(folder.glob('output-*[0-9]')))}"
    output.touch()
    return output


def start(folder: Path, largest_file: int | None = None) -> Command:
    """The command of a user, in a fork; `largest_file` bounds the files that it may write."""
    output = _output(folder)
    pipe = None
    if largest_file is not None:
        with output.open("wb") as file:
            pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        if pipe and pipe.stdin:
            pipe.stdin.close()
        return Command(folder, pid, output, pipe=pipe)
    try:
        os.setsid()
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pipe and pipe.stdin:
            handle = pipe.stdin.fileno()
        else:
            handle = os.open(output, os.O_WRONLY | os.O_APPEND)
        for old in (1, 2):
            os.dup2(handle, old)
        # The parent's streams believe that what they write to can be sought in; a pipe cannot.
        sys.stdout, sys.stderr = (os.fdopen(old, "w", closefd=False) for old in (1, 2))
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        gearshift(RUN[1:])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    # End with the exit handlers run, as an interpreter of its own would.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _members(session: int) -> list[str]:
    """Processes of a session that still live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
            rest = text.rpartition(")")[2].split()
            if int(rest[3]) == session and rest[0] not in "ZX":
                command = path.with_name("cmdline").read_bytes().replace(b"\0", b" ")
                found.append(f"{path.parent.name} {command.decode(errors='replace')[:80]}")
        except OSError:
            continue
    return found


def fingerprint(folder: Path) -> dict[str, str]:
    """All that a run ends with but times, as digests and texts by file."""
    run = folder / "run"
    found: dict[str, str] = {}
    for path in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            digest = hashlib.blake2b(path.read_bytes()).hexdigest()
            found[str(path.relative_to(run))] = digest
    for path in sorted(run.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]
        found[str(path.relative_to(run))] = json.dumps(kept)
    for path in sorted(run.glob("*/rollouts.jsonl")):
        found[str(path.relative_to(run))] = path.read_text()
    for path in sorted((run / "data").glob("*.jsonl")):
        found[str(path.relative_to(run))] = path.read_text()
    for path in sorted((run / "validation").glob("*.json")):
        record = json.loads(path.read_text())
        record.pop("seconds")
        record.pop("digest", None)  # of the seconds too
        found[str(path.relative_to(run))] = json.dumps(record)
    return found
