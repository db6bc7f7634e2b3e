"""Rewards from a server, which may run on another machine or in another language."""

from __future__ import annotations

from typing import Any

from gearshift.rewards.functions import REWARD_MISSING, Rewards
from gearshift.rewards.http_client import NoAnswerError, bearer_key, http_host, is_loopback, post
from gearshift.runtime.urls import Endpoint
from gearshift.types import Message

MAX_ROWS = 1024
"""How many completions one request to a server carries; more are sent in parts."""


class HttpReward:
    """A reward from a server. The server gets `{"prompts", "completions", ...columns}` as JSON and
    answers `{"rewards": [number or null, ...]}`, as `gearshift serve` does for a reward model.

    The value of the environment variable `key_env` is sent as a bearer token. If the server does
    not answer, these rewards are missing, and the run continues.
    """

    last_failure = ""
    """The reason of the last request without an answer."""

    def __init__(
        self, url: str, timeout: float | None = None, tries: int = 3, key_env: str | None = None
    ) -> None:
        """Raises `ConfigError` for an address or a key that cannot be right."""
        host = http_host(url, url)
        self.timeout, self.tries = timeout or 60.0, tries
        key = bearer_key(key_env, "GEARSHIFT_REWARD_KEY")
        if key is None and is_loopback(host):  # this machine's own `gearshift serve`
            key = bearer_key(None, "GEARSHIFT_KEY")
        self.address = Endpoint.of(url, key)

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], *args: Any, **columns: Any
    ) -> Rewards:
        body = {**columns, "prompts": prompts, "completions": completions}
        if len(completions) <= MAX_ROWS:
            return self._ask(body)
        rewards: list[float | None] = []
        for at in range(0, len(completions), MAX_ROWS):
            part = {name: column and column[at : at + MAX_ROWS] for name, column in body.items()}
            scored = self._ask(part)
            if len(scored) != len(part["completions"]):
                return scored  # the caller reports the wrong number
            rewards += scored
        return rewards

    def _ask(self, body: dict[str, Any]) -> Rewards:
        try:
            return post(self.address, body, _rewards, self.timeout, self.tries)
        except NoAnswerError as error:
            self.last_failure = str(error)
            return [REWARD_MISSING] * len(body["completions"])


def _rewards(answer: Any) -> list[float | None]:
    """The rewards in a server's answer; those at the places that it lists in `lost` are missing."""
    lost = answer.get("lost") or ()
    return [REWARD_MISSING if i in lost else reward for i, reward in enumerate(answer["rewards"])]
