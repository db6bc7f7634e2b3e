"""How the program exits after an error: one line on standard error, an exit code, and a file with
the traceback of an unexpected error.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gearshift.errors import GearshiftError, InterruptedRunError
from gearshift.runtime.allocator import short_of_memory
from gearshift.runtime.interrupt import SIGNALS, Stopped
from gearshift.runtime.terminal import echo, one_line, silence
from gearshift.runtime.urls import redact_urls

UNEXPECTED_ERROR = 70
"""The exit code of an unexpected error (EX_SOFTWARE of sysexits.h)."""
_ADVICE = {
    errno.EMFILE: "; raise the limit (ulimit -n)",
    errno.ENFILE: "; end other programs",
    errno.EAGAIN: "; end other programs, or raise the limit of processes (ulimit -u)",
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some space",
    errno.EFBIG: "; raise the limit of a file's size (ulimit -f)",
}
_KEPT = "gearshift: line and exit code"
"""Where an error keeps them."""
_PATIENCE = 1.0
"""Seconds that threads and processes have to end after a signal."""
_said = threading.Event()
"""Set once the program has printed why it exits."""


def exit_on_signals() -> None:
    """Make a signal end the program with one line; a second signal ends it at once. This is for a
    program that has nothing to save, and also holds while a library is being loaded that ignores
    exceptions. While a run's `Interrupt` is open, it handles the signals instead.
    """
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # SIGHUP is ignored under nohup
            signal.signal(number, partial(_asked, os.getpid()))


def _asked(process: int, number: int, frame: FrameType | None) -> None:
    remove_signal_handlers()
    if os.getpid() != process:  # a forked child ends as if there were no handler
        os.kill(os.getpid(), number)
        return
    _said.clear()
    threading.Thread(target=_leave, args=(128 + number,), daemon=True).start()
    raise Stopped(number)


def remove_signal_handlers(instead: signal.Handlers = signal.SIG_DFL) -> None:
    """Let no signal raise an exception any more; for a program that is about to exit."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, instead)


def exit_with_error(error: BaseException, folder: Path | None, alone: bool) -> NoReturn:
    """Print the error and exit. `folder` is the run's folder, where the traceback of an unexpected
    error is kept. `alone` says that the process belongs to this program alone.
    """
    if alone:
        # it is exiting already, and another exception would print a traceback
        remove_signal_handlers(signal.SIG_IGN)
    if os.environ.get("GEARSHIFT_DEBUG"):
        traceback.print_exception(error)
    if alone and isinstance(error, OSError) and error.filename is None:
        silence(sys.stdout)  # standard output may be the cause
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    line, code = describe_error(error, folder)
    with suppress(OSError, ValueError):
        if line := _of_rank(line, error, code):
            echo(f"gearshift: {line}", file=sys.stderr)
            _tell_torchrun(line)
    _said.set()
    if alone and short_of_memory(error):
        _leave(code, patience=0)  # libraries need memory for what they do at exit
    if alone and code > 128:
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
    elif alone:  # a thread that hangs would keep the process alive
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


def _of_rank(line: str, error: BaseException, code: int) -> str:
    """The line as this rank of a run prints it, or "" where the main rank prints it."""
    known = getattr(error, "known_to_all", False) or code > 128
    rank = rank_of_process()
    return line if rank == 0 else "" if known else f"rank {rank}: {line}"


def _tell_torchrun(line: str) -> None:
    """Torchrun reports the line of this file as the cause of a process's end."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        record = {"message": line, "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(record), encoding="utf-8")


def in_several_processes() -> bool:
    """Whether torchrun, or a program like it, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_of_process() -> int:
    """The number that torchrun has given to this process; 0 if it runs alone."""
    return int(os.environ.get("RANK", "0")) if in_several_processes() else 0


def describe_error(error: BaseException, folder: Path | None) -> tuple[str, int]:
    """The line to print and the exit code. The traceback of an unexpected error is kept, once."""
    # Not as an attribute: an error may have one of that name, or be frozen.
    if _KEPT not in error.__dict__:
        error.__dict__[_KEPT] = _described(error, folder)
    found: tuple[str, int] = error.__dict__[_KEPT]
    return found


def _described(error: BaseException, folder: Path | None) -> tuple[str, int]:
    if isinstance(error, InterruptedRunError):
        return one_line(str(error), 2000), 128 + error.signal
    if isinstance(error, GearshiftError):
        return one_line(redact_urls(str(error)), 2000), getattr(error, "exit_code", 1)
    if isinstance(error, KeyboardInterrupt):
        return "stopped.", 128 + getattr(error, "signal", signal.SIGINT)
    if reason := short_of_memory(error):
        return (
            f"There is not enough memory ({reason}); end other programs, lower "
            "micro_batch_tokens or batch sizes, or take a smaller model.",
            1,
        )
    if isinstance(error, OSError):
        what = f"{one_line(str(error.filename))}: " if error.filename else ""
        reason = error.strerror or one_line(str(error)) or type(error).__name__
        return f"{what}{reason}{_ADVICE.get(error.errno or 0, '')}.", 1
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"No thread can be started{_ADVICE[errno.EAGAIN]}.", 1
    where = _kept(error, folder)
    kind = one_line(f"{type(error).__name__}: {redact_urls(str(error))}")
    return f"Unexpected error: {kind} ({where}).", UNEXPECTED_ERROR


def _kept(error: BaseException, folder: Path | None) -> str:
    """Write the traceback to the run's folder, or to the folder for temporary files, and say where
    it is.
    """
    text = redact_urls("".join(traceback.format_exception(error)))
    places = [folder] if folder and folder.is_dir() else []
    with suppress(OSError):  # no folder for temporary files can be written to
        places.append(Path(tempfile.gettempdir()))
    for place in places:
        path = place / f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        with suppress(OSError):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"the traceback is in {path}"
    return "GEARSHIFT_DEBUG=1 prints the traceback"


def _leave(code: int, patience: float = _PATIENCE) -> None:
    """Exit even if something does not end by itself, for example a reward function that hangs."""
    time.sleep(patience)
    for child in multiprocessing.active_children():
        child.kill()
    if not _said.is_set():
        with suppress(AttributeError, OSError, ValueError):  # `print` may be running just now
            os.write(sys.__stderr__.fileno(), b"gearshift: stopped.\n")  # type: ignore[union-attr]
    os._exit(code)
