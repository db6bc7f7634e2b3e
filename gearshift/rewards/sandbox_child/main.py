"""The start of a process in the sandbox, in one of three roles: `run` runs the program; `serve`
runs it and answers for its names; `check` runs the tests, in a sandbox of its own.
"""

from __future__ import annotations

import builtins
import io
import os
import resource
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any, BinaryIO

from gearshift.rewards.sandbox_child import PROGRAM, TESTS


def main() -> None:
    """Read the role and the limits from the command line, and carry out the role."""
    sys.path.remove("/box")
    role, *numbers = sys.argv[1:6]
    _limit(*map(int, numbers))
    entry_point = "".join(sys.argv[6:])
    sys.argv = [PROGRAM]
    # Outside a sandbox, Python defines `exit` and `quit`, and a program can use the whole recursion
    # limit; here some frames are below it.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    sys.setrecursionlimit(sys.getrecursionlimit() + 20)
    if role == "check":
        from gearshift.rewards.sandbox_child.verdict import check

        gets, sends = _take_pipes()
        sys.stdout = io.StringIO()
        with open(TESTS, encoding="utf-8-sig") as file:
            check(file.read(), entry_point, gets, sends)
    module = ModuleType("__main__" if role == "run" else "program")
    module.__file__ = PROGRAM
    sys.modules[module.__name__] = module
    with open(PROGRAM, "rb") as file:
        text = file.read()
    code = compile(text, PROGRAM, "exec", dont_inherit=True)
    if b"threading" in text:
        _run_threads_in_turn()
    if role == "run":
        exec(code, module.__dict__)
    else:
        from gearshift.rewards.sandbox_child.program import serve

        gets, sends = _take_pipes()
        exec(code, module.__dict__)
        serve(module, gets, sends)


def _limit(seconds: int, memory: int, output: int, files: int) -> None:
    """Set soft and hard limits to the same value; without capabilities nothing can raise them."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CPU, seconds),
    ):
        resource.setrlimit(what, (most, most))
    # Deep recursion needs more than the usual 8 MiB; the limit of memory bounds it.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))


def _run_threads_in_turn() -> None:
    """Run each thread at its start, in the main thread: a sandbox forbids threads, and many
    programs start one only to get a deeper stack.
    """
    import threading

    def start(self: threading.Thread) -> None:
        with suppress(SystemExit):
            self.run()

    thread: Any = threading.Thread
    thread.start, thread.join = start, lambda self, timeout=None: None
    thread.is_alive = lambda self: False


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take standard input and output for messages; what is printed goes elsewhere from now on."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 0)
    os.dup2(2, 1)
    sys.stdin = io.StringIO()
    return pipes
