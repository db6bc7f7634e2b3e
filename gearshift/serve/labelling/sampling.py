"""Samples answers ahead of the people who compare them. A sampling that fails skips its prompt and
is counted. It loads no model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

from gearshift.data.formats import PromptExample
from gearshift.data.labels import Item, item_id
from gearshift.data.text import decode
from gearshift.runtime.terminal import one_line
from gearshift.serve.labelling.items import Answer, Source, make_item
from gearshift.serve.policies import Policy
from gearshift.types import SamplingParams

Sampler = Callable[[PromptExample], Awaitable[Sequence[tuple[Answer, Source]]]]
"""Gives one or two answers to a prompt, each with where it comes from."""
TIMEOUT = 300.0
_AHEAD, _FAILURES = 8, 3


def policy_sampler(
    policies: Sequence[tuple[Policy, str]], count: int, p: SamplingParams
) -> Sampler:
    """A sampler that takes `count` answers of each policy. Each policy comes with the name that its
    labels keep.
    """

    async def sample(prompt: PromptExample) -> list[tuple[Answer, Source]]:
        # The same prompt gets the same answers, whenever it is asked.
        request = int(item_id(prompt.prompt, [], prompt.options), 16) >> 1
        asked = [(policy, name, i) for policy, name in policies for i in range(count)]
        return list(await asyncio.gather(*(one(prompt, request, *each) for each in asked)))

    async def one(
        prompt: PromptExample, request: int, policy: Policy, name: str, i: int
    ) -> tuple[Answer, Source]:
        ids = policy.prompt(prompt.prompt, prompt.options)
        params = replace(p, max_new_tokens=min(p.max_new_tokens, policy.service.max_length // 2))
        completion = await policy.service.generate(ids, params, request, i)
        text = decode(policy.tokenizer, completion.token_ids, skip_special_tokens=True)
        if not text.strip():
            raise ValueError("an answer has no words")
        sampling = {"temperature": p.temperature, "max_new_tokens": params.max_new_tokens}
        source = {"model": name, "weights_sha": policy.weights, "sampling": sampling}
        version = completion.weights_versions[-1]
        return text, {**source, "version": version, "request_id": request, "sample": i}

    return sample


class Feeder:
    """Turns prompts into items while fewer than a few items wait for people."""

    def __init__(
        self,
        prompts: Iterable[PromptExample],
        sampler: Sampler | None,
        add: Callable[[Item], Awaitable[bool]],
        timeout: float = TIMEOUT,
    ) -> None:
        """`add` stores an item; it returns False for one that is there. `timeout`: how many seconds
        one sampling may take.
        """
        self._prompts, self._sampler, self._add = deque(prompts), sampler, add
        self._timeout = timeout
        self._task: asyncio.Task[None] | None = None
        self.failed, self.same, self.reason = 0, 0, ""

    @property
    def more(self) -> bool:
        """Whether items may still come."""
        return bool(self._sampler and (self._prompts or (self._task and not self._task.done())))

    def wake(self, waiting: Callable[[], Awaitable[int]]) -> None:
        """Begin to sample, unless that goes on already. `waiting`: how many items nobody has yet.

        After a few failures in a row it rests until the next call, so that a server that is away
        for a moment does not cost all prompts.
        """
        if self._prompts and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._fill(waiting))

    async def _fill(self, waiting: Callable[[], Awaitable[int]]) -> None:
        in_a_row = 0
        while self._prompts and in_a_row < _FAILURES and await waiting() < _AHEAD:
            in_a_row = 0 if await self._next(self._prompts.popleft()) else in_a_row + 1

    async def _next(self, prompt: PromptExample) -> bool:
        """Sample one prompt; False if that failed."""
        assert self._sampler is not None
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._sampler(prompt)
            answers, sources = [a for a, _ in found], [s for _, s in found]
            if len(answers) == 2 and answers[0] == answers[1]:
                self.same += 1  # nobody can prefer one of two equal answers
                return True
            await self._add(make_item(prompt.prompt, answers, sources, prompt.options))
        except Exception as error:  # a sampler's errors are of any kind
            self.failed += 1
            self.reason = one_line(str(error) or type(error).__name__, 200)
            return False
        return True
