"""Environments in processes of their own: what one dies of, or hangs in, is its own episode's loss.

An environment keeps its process from episode to episode. The processes are forked from one that has
imported this package once, so that each starts in an instant and shares that memory.
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
"""Bytes of one answer."""
_START = 300.0
"""Seconds in which a process can start and its environment be made."""
_LAST = 10
"""Seconds in which an environment can close."""
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gearshift.environments.worker_processes import fork_for; fork_for(int(sys.argv[2]))"
)


class ProcessError(Exception):
    """What went wrong in another process, in words."""


class EnvironmentProcesses:
    """Makes environments that run in processes of their own.

    All of them end with this object, and with this process, however it ends.
    """

    def __init__(self, make: Callable[[], TextEnvironment]) -> None:
        """`make` is called there, so it must be something that can be pickled."""
        self._make, self._lock = make, threading.Lock()
        self._forks: subprocess.Popen[bytes] | None = None
        self.close: Callable[[], Any] = lambda: None
        """End the processes; the next environment starts others."""

    def __call__(self) -> ProcessEnvironment:
        """An environment whose process starts at its first reset."""
        return ProcessEnvironment(self.connect)

    def connect(self) -> Connection:
        """To a new process, which says its number first and then answers as `_serve` does."""
        with self._lock:
            if self._forks is None or self._forks.poll() is not None:
                self._start()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._orders, [b"."], [theirs.fileno()])
            return Connection(ours.detach())

    def _start(self) -> None:
        """The process that forks the others."""
        given = bytes(ForkingPickler.dumps((self._make, torch.get_num_threads())))
        self.close()
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._forks = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the run's
            )
        self.close = weakref.finalize(self, _end, self._orders, self._forks)
        self._orders.sendall(len(given).to_bytes(8, "little") + given)


def _end(orders: socket.socket, forks: subprocess.Popen[bytes]) -> None:
    orders.close()
    forks.wait()


class ProcessEnvironment(TextEnvironment):
    """An environment that answers from another process. Once that died, a reset starts another."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        super().__init__()
        self._connect, self._pid = connect, 0
        self._connection: Connection | None = None

    def ready(self) -> None:
        """Start its process, if it has none that lives. Raises `ProcessError` if it cannot be made.

        For who measures how long the environment takes, to which this does not belong.
        """
        if self._connection is None or self._connection.poll():  # it has died
            self._connection = self._connect()
            self._pid = self._received(_START)
            self._result(_START)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Raises `ProcessError` if the environment raises, or dies."""
        self.ready()
        answer: tuple[str, dict[str, Any]] = self._asked("reset", seed=seed, options=options)
        return answer

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ProcessError` if the environment raises, or dies."""
        answer: tuple[str, float, bool, bool, dict[str, Any]] = self._asked("step", action=action)
        return answer

    def kill(self) -> None:
        """End its process, whatever it does; who waits for its answer is told that it died."""
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """The environment closes, and its process ends."""
        self._connection = None

    def _asked(self, name: str, **given: Any) -> Any:
        if self._connection is None:
            raise ProcessError("it was not reset")
        with suppress(OSError):  # it has died, which what follows tells
            self._connection.send((name, given))
        return self._result()

    def _result(self, seconds: float | None = None) -> Any:
        worked, answer = self._received(seconds)
        if not worked:
            raise ProcessError(answer)
        return answer

    def _received(self, seconds: float | None) -> Any:
        """What its process says next, within so many seconds (None: it may take any)."""
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


# In the other processes


def fork_for(orders: int) -> None:
    """Fork a process for each socket that comes, until the one who orders them is gone."""
    with socket.socket(fileno=orders) as here, here.makefile("rb", buffering=0) as stream:
        size = int.from_bytes(_read(stream, 8), "little")
        make, threads = ForkingPickler.loads(_read(stream, size))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        while True:
            message, sockets, _, _ = socket.recv_fds(here, 1, 1)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                here.close()
                torch.set_num_threads(threads)
                np.random.seed()  # or all had the same numbers
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
    """Answer (name, arguments) of calls with (whether it worked, what it returned or raised)."""
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
            except BaseException as error:  # a sys.exit is a fault too
                answer = ForkingPickler.dumps((False, describe_error(error)))
            connection.send_bytes(answer)
            name, given = connection.recv()
    signal.alarm(_LAST)
    with suppress(BaseException):
        if environment is not None:
            environment.close()
    os._exit(0)
