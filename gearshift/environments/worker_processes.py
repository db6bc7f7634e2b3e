"""Environments in worker processes: if one dies or hangs, only its own episode is lost.

An environment keeps its process from episode to episode. The processes are forked from one process
that has imported this package, so each starts at once and shares that memory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from gearshift.environments.base import TextEnvironment
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import end_with_parent, exit_in_forks

_MOST = 1 << 28
"""How many bytes one answer may have."""
_START = 300.0
"""How many seconds a process has to start and make its environment."""
_LAST = 10
"""How many seconds an environment has to close."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gearshift.environments.worker_processes import fork_for; fork_for(int(sys.argv[2]))"
)


class ProcessError(Exception):
    """An error of another process, as text."""


class EnvironmentProcesses:
    """Makes environments that run in worker processes.

    All of the processes end with this object, and with this process, in whatever way it ends.
    """

    def __init__(self, make: Callable[[], TextEnvironment]) -> None:
        """`make` is called in the worker, so it must be picklable."""
        self._make, self._lock = make, threading.Lock()
        self._forks: subprocess.Popen[bytes] | None = None
        self.close: Callable[[], Any] = lambda: None
        """End the processes; the next environment starts new ones."""

    def __call__(self) -> ProcessEnvironment:
        """An environment whose process starts at its first reset."""
        return ProcessEnvironment(self.connect)

    def connect(self) -> Connection:
        """Connect to a new process; it sends its process id first, and then answers as `_serve`
        says.
        """
        with self._lock:
            if self._forks is None or self._forks.poll() is not None:
                self._start()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._orders, [b"."], [theirs.fileno()])
            return Connection(ours.detach())

    def _start(self) -> None:
        """Start the process that forks the others."""
        given = bytes(ForkingPickler.dumps((self._make, torch.get_num_threads())))
        self.close()
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._forks = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # only the run answers Ctrl-C
            )
        self.close = weakref.finalize(self, _end, self._orders, self._forks)
        self._orders.sendall(len(given).to_bytes(8, "little") + given)


def _end(orders: socket.socket, forks: subprocess.Popen[bytes]) -> None:
    orders.close()
    forks.wait()


class ProcessEnvironment(TextEnvironment):
    """An environment that runs in another process. If the process has died, a reset starts another
    one.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        super().__init__()
        self._connect, self._pid = connect, 0
        self._connection: Connection | None = None

    def ready(self) -> None:
        """Start the process, if none is alive. Raises `ProcessError` if the environment cannot be
        made.

        A caller that measures the environment's time calls this first, because it does not count.
        """
        if self._connection is None or self._connection.poll():  # it has died
            self._connection = self._connect()
            self._pid = self._received(_START)
            self._result(_START)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Raises `ProcessError` if the environment raises or its process dies."""
        self.ready()
        answer: tuple[str, dict[str, Any]] = self._asked("reset", seed=seed, options=options)
        return answer

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ProcessError` if the environment raises or its process dies."""
        answer: tuple[str, float, bool, bool, dict[str, Any]] = self._asked("step", action=action)
        return answer

    def kill(self) -> None:
        """Kill the process at any time; a caller that waits for its answer gets a
        `ProcessError`.
        """
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the environment and end its process."""
        self._connection = None

    def _asked(self, name: str, **given: Any) -> Any:
        if self._connection is None:
            raise ProcessError("it was not reset")
        with suppress(OSError):  # if it has died, the next line reports it
            self._connection.send((name, given))
        return self._result()

    def _result(self, seconds: float | None = None) -> Any:
        worked, answer = self._received(seconds)
        if not worked:
            raise ProcessError(answer)
        return answer

    def _received(self, seconds: float | None) -> Any:
        """The next message of the process, within this many seconds (None: without a limit)."""
        assert self._connection is not None
        try:
            if not self._connection.poll(seconds):
                self.kill()
                raise ProcessError(f"it was not made within {seconds:g} s")
            return ForkingPickler.loads(self._connection.recv_bytes(_MOST))
        except (EOFError, OSError):
            self._connection = None
            raise ProcessError(
                f"its process died, or its answer is longer than {_MOST >> 20} MiB"
            ) from None


def fork_for(orders: int) -> None:
    """Fork a process for each socket that arrives, until the parent is gone. This runs in the
    process that forks the others.
    """
    with socket.socket(fileno=orders) as here, here.makefile("rb", buffering=0) as stream:
        size = int.from_bytes(_read(stream, 8), "little")
        make, threads = ForkingPickler.loads(_read(stream, size))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for them
        while True:
            message, sockets, _, _ = socket.recv_fds(here, 1, 1)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                here.close()
                torch.set_num_threads(threads)
                np.random.seed()  # otherwise all processes would draw the same numbers
                _serve(Connection(sockets[0]), make)
            os.close(sockets[0])


def _read(stream: Any, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += (more := stream.read(size - len(found)))
        if not more:
            os._exit(0)
    return found


def _serve(connection: Connection, make: Callable[[], TextEnvironment]) -> None:
    """Answer calls, (name, arguments) each, with (whether it worked, the result or the error's
    text). This runs in a worker process.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_with_parent()
    connection.send(os.getpid())
    environment: TextEnvironment | None = None

    def called(name: str, **given: Any) -> Any:
        nonlocal environment
        if environment is None:
            environment = make()
            return None
        return getattr(environment, name)(**given)

    name, given = "make", dict[str, Any]()
    with suppress(EOFError, OSError):  # the other end is gone
        while True:
            try:
                with exit_in_forks():
                    answer = ForkingPickler.dumps((True, called(name, **given)))
            except BaseException as error:  # a sys.exit is an error too
                answer = ForkingPickler.dumps((False, describe_error(error)))
            connection.send_bytes(answer)
            name, given = connection.recv()
    signal.alarm(_LAST)
    with suppress(BaseException):
        if environment is not None:
            environment.close()
    os._exit(0)
