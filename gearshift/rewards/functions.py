"""Reward functions: how they are loaded, called, checked and added up.

They have TRL's signature, and users write them, so every failure is reported here with the
function's name. This file knows texts and numbers; it must not import models or environments.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol, SupportsFloat

from gearshift.errors import ConfigError
from gearshift.rewards.http_client import short_repr
from gearshift.runtime.terminal import counted
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import CallAbandoned, run_with_timeout
from gearshift.types import Message

Rewards = Sequence[float | None]
REWARD_MISSING = math.nan
"""A reward that should exist and does not: the function hung, its process died, or no server
answered. None means that a function does not apply, and leaves it out of the sum; this value leaves
the episode out, unless the function has weight 0.
"""
ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""The arguments that every reward function gets besides the columns of the data."""
MAX_REWARD = 1e18
"""A greater reward counts as one that is not finite: its square overflows in fp32."""


def is_usable(reward: float) -> bool:
    """Whether a reward is a number that training can compute with."""
    try:
        return math.isfinite(reward) and abs(reward) <= MAX_REWARD
    except OverflowError:  # an integer beyond all floats
        return False


class RewardFunction(Protocol):
    """TRL's signature: `f(prompts, completions, completion_ids=..., **columns)`, sync or async.

    Every argument is a list with one entry for each sample (the columns are those of the data). The
    function returns such a list too, with None where it does not apply.
    """

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], *args: Any, **kwargs: Any
    ) -> Rewards | Awaitable[Rewards]: ...


NamedReward = tuple[str, RewardFunction, float]
"""A function with its name and its weight."""


def combine_rewards(
    functions: Sequence[NamedReward],
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None,
    columns: dict[str, list[Any]],
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """The weighted sum of each sample, and each function's own rewards by its name.

    See `weighted_sums` for the sum, and `call_rewards` for the errors.
    """
    results = call_rewards(functions, prompts, completions, completion_ids, columns)
    return weighted_sums([(name, weight) for name, _, weight in functions], results)


def call_rewards(
    functions: Sequence[NamedReward],
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None,
    columns: dict[str, list[Any]],
) -> list[list[float | None]]:
    """The rewards of each function for each sample: a number, None, or `REWARD_MISSING`. Each
    function gets its own copies of the arguments, which it may change.

    Raises `ConfigError`, with the function's name, if it raises, or returns anything but one number
    or None for each sample.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    results: list[Any] = []
    for name, function, _ in functions:
        own = {key: _copy(value) for key, value in {**columns, **given}.items()}
        with _name_failures(name):
            results.append(function(**own))
    _await_all([name for name, _, _ in functions], results)
    return [
        _check_rewards(name, result, len(completions))
        for (name, _, _), result in zip(functions, results, strict=True)
    ]


def _copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # an environment's own object may not allow copies
        return [*value] if isinstance(value, list) else value


@contextmanager
def _name_failures(name: str) -> Iterator[None]:
    """Turn every error of the code inside into a `ConfigError` with the function's name; only an
    order to this thread to stop passes through.
    """
    try:
        yield
    except CallAbandoned:
        raise
    except BaseException as error:
        main = threading.current_thread() is threading.main_thread()
        if isinstance(error, KeyboardInterrupt) and main:  # the user pressed Ctrl-C
            raise
        raise _raised_error(name, error) from error


def weighted_sums(
    parts: Sequence[tuple[str, float]], results: Sequence[list[float | None]]
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """The `weighted_sum` of each sample, from parts of (name, weight); and the rewards of each part
    by its name, None where a reward does not apply or is missing.
    """
    weights = [weight for _, weight in parts]
    by_name: dict[str, list[float | None]] = {}
    for (name, _), values in zip(parts, results, strict=True):
        label = name if name not in by_name else f"{name}#{len(by_name)}"
        by_name[label] = [v if v is not None and is_usable(v) else None for v in values]
    return [weighted_sum(weights, values) for values in zip(*results, strict=True)], by_name


def weighted_sum(weights: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The sum of weight * value over the parts that have a weight and apply.

    None if one of these is missing, because a sum without it would count it as 0; also None if no
    part with a weight applies. If no part has a weight, the sum is 0.
    """
    if not any(weights):
        return 0.0
    terms = [w * v for w, v in zip(weights, values, strict=True) if w and v is not None]
    return sum(terms) if terms and is_usable(sum(terms)) else None


def _await_all(names: Sequence[str], results: list[Any]) -> None:
    """Replace the awaitables among the results by their values; they run at the same time."""
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not waiting:
        return

    async def gather() -> list[asyncio.Future[Any]]:
        tasks = [asyncio.ensure_future(results[i]) for i in waiting]
        while (await asyncio.wait(tasks, timeout=_POLL_SECONDS))[1]:
            pass  # the loop wakes now and then, because only then can this thread be stopped
        return tasks

    run = partial(_run, gather)
    # a sys.exit in one of them ends the loop for all
    with _name_failures(", ".join(names[i] for i in waiting)):
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            answers = run()
        else:  # the caller has a loop of its own, for example a notebook
            answers = run_with_timeout(None, run)
    for i, answer in zip(waiting, answers, strict=True):
        with _name_failures(names[i]):
            results[i] = answer.result()


def _run(main: Callable[[], Any]) -> Any:
    return asyncio.run(main())


_POLL_SECONDS = 0.5
"""How often a call that has not ended is checked."""


def _check_rewards(name: str, result: Any, samples: int) -> list[float | None]:
    """The function's result as a list of floats and None."""
    # The letters of a text, the bytes of bytes, the keys of a dict and the members of a set are no
    # rewards in order.
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
        raise ConfigError(
            f"The reward function {name} returned {short_repr(result)};"
            " it must return a list of numbers."
        )
    with _name_failures(name):  # a generator runs only now, and may have no end
        values = list(islice(result, samples + 1))
    if len(values) != samples:
        less = counted(len(values), "reward")
        count = f"more than {counted(samples, 'reward')}" if len(values) > samples else less
        raise ConfigError(
            f"The reward function {name} returned {count} for "
            f"{counted(samples, 'completion')}; it must return one each."
        )
    return [None if value is None else _check_reward(name, value) for value in values]


def _check_reward(name: str, value: Any) -> float:
    with _name_failures(name):
        try:
            return to_reward(value)
        except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers
            raise ConfigError(
                f"The reward function {name} returned {short_repr(value)} as a reward;"
                " it must be a number or None."
            ) from None


def to_reward(value: Any) -> float:
    """A real number of any type (Decimal, Fraction, NumPy's, a tensor's) as a float;
    `REWARD_MISSING` if training cannot compute with it. Raises `TypeError`, `ValueError` or
    `RuntimeError` for anything else, also for a text that `float` would read.
    """
    # float() of a complex number would drop its imaginary part
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, SupportsFloat):
        raise TypeError(f"{short_repr(value)} is no number")
    try:
        found = float(plain)
    except OverflowError:  # an integer beyond all floats
        return REWARD_MISSING
    return found if is_usable(found) else REWARD_MISSING


def _raised_error(name: str, error: BaseException) -> ConfigError:
    if isinstance(error, ConfigError):  # its text already says what to do
        return error
    return ConfigError(
        f"The reward function {name} raised {describe_error(error)}; correct it or take it out."
    )
