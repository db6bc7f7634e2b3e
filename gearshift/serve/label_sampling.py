"""Samples answers ahead of the people who compare them. A sampling that fails skips its prompt and
is counted. It knows no engine: the caller hands over what samples.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

from gearshift.data.formats import PromptExample
from gearshift.data.labels import Item
from gearshift.runtime.terminal import one_line
from gearshift.serve.label_items import Answer, Source, make_item

Sampler = Callable[[PromptExample], Awaitable[Sequence[tuple[Answer, Source]]]]
"""Gives one or two answers to a prompt, each with where it comes from."""
TIMEOUT = 300.0
_AHEAD, _FAILURES = 8, 3


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
