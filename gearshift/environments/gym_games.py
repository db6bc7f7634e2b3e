"""Gymnasium's games in words: an observation becomes a sentence, and an answer names one of the
moves.

This is the only file that looks inside games; it must not import models. A game that it does not
know is played in numbers, or in the words that the recipe gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from gearshift.environments.base import AnyText, TextEnvironment
from gearshift.environments.registry import make_any
from gearshift.errors import ConfigError

Game = gymnasium.Env[Any, Any]
Numbers = tuple[int, ...]
"""An observation as flat numbers; Blackjack's is (14, 10, 0)."""


@dataclass(frozen=True, slots=True)
class Words:
    """The words that describe a game. Templates may contain `{0}`, `{1}`, ... for the observation's
    numbers, the game's own fields, and `{moves}`.
    """

    intro: str
    """The text before the first observation; may be empty."""
    observation: str
    """The text of each turn."""
    actions: tuple[str, ...]
    """The names of the moves, in the order of the game's numbers."""
    fields: Callable[[Any, Numbers], dict[str, Any]] = lambda game, numbers: {}
    """(game, numbers) -> the fields that the templates may contain."""
    won: Callable[[Any, Numbers, float, bool], bool] | None = None
    """(game, numbers, last reward, terminated) -> whether the game was won; None if that is not
    known.
    """


def _lake(game: Any, numbers: Numbers) -> dict[str, Any]:
    row, column = divmod(numbers[0], game.ncol)
    tiles = "/".join(b"".join(r).decode() for r in game.desc)
    return {"row": row, "column": column, "letter": chr(ord("A") + numbers[0]), "map": tiles}


def _cliff(game: Any, numbers: Numbers) -> dict[str, Any]:
    row, column = divmod(numbers[0], game.shape[1])
    return {"row": row, "column": column}


def _taxi(game: Any, numbers: Numbers) -> dict[str, Any]:
    row, column, passenger, destination = game.decode(numbers[0])
    stands = ("red", "green", "yellow", "blue")
    places = [f"{name} ({r},{c})" for name, (r, c) in zip(stands, game.locs, strict=True)]
    there = [*(f"at {place}" for place in places), "in the taxi"][passenger]
    return {"row": row, "column": column, "passenger": there, "destination": places[destination]}


def _cards(game: Any, numbers: Numbers) -> dict[str, Any]:
    return {"ace": "a usable ace" if numbers[2] else "no usable ace"}


_TELL = "Answer with one word: {moves}."
_GAMES = {
    "FrozenLakeEnv": Words(
        "Cross the frozen lake from S to G and stay out of the holes, H. Its rows from the top: "
        "{map}. " + _TELL,
        "You are at row {row}, column {column}.",
        ("left", "down", "right", "up"),
        _lake,
        lambda game, numbers, reward, ended: bool(game.desc.flat[numbers[0]] == b"G"),
    ),
    "CliffWalkingEnv": Words(
        "Walk from row 3, column 0 to row 3, column 11. Between them in row 3 is a cliff: who "
        "steps there starts again. " + _TELL,
        "You are at row {row}, column {column}.",
        ("up", "right", "down", "left"),
        _cliff,
        lambda game, numbers, reward, ended: ended,
    ),
    "TaxiEnv": Words(
        "Drive a taxi on a grid of five rows and columns with some walls: pick the passenger up "
        "and drop them at their destination. " + _TELL,
        "Taxi at ({row},{column}), passenger {passenger}, destination {destination}.",
        ("south", "north", "east", "west", "pickup", "dropoff"),
        _taxi,
        lambda game, numbers, reward, ended: ended,
    ),
    "BlackjackEnv": Words(
        "Blackjack: come nearer to 21 than the dealer, and not over it. " + _TELL,
        "You have {0}, {ace}; the dealer shows {1}.",
        ("stick", "hit"),
        _cards,
        lambda game, numbers, reward, ended: reward > 0,
    ),
}
"""The words by the name of the game's class, or of one of its base classes."""


class Moves(AnyText):
    """All strings, because an answer may be any text. A sample is a move, so random play is a
    game.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """One of the names, with equal probability."""
        return self.names[int(self.np_random.integers(len(self.names)))]

    def __repr__(self) -> str:
        return f"Moves{self.names}"


class GymInWords(TextEnvironment):
    """A Gymnasium game played in words, one move in each answer; the rewards are the game's own.

    If an answer names no move, or several, the game does not change: this costs `penalty` and a
    turn, and the moves are listed again. At the end `info["metrics"]` has the number of `turns` and
    of `unreadable` answers, and `info["success"]` says whether the game was won: in FrozenLake and
    CliffWalking the goal was reached, in Taxi the passenger was delivered, in Blackjack the hand
    was better; in another game its reward threshold was reached, if Gymnasium knows one.

    For many games at once use `gymnasium.make_vec`, with `vector_kwargs={"shared_memory": False}`
    in mode "async".
    """

    def __init__(
        self,
        game: str = "FrozenLake-v1",
        options: Mapping[str, Any] | None = None,
        turns: int = 100,
        penalty: float = 0.1,
        words: Mapping[str, Any] | None = None,
    ) -> None:
        """`options` are arguments of `gymnasium.make(game)`; `words` replaces the game's `intro`,
        `observation` or `actions`.

        Raises `ConfigError` if the game cannot be made, if its observations are not whole numbers,
        if its moves are not a number, or if the words do not fit it.
        """
        super().__init__()
        if turns < 1 or penalty < 0:
            raise ConfigError(
                f"turns={turns}, penalty={penalty} is not a game; turns must be at least 1, and "
                "penalty at least 0."
            )
        self.game: Game = make_any(game, **(options or {}))
        self.turns, self.penalty = turns, penalty
        shown, moves = self.game.observation_space, self.game.action_space
        if not isinstance(moves, spaces.Discrete):
            raise ConfigError(
                f"The moves of {game} are {moves}, which cannot be named; they must be Discrete."
            )
        if not _countable(shown):
            raise ConfigError(
                f"The observations of {game} are {shown}, which cannot be put into words; they "
                "must be made of Discrete, MultiDiscrete or MultiBinary."
            )
        self.words = self._fitting(game, words or {})
        self.action_space = Moves(self.words.actions)
        self._moves = {
            name.lower(): int(moves.start) + i for i, name in enumerate(self.words.actions)
        }
        names = "|".join(sorted(map(re.escape, self._moves), key=len, reverse=True))
        # A hyphen is part of a word: `non-stick` is not `stick`, and `-1` is not `1`.
        self._named = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """`options` are the game's options."""
        super().reset(seed=seed)
        self._seen, _ = self.game.reset(seed=seed, options=options)
        self._turn = self._unreadable = 0
        self._earned, self._over = 0.0, False
        self._shown = self.tell(self._seen)
        parts = (self._filled(self.words, self.words.intro, self._seen), self._shown)
        text = "\n".join(part for part in parts if part)
        return text, {"messages": [{"role": "user", "content": text}]}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the game is over or has not begun."""
        if self._over:
            raise gymnasium.error.ResetNeeded("Call reset before step: no game is running.")
        self._turn += 1
        move = self.read(action)
        if move is None:
            self._unreadable += 1
            again = _TELL.format(moves=_listed(self.words.actions))
            text, reward, ended, cut = f"{again}\n{self._shown}", -self.penalty, False, False
        else:
            self._seen, given, ended, cut, _ = self.game.step(move)
            self._shown = text = self.tell(self._seen)
            reward = float(given)
        self._earned += reward
        cut = cut or (self._turn >= self.turns and not ended)
        self._over = ended or cut
        info: dict[str, Any] = {}
        if self._over:
            info["metrics"] = {"turns": self._turn, "unreadable": self._unreadable}
            won = self._won(self._seen, reward, ended)
            info |= {} if won is None else {"success": won}
        return text, reward, ended, cut, info

    def close(self) -> None:
        """Close the game."""
        self.game.close()

    def tell(self, seen: Any) -> str:
        """The observation in words; a subclass may replace it."""
        return self._filled(self.words, self.words.observation, seen)

    def read(self, action: str) -> int | None:
        """The number of the single move that an answer names, or None."""
        named = set(self._named.findall(action.lower()))
        return self._moves[named.pop()] if len(named) == 1 else None

    def _won(self, seen: Any, reward: float, ended: bool) -> bool | None:
        game = self.game.unwrapped
        if self.words.won:
            return self.words.won(game, self._numbers(seen), reward, ended)
        threshold = self.game.spec.reward_threshold if self.game.spec else None
        return None if threshold is None else self._earned >= threshold

    def _numbers(self, seen: Any) -> Numbers:
        return tuple(_flat(self.game.observation_space, seen))

    def _filled(self, words: Words, template: str, seen: Any) -> str:
        numbers = self._numbers(seen)
        fields = words.fields(self.game.unwrapped, numbers)
        return template.format(*numbers, **fields, moves=_listed(words.actions))

    def _fitting(self, game: str, own: Mapping[str, Any]) -> Words:
        """The game's words, some of them replaced by `own`. Raises `ConfigError` if they do not
        fit.
        """
        sample = self.game.observation_space.sample()
        count, moves = len(self._numbers(sample)), self.game.action_space
        classes = [c.__name__ for c in type(self.game.unwrapped).__mro__]
        known = next((_GAMES[name] for name in classes if name in _GAMES), None)
        words = known or Words(
            f"This is the game {game}. {_TELL}",
            " ".join(f"{{{i}}}" for i in range(count)),
            tuple(str(moves.start + i) for i in range(moves.n)),  # type: ignore[attr-defined]
        )
        if strange := own.keys() - {"intro", "observation", "actions"}:
            raise ConfigError(
                f"words has no {sorted(strange)[0]}; it has intro, observation and actions."
            )
        own = {k: tuple(map(str, v)) if k == "actions" else str(v) for k, v in own.items()}
        words = replace(words, **own)
        names = {name.lower() for name in words.actions}
        if len(words.actions) != moves.n or len(names) != moves.n or "" in names:  # type: ignore[attr-defined]
            raise ConfigError(
                f"words.actions must name {game}'s {moves.n} moves, each differently; "  # type: ignore[attr-defined]
                f"it is {list(words.actions)}."
            )
        for template in (words.intro, words.observation):
            try:
                self._filled(words, template, sample)
            except (LookupError, ValueError, TypeError, AttributeError) as error:
                fields = words.fields(self.game.unwrapped, self._numbers(sample))
                had = [*map(str, range(count)), *fields, "moves"]
                raise ConfigError(
                    f"The words {template!r} cannot be filled in; {game} has "
                    f"{', '.join(f'{{{name}}}' for name in had)}."
                ) from error
        return words


def _listed(names: Sequence[str]) -> str:
    """The names as a list in words: `left, down, right or up`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _countable(space: Any) -> bool:
    if isinstance(space, spaces.Tuple):
        return all(map(_countable, space.spaces))
    if isinstance(space, spaces.Dict):
        return all(map(_countable, space.spaces.values()))
    return isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)


def _flat(space: Any, seen: Any) -> Iterator[int]:
    """The numbers of an observation, in the space's order."""
    if isinstance(space, spaces.Tuple):
        for inner, part in zip(space.spaces, seen, strict=True):
            yield from _flat(inner, part)
    elif isinstance(space, spaces.Dict):
        for name, inner in space.spaces.items():
            yield from _flat(inner, seen[name])
    else:
        yield from map(int, np.ravel(seen))
