"""The registry of text environments: the ids that Gymnasium knows, and how an environment is made
from an id.

An import of this file registers the environments of this folder. It must not import models or
trainers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, cast

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError, GearshiftError
from gearshift.runtime.user_functions import describe_error, load_function


def make_any(id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make the registered environment `id`, of any kind, with `kwargs`; or what the class or
    function makes that `id` names: `module:Name`, `file.py:Name`, `given:Name`.

    It may be inside wrappers that its registration asks for, for example a time limit, so only
    Gymnasium's API is sure. Raises `ConfigError` if there is no such id or it does not accept these
    arguments.
    """
    factory = _named(id)
    try:
        if factory:
            return factory(**kwargs)
        # Gymnasium's checker would check the first steps of every copy; the tests do that once.
        return gymnasium.make(id, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        if id in gymnasium.registry:  # for example, it needs a package that is not installed
            raise ConfigError(f"The environment {id} cannot be made: {error}") from error
        near = difflib.get_close_matches(id, list(gymnasium.registry), n=1)
        hint = f"did you mean {near[0]}?" if near else f"gearshift's own are {', '.join(_own())}."
        raise ConfigError(f"There is no environment {id}; {hint}") from error
    except TypeError as error:
        raise ConfigError(f"The environment {id} cannot be made with {kwargs}: {error}.") from error
    except GearshiftError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"The environment {id} cannot be made: {describe_error(error)}."
        ) from error


def _named(id: str) -> Callable[..., gymnasium.Env[Any, Any]] | None:
    """The class or function that `id` names; None for an id that Gymnasium must find."""
    place, _, name = id.rpartition(":")
    if not place or not name.isidentifier():
        return None
    try:
        factory = load_function(id, "environment")
    except ConfigError:
        # its module registers the id and has no attribute of that name
        if name not in gymnasium.registry:
            raise
    return None if name in gymnasium.registry else factory


def _own() -> list[str]:
    return [id for id in gymnasium.registry if id.startswith("gearshift/")]


def make_environment(id: str, **kwargs: Any) -> TextEnvironment:
    """Make the registered text environment `id`, as `make_any` does. It raises the same
    `ConfigError`, and another one if the environment is not a `TextEnvironment`.
    """
    environment = make_any(id, **kwargs)
    if not isinstance(getattr(environment, "unwrapped", None), TextEnvironment):
        raise ConfigError(
            f"{id} is not a text environment; subclass gearshift's TextEnvironment, or play it in "
            "words: gearshift/GymInWords-v0."
        )
    return cast(TextEnvironment, environment)


def register(id: str, environment: type[TextEnvironment]) -> None:
    """Register a class with Gymnasium under this id, for `gymnasium.make` and the task `gym`."""
    _register(id, f"{environment.__module__}:{environment.__qualname__}")


def _register(id: str, entry_point: str) -> None:
    # A TextEnvironment checks the order of reset and step itself, so `make` returns it unwrapped.
    gymnasium.register(id, entry_point=entry_point, order_enforce=False)


_OWN = {
    "gearshift/GuessNumber-v0": "gearshift.environments.guess_number:GuessNumber",
    "gearshift/GymInWords-v0": "gearshift.environments.gym_games:GymInWords",
    "gearshift/Verifiers-v0": "gearshift.environments.verifiers:VerifiersEnvironment",
    "gearshift/OpenEnv-v0": "gearshift.environments.openenv:OpenEnvEnvironment",
}
for _id, _entry_point in _OWN.items():
    _register(_id, _entry_point)
