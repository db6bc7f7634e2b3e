"""Reward functions: how they are named, loaded, called and added up.

A room of its own because their signature is TRL's and their authors are users: every fault is told
here, by name. It knows texts and numbers, no model and no environment.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Protocol, SupportsFloat, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from gearshift.errors import ConfigError
from gearshift.runtime.addresses import Address, checked_variable, shown
from gearshift.runtime.named import in_words, named_function
from gearshift.types import Message

T = TypeVar("T")
Rewards = Sequence[float | None]
LOST = math.nan
"""A reward that should be there and is not: the function hung, its process died, nobody answered.
None says that a function does not apply and leaves it out of the sum; this leaves the episode out,
unless the function has weight 0.
"""
ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""What every reward function gets besides the columns of the data."""
LARGEST = 1e18
"""A greater reward counts as one that is not finite: its square overflows in fp32."""


def usable(reward: float) -> bool:
    """Whether a reward is a number that training can compute with."""
    try:
        return math.isfinite(reward) and abs(reward) <= LARGEST
    except OverflowError:  # an integer beyond all floats
        return False


class RewardFunction(Protocol):
    """TRL's signature: `f(prompts, completions, completion_ids=..., **columns)`, sync or async.

    Every argument is a list with one entry a sample (the columns are those of the data); so is what
    returns, with None where the function does not apply.
    """

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], *args: Any, **kwargs: Any
    ) -> Rewards | Awaitable[Rewards]: ...


def load_reward(spec: str) -> RewardFunction:
    """The function that `module:function`, `path/to/file.py:function` or `http://...` names.

    Raises `ConfigError` when there is no such file, module or function, or its import fails.
    """
    if spec.startswith(("http://", "https://")):
        return HttpReward(spec)
    return cast(RewardFunction, named_function(spec, "reward"))


class HttpReward:
    """A reward behind an address: it is sent `{"prompts", "completions", ...columns}` as JSON and
    answers `{"rewards": [number or null, ...]}`; what `gearshift serve` does for a reward model.

    The environment variable `key_env` is sent as a bearer token. An address that does not answer
    loses these rewards rather than end the run.
    """

    last_failure = ""
    """Why it last did not answer."""

    def __init__(
        self, url: str, timeout: float | None = None, tries: int = 3, key_env: str | None = None
    ) -> None:
        """Raises `ConfigError` for an address or a key that cannot be."""
        host = checked_address(url, url)
        self.timeout, self.tries = timeout or 60.0, tries
        key = bearer(key_env, "GEARSHIFT_REWARD_KEY")
        if key is None and is_loopback(host):  # this machine's own `gearshift serve`
            key = bearer(None, "GEARSHIFT_KEY")
        self.address = Address.of(url, key)

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], *args: Any, **columns: Any
    ) -> Rewards:
        body = {**columns, "prompts": prompts, "completions": completions}
        try:
            return post(self.address, body, _rewards, self.timeout, self.tries)
        except NoAnswerError as error:
            self.last_failure = str(error)
            return [LOST] * len(completions)


def _rewards(answer: Any) -> Rewards:
    """What a server says of each; where it names places that it could not score, these are lost."""
    lost = answer.get("lost") or ()
    return [LOST if i in lost else reward for i, reward in enumerate(answer["rewards"])]


def bearer(named: str | None, default: str) -> str | None:
    """The key in the environment variable `named`, or if none is named in `default`, where it may
    be missing. A key goes to the address for which it was named, and to no other.

    Raises `ConfigError` for a missing variable or one that no header can carry.
    """
    try:
        checked_variable(named or default)
    except ValueError as error:
        raise ConfigError(f"`key_env`: {error}") from None
    key = os.environ.get(named or default, "").strip()
    if named and not key:
        raise ConfigError(
            f"key_env names {named}, which is not set; export it, or set key_env=null."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The key in {named or default} holds more than plain characters.")
    return key or None


def checked_address(source: str, url: str) -> str:
    """The host of an http address. Raises `ConfigError`, which names the source, for another."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:  # a port that is no number, brackets that do not close
        known = None
    if not known or not url.isascii() or re.search(r"\s", url):
        raise ConfigError(f"{shown(source)} has no address; write http://HOST:PORT/PATH.")
    return str(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NoAnswerError(Exception):
    """An address has not answered, or not what it was asked for, however often it was asked."""


def post(
    address: Address,
    body: dict[str, Any],
    read: Callable[[Any], T | None],
    timeout: float,
    tries: int,
    pause: float = 0.5,
) -> T:
    """What `read` finds in the JSON that a POST is answered with. Asked again, after a pause that
    doubles (or as long as the answer says), where nobody answers, the server is ill or busy, or
    `read` finds nothing.

    Raises `NoAnswerError` after the last try; `ConfigError` where the server refuses. Redirects are
    refused too: they would carry the key to somebody else.
    """
    headers = {"Content-Type": "application/json"}
    if address.key:
        headers["Authorization"] = f"Bearer {address.key}"
    data = json.dumps(body, default=str).encode()
    why = ""
    for attempt in range(tries):
        wait, told = pause * 2**attempt, b""
        try:
            with _OPENER.open(Request(address.sent, data, headers), timeout=timeout) as answer:
                told = answer.read(_MOST)
                if (found := read(json.loads(told))) is not None:
                    return found
            why = f"what was asked for is not in its answer {_start(address, told)}"
        except HTTPError as error:
            told = error.read(_MOST)
            if error.code == _IN_PART:
                with suppress(*_UNREADABLE):
                    if (found := read(json.loads(told))) is not None:
                        return found
            if error.code < 500 and error.code not in _BUSY:  # it won't be otherwise the next time
                said = f"{error.reason} {told.decode('utf-8', 'replace')}"
                if place := error.headers.get("Location"):
                    said = f"It redirects to {place}; name that address. {said}"
                raise ConfigError(
                    f"{address.shown} refused: {error.code} {address.told(said)}"
                ) from None
            why = f"it answers {error.code} {error.reason}"
            asked = error.headers.get("Retry-After", "")
            wait = max(wait, min(60.0, float(asked))) if asked.isdecimal() else wait
        except _UNREADABLE:
            why = f"what was asked for is not in its answer {_start(address, told)}"
        except URLError as error:
            why = str(error.reason)
        except (OSError, HTTPException) as error:
            why = in_words(error)
        if attempt + 1 < tries:
            time.sleep(wait)
    raise NoAnswerError(f"{address.shown}: {address.told(why)}, {tries} times")


_BUSY = frozenset({408, 409, 425, 429})
_IN_PART = 422
"""Some of what was sent has no answer; `gearshift serve` says which."""
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading an answer that is not as agreed raises."""
_MOST = 64 << 20
"""Bytes of an answer that are read."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = build_opener(_NoRedirect)


Named = tuple[str, RewardFunction, float]
"""Name, function, weight."""


def combine(
    functions: Sequence[Named],
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None,
    columns: dict[str, list[Any]],
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Each sample's weighted sum, and each function's own rewards by its name.

    `functions` are (name, function, weight); see `add_up`. Raises what `call` raises.
    """
    results = call(functions, prompts, completions, completion_ids, columns)
    return add_up([(name, weight) for name, _, weight in functions], results)


def call(
    functions: Sequence[Named],
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None,
    columns: dict[str, list[Any]],
) -> list[list[float | None]]:
    """What each function says of each sample: a number, None, or `LOST`.

    Raises `ConfigError` naming the function that raises, or that returns anything but one number or
    None a sample.
    """
    results: list[Any] = []
    for name, function, _ in functions:
        try:
            results.append(
                function(
                    prompts=prompts,
                    completions=completions,
                    completion_ids=completion_ids,
                    **columns,
                )
            )
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            raise _raised(name, error) from error
    _await_all([name for name, _, _ in functions], results)
    return [
        _checked(name, result, len(completions))
        for (name, _, _), result in zip(functions, results, strict=True)
    ]


def add_up(
    parts: Sequence[tuple[str, float]], results: Sequence[list[float | None]]
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Each sample's `total` of the parts, which are (name, weight); and the parts by name, None
    where a reward does not apply or is lost.
    """
    weights = [weight for _, weight in parts]
    by_name: dict[str, list[float | None]] = {}
    for (name, _), values in zip(parts, results, strict=True):
        label = name if name not in by_name else f"{name}#{len(by_name)}"
        by_name[label] = [v if v is not None and usable(v) else None for v in values]
    return [total(weights, values) for values in zip(*results, strict=True)], by_name


def total(weights: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The sum of weight * value over the parts that have a weight and apply.

    None if one of these is lost, since a sum without it would count it as 0; or if none of those
    with a weight applies. Where no part has a weight, the total is 0.
    """
    if not any(weights):
        return 0.0
    terms = [w * v for w, v in zip(weights, values, strict=True) if w and v is not None]
    return sum(terms) if terms and usable(sum(terms)) else None


def _await_all(names: Sequence[str], results: list[Any]) -> None:
    """Replace the awaitables among the results by what they return; they run side by side."""
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if not waiting:
        return

    async def gather() -> list[Any]:
        return await asyncio.gather(*(results[i] for i in waiting), return_exceptions=True)

    # A thread of its own has no event loop yet; the caller's (a notebook's, say) may have one.
    try:
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(asyncio.run, gather()).result()
    except (Exception, SystemExit) as error:  # a sys.exit ends the loop for all of them
        raise _raised(", ".join(names[i] for i in waiting), error) from error
    for i, answer in zip(waiting, answers, strict=True):
        if isinstance(answer, BaseException):
            raise _raised(names[i], answer) from answer
        results[i] = answer


def _checked(name: str, result: Any, samples: int) -> list[float | None]:
    """The function's answer as a list of floats and None."""
    if not isinstance(result, Iterable) or isinstance(result, str):
        raise ConfigError(
            f"The reward function {name} returned {_short(result)};"
            " it must return a list of numbers."
        )
    try:
        values = list(result)
    except Exception as error:  # a generator runs only now
        raise _raised(name, error) from error
    if len(values) != samples:
        raise ConfigError(
            f"The reward function {name} returned {len(values)} rewards for {samples} completions;"
            " it must return one each."
        )
    return [None if value is None else _number(name, value) for value in values]


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, SupportsFloat):  # not a string, which float() would read
            number = float(value)
            return number if usable(number) else LOST
    except OverflowError:  # an integer beyond all floats
        return LOST
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers
        pass
    raise ConfigError(
        f"The reward function {name} returned {_short(value)} as a reward;"
        " it must be a number or None."
    )


def _raised(name: str, error: BaseException) -> ConfigError:
    if isinstance(error, ConfigError):  # it says itself what to do
        return error
    return ConfigError(
        f"The reward function {name} raised {in_words(error)}; mend it or take it out."
    )


def _start(address: Address, answer: bytes) -> str:
    return repr(address.told(answer.decode("utf-8", "replace"), 60))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
