"""Environments of the `openenv` package as text environments: a server at a URL, or a class in this
process.

Only this file knows that package, and imports it when an environment is made.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError, NumericalError
from gearshift.runtime.urls import Endpoint

_CONNECT_SECONDS = 5.0
"""A full server has this many seconds to end the sessions of environments that are gone."""


class OpenEnvEnvironment(TextEnvironment):
    """An OpenEnv environment whose action has one field for the policy's text.

    The user's message is one field of the observation, or all of them as JSON. If the environment
    gives no reward, it is 0.
    """

    def __init__(
        self,
        url: str | None = None,
        environment: str | None = None,
        action: str = "message",
        observation: str | None = None,
        also: Mapping[str, Any] | None = None,
        turns: int = 20,
        timeout: float = 60.0,
    ) -> None:
        """Give either the `url` of a server (`http://localhost:8000`), or `environment`, a class in
        a module (`my_env.server:MyEnvironment`) whose `step` has its action's class
        (`my_env.models:MyAction`) as annotation. `action` is the field for the answer, and `also`
        has the other fields; `timeout` is the number of seconds for a message of the server.

        Raises `ConfigError` if the server cannot be reached or the class cannot be imported.
        """
        super().__init__()
        if (url is None) == (environment is None) or turns < 1:
            raise ConfigError("OpenEnv needs either `url` or `environment`, and at least one turn.")
        self.action, self.observation, self.also = action, observation, dict(also or {})
        self.turns = turns
        self._left = 0
        fields = {*self.also, action}
        self._inner: Any = (
            _LocalClient(environment, fields) if environment else _connect(str(url), timeout)
        )
        # The client's thread keeps the client alive, so a client that was not closed would keep its
        # session.
        self._gone = weakref.finalize(self, _close_in_thread, self._inner)
        self._gone.atexit = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """`options` are further arguments of the environment's own reset."""
        super().reset(seed=seed)
        given = {} if seed is None else {"seed": seed}
        result = self._inner.reset(**given, **(options or {}))
        self._left = self.turns
        text = self._text(result.observation)
        return text, {"messages": [{"role": "user", "content": text}]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when no episode is running, `NumericalError` for a reward that is
        not finite, and the errors of the environment.
        """
        if not self._left:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        try:
            result = self._inner.step({**self.also, self.action: action})
        except RuntimeError as error:
            if "VALIDATION_ERROR" not in str(error):
                raise
            named = ", ".join([*self.also, self.action])
            raise ConfigError(
                f"The server refuses an action with the fields {named}; check their names."
            ) from error
        reward = 0.0 if result.reward is None else float(result.reward)
        if not math.isfinite(reward):
            raise NumericalError(
                f"The environment gave the reward {reward}; leave the episode out."
            )
        done = bool(result.done)
        self._left = 0 if done else self._left - 1
        cut = not done and not self._left
        return self._text(result.observation), reward, done, cut, {}

    def close(self) -> None:
        """Close the connection."""
        if self._gone.detach():
            self._inner.close()

    def _text(self, seen: Mapping[str, Any]) -> str:
        if self.observation is None:
            fields = {k: v for k, v in seen.items() if k not in ("done", "reward", "metadata")}
            return json.dumps(fields, ensure_ascii=False)
        if self.observation not in seen:
            raise ConfigError(
                f"The observation has no `{self.observation}`; it has {', '.join(seen)}."
            )
        value = seen[self.observation]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Result:
    """The result of a step, in the form of the package's client."""

    def __init__(self, seen: Any) -> None:
        self.observation: dict[str, Any] = seen.model_dump()
        self.reward, self.done = seen.reward, seen.done


class _LocalClient:
    """An environment in this process, with the methods of the package's client."""

    def __init__(self, path: str, fields: set[str]) -> None:
        module, _, name = path.partition(":")
        try:
            self._env = getattr(importlib.import_module(module), name)()
            hints = inspect.get_annotations(type(self._env).step, eval_str=True)
            self._takes = inspect.signature(self._env.reset).parameters
        except (ImportError, AttributeError, NameError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"The environment {path} cannot be made: {reason}") from error
        kind: Any = hints.get("action")
        if not hasattr(kind, "model_validate"):
            raise ConfigError(
                f"{path}.step has no annotation for its action; annotate it with the class of "
                "the action."
            )
        self._action, has = kind, kind.model_fields
        unknown = sorted(fields - set(has))
        if unknown and kind.model_config.get("extra") != "allow":
            raise ConfigError(
                f"{path}'s action has no {', '.join(unknown)}; it has {', '.join(has)}."
            )

    def reset(self, **given: Any) -> _Result:
        kinds = {one.kind for one in self._takes.values()}
        known = given if inspect.Parameter.VAR_KEYWORD in kinds else given.keys() & set(self._takes)
        return _Result(self._env.reset(**{k: given[k] for k in known}))

    def step(self, action: Mapping[str, Any]) -> _Result:
        return _Result(self._env.step(self._action.model_validate(action)))

    def close(self) -> None:
        self._env.close()


def _connect(url: str, timeout: float) -> Any:
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError as error:
        raise ConfigError(
            "An OpenEnv server needs the package openenv; run: pip install openenv"
        ) from error
    address = Endpoint.of(url)
    until = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            client = (
                GenericEnvClient(base_url=address.url, message_timeout_s=timeout).sync().connect()
            )
        except (ConnectionError, OSError, ValueError) as error:
            raise ConfigError(
                f"There is no OpenEnv server at {address.display}: {address.redact(str(error))}."
            ) from None
        if not _full(client):
            return client
        client.close()
        if time.monotonic() > until:
            raise ConfigError(
                f"The server at {address.display} accepts no further session; raise its "
                "max_concurrent_envs to prompts x group_size, plus 64 for held-out episodes."
            )
        time.sleep(0.1)


def _full(client: Any) -> bool:
    """Whether the server accepted the connection only to close it."""
    from websockets.exceptions import ConnectionClosed

    try:
        client.state()
    except ConnectionClosed:
        return True
    except RuntimeError as error:  # not every environment has a state
        return "CAPACITY_REACHED" in str(error)
    return False


def _close_in_thread(client: Any) -> None:
    # This may be the client's own thread, which would wait for itself, so another thread closes it.
    threading.Thread(target=client.close, daemon=True).start()
