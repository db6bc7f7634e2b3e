"""Reward functions in processes, which can be killed; a thread that hangs cannot.

Pebble keeps the pool: it ends the worker of a call that takes too long, and replaces workers that
died. This file must not import environments or models.
"""

from __future__ import annotations

import contextlib
import os
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Lock
from typing import Any

from pebble import ProcessExpired, ProcessPool

from gearshift.errors import ConfigError
from gearshift.rewards.functions import (
    REWARD_MISSING,
    RewardFunction,
    Rewards,
    call_rewards,
)
from gearshift.runtime.interrupt import SIGNALS
from gearshift.runtime.user_functions import GIVEN, load_function
from gearshift.runtime.worker_threads import end_with_parent, exit_in_forks
from gearshift.types import Message

_START = 300.0
"""How many seconds a worker may take to start, in addition to the time of its first call."""
_functions: dict[str, RewardFunction] = {}
"""The functions that this worker has loaded."""


class ProcessReward:
    """The function that `spec` names, called in `processes` workers.

    If a call takes longer than `timeout` seconds (a worker's start does not count) or its worker
    dies, its samples get `REWARD_MISSING`, and another worker replaces the old one. Arguments and
    rewards cross as plain data.
    """

    last_failure = ""
    """Why the last rewards were lost."""

    def __init__(self, spec: str, processes: int, timeout: float) -> None:
        """Raises `ConfigError` like `load_function`."""
        if spec.startswith(GIVEN):
            raise ConfigError(
                f"The reward `{spec}` has no module that its process could import; move the "
                "function into a module and name it module:name, or set no timeout and no "
                "processes."
            )
        load_function(spec, "reward")  # an error is reported here once, not by each worker
        self.spec, self.timeout, self.parallel = spec, timeout, processes
        self._lock = Lock()
        self._pool = self._new_pool()

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], *args: Any, **columns: Any
    ) -> Rewards:
        given = {**columns, "prompts": prompts, "completions": completions}
        with self._lock:
            if not self._pool.active:  # the pool broke: idle workers died
                self._pool = self._new_pool()
            future = self._pool.schedule(_score, (self.spec, given), timeout=self.timeout)
        try:
            rewards, fault = future.result(self.timeout + _START)
        except FutureTimeout:
            future.cancel()  # its worker hangs while it starts; otherwise the call has ended
            self.last_failure = f"the reward function {self.spec} took more than {self.timeout:g} s"
        except (ProcessExpired, BrokenProcessPool) as error:
            self.last_failure = f"the process of the reward function {self.spec} died ({error})"
        else:
            if fault:
                raise ConfigError(fault)
            return rewards
        return [REWARD_MISSING] * len(completions)

    def close(self) -> None:
        """End the workers."""
        _end(self._pool)

    def _new_pool(self) -> ProcessPool:
        with _blocked_signals():  # the process that keeps the pool's locks lives as long as the run
            resource_tracker.ensure_running()
        pool = ProcessPool(
            self.parallel, initializer=_load, initargs=(self.spec,), context=_Workers()
        )
        weakref.finalize(self, _end, pool)  # this also ends a worker that starts while the run ends
        return pool


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


class _Worker(SpawnProcess):
    """A worker that signals to the run's process group (Ctrl-C, torchrun's SIGTERM) do not reach:
    the run finishes its step first, and needs the rewards for it.
    """

    def start(self) -> None:
        """Start it with signals blocked, until `run` has left the process group."""
        with _blocked_signals():
            super().start()

    def run(self) -> None:
        """Work."""
        os.setsid()
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # those that came before `setsid`
        for number, handler in before.items():
            signal.signal(number, handler)
        super().run()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Processes that are started inside are born with signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Workers(SpawnContext):
    Process = _Worker


def _load(spec: str) -> None:
    end_with_parent()
    with contextlib.suppress(ConfigError):  # the call reports it
        _functions[spec] = load_function(spec, "reward")


def _score(spec: str, given: dict[str, Any]) -> tuple[list[float | None], str]:
    """The rewards, and the text of an error if there was one: not every exception can cross
    processes.
    """
    try:
        function = _functions.get(spec) or load_function(spec, "reward")
        prompts, completions = given.pop("prompts"), given.pop("completions")
        ids = given.pop("completion_ids", None)
        with exit_in_forks():
            return call_rewards([(spec, function, 1.0)], prompts, completions, ids, given)[0], ""
    except ConfigError as error:
        return [], str(error)
    except KeyboardInterrupt:  # the function raised it: Ctrl-C does not reach a worker
        return (
            [],
            f"The reward function {spec} raised KeyboardInterrupt; correct it or take it out.",
        )
