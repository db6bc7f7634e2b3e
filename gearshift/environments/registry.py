"""The text environments that Gymnasium knows by id, how to make one, and a small one of many turns.

A room of its own because importing it registers them. It knows no model and no trainer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any, cast

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError, GearshiftError
from gearshift.runtime.user_functions import describe_error, load_function


class GuessNumber(TextEnvironment):
    """Find a number from 1 to `top`: after each wrong guess the user says "Higher." or "Lower.".

    n counts the numbers that all answers so far allow. The reward of a turn is
    0.5 * log(n before / n after) / log(top), half of the share of the uncertainty that the guess
    removed, plus 0.5 for the number itself: an episode that finds it returns 1, however many turns
    it took, and a guess that tells nothing earns nothing. Row i is the number 1 + i.
    """

    def __init__(self, top: int = 20, turns: int = 5) -> None:
        """Raises `ConfigError` unless there are at least two numbers and one turn."""
        super().__init__()
        if top < 2 or turns < 1:
            raise ConfigError(
                f"top={top}, turns={turns} is no game; top must be at least 2, turns 1."
            )
        self.top, self.turns = top, turns
        self._number = self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        row = self.choose(options, self.top)
        self._number, self._left, self._low, self._high = 1 + row, self.turns, 1, self.top
        text = f"I think of a number from 1 to {self.top}. Guess it; answer with one number only."
        return text, {"messages": [{"role": "user", "content": text}], "row": row}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the episode is over or has not begun."""
        if not self._left:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._left -= 1
        guess = int(action) if re.fullmatch(r"\s*[0-9]{1,9}\s*", action) else None
        before = self._high - self._low + 1
        answer = "One number only."
        if guess is not None:
            answer = "Higher." if guess < self._number else "Lower."
            if guess <= self._number:
                self._low = max(self._low, guess + (guess < self._number))
            if guess >= self._number:
                self._high = min(self._high, guess - (guess > self._number))
        found = guess == self._number
        told = math.log(before / (self._high - self._low + 1)) / math.log(self.top)
        info = {"success": found, "gold": str(self._number)}
        if found:
            self._left = 0
        over = not found and not self._left
        return "" if found or over else answer, 0.5 * told + 0.5 * found, found, over, info


def make_any(id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """The registered environment `id`, of any kind, made with `kwargs`; or what the class or
    function makes that `id` names: `module:Name`, `file.py:Name`, `given:Name`.

    Wrappers that its registration asks for (a time limit, say) stay around it, so only Gymnasium's
    API is sure. Raises `ConfigError` if there is no such id or it takes no such arguments.
    """
    factory = _named(id)
    try:
        if factory:
            return factory(**kwargs)
        # Gymnasium's checker would look at the first steps of every copy; the tests do that once.
        return gymnasium.make(id, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        if id in gymnasium.registry:  # it needs a package that is not here, say
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
    """The class or function that `id` names; None for an id that is Gymnasium's to find."""
    place, _, name = id.rpartition(":")
    if not place or not name.isidentifier():
        return None
    try:
        factory = load_function(id, "environment")
    except ConfigError:
        if name not in gymnasium.registry:  # its module registers what is no attribute of it
            raise
    return None if name in gymnasium.registry else factory


def _own() -> list[str]:
    return [id for id in gymnasium.registry if id.startswith("gearshift/")]


def make_environment(id: str, **kwargs: Any) -> TextEnvironment:
    """The registered text environment `id`, as `make_any` makes it. Raises `ConfigError` as it
    does, and if it is not a `TextEnvironment`.
    """
    environment = make_any(id, **kwargs)
    if not isinstance(environment.unwrapped, TextEnvironment):
        raise ConfigError(
            f"{id} is no text environment; subclass gearshift's TextEnvironment, or play it in "
            "words: gearshift/GymInWords-v0."
        )
    return cast(TextEnvironment, environment)


def register(id: str, environment: type[TextEnvironment]) -> None:
    """Make a class known to Gymnasium by this id, for `gymnasium.make` and the task `gym`."""
    _register(id, f"{environment.__module__}:{environment.__qualname__}")


def _register(id: str, entry_point: str) -> None:
    # A TextEnvironment guards the order of reset and step itself: `make` returns it unwrapped.
    gymnasium.register(id, entry_point=entry_point, order_enforce=False)


_OWN = {
    "gearshift/GuessNumber-v0": f"{__name__}:GuessNumber",
    "gearshift/GymInWords-v0": "gearshift.environments.gym_games:GymInWords",
    "gearshift/Verifiers-v0": "gearshift.environments.verifiers:VerifiersEnvironment",
    "gearshift/OpenEnv-v0": "gearshift.environments.openenv:OpenEnvEnvironment",
}
for _id, _entry_point in _OWN.items():
    _register(_id, _entry_point)
