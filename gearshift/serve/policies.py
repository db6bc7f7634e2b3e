"""The models that are served: their names, and a conversation as the tokens of one.

This file knows no wire: a part gives it messages and token ids, and gets token ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import render_prefill, render_prompt
from gearshift.engine.service import EngineService
from gearshift.errors import DataError
from gearshift.runtime.chat_template_arguments import reads
from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.serve.token_text import TokenNames
from gearshift.types import Message


@dataclass
class Policy:
    """One model that answers."""

    name: str
    service: EngineService
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    """The system message of a conversation that has none."""
    end_tokens: frozenset[int] = frozenset()
    """The tokens that end the model's answers."""
    weights: str = ""
    """The first 8 hexadecimal digits of the weights' digest; empty for weights that a run trains,
    which have a version only."""
    names: TokenNames = field(init=False)
    """The texts and the bytes of single tokens."""

    def __post_init__(self) -> None:
        self.names = TokenNames(self.tokenizer)
        self._ids = itertools.count(1)

    def next_id(self) -> int:
        """The id of the next request without a seed. Those with a seed have id 0."""
        return next(self._ids)

    def fingerprint(self) -> str:
        """The version of the weights, and which weights they are if nothing trains them."""
        return f"v{self.service.weights_version}{f'-{self.weights}' if self.weights else ''}"

    def prompt(
        self,
        messages: list[Message],
        options: Mapping[str, Any],
        effort: str | None = None,
        continues: bool | None = None,
    ) -> list[int]:
        """The tokens of a conversation that asks for an answer. With `continues`, the last message
        is the beginning of the answer; None: if it is the assistant's.

        Raises `ApiError` if the template refuses the conversation or leaves out a part of it.
        """
        given = {**self._effort(effort), **options}
        if self.system and not any(m["role"] == "system" for m in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            try:
                return self._rendered(messages, given, continues)
            except DataError:
                if not any(m["role"] == "system" for m in messages[1:]):
                    raise
            return self._rendered(fold_system(messages), given, continues)
        except DataError as error:
            words = one_line(str(error))
            raise ApiError(400, "template_refused", words, "messages") from error

    def _rendered(
        self, messages: list[Message], options: Mapping[str, Any], continues: bool | None
    ) -> list[int]:
        if continues or (continues is None and messages[-1]["role"] == "assistant"):
            return render_prefill(self.tokenizer, messages, options)
        return render_prompt(self.tokenizer, messages, options)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """What the template gets of `reasoning_effort`, if it reads it."""
        found: dict[str, Any] = {}
        if effort is not None and reads(self.tokenizer, "reasoning_effort"):
            found["reasoning_effort"] = effort
        if effort == "none" and reads(self.tokenizer, "enable_thinking"):
            found["enable_thinking"] = False
        return found


class Policies:
    """The served models by name; the first one is also called `default`."""

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._by_name: dict[str, Policy] = {}
        for policy in policies:
            self.add(policy)

    def add(self, policy: Policy) -> None:
        """Serve one more model."""
        self._by_name[policy.name] = policy

    def remove(self, name: str) -> None:
        """Serve a model no more."""
        del self._by_name[name]

    def __iter__(self) -> Iterator[Policy]:
        return iter(list(self._by_name.values()))

    def get(self, name: str) -> Policy:
        """Raises `ApiError`: 404 for a name that is not served, 503 where nothing is served yet."""
        if not self._by_name:
            words = "no policy samples now; the run trains a stage that samples nothing"
            again = {"Retry-After": "10", "x-should-retry": "true"}
            raise ApiError(503, "not_ready", words, headers=again)
        if name == "default":
            return next(iter(self._by_name.values()))
        if name not in self._by_name:
            served = ", ".join(self._by_name)
            words = f"the model {one_line(name, 60)} is not served; name one of {served}"
            raise ApiError(404, "model_not_found", words, "model")
        return self._by_name[name]


def fold_system(messages: list[Message]) -> list[Message]:
    """The conversation with all system messages joined into one at its beginning."""
    texts = [m["content"] or "" for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]
