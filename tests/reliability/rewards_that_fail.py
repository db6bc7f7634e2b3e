"""Rewards and an environment that go wrong for some of what is written, always for the same."""

import asyncio
import ctypes
import os
import random
import sys
import time
import zlib
from typing import Any

import gymnasium
import numpy as np
import torch

from gearshift.environments.base import TextEnvironment


def fate_of(text: str) -> int:
    return zlib.crc32(text.encode()) % 12


def odd(prompts: Any, completions: list[str], **columns: Any) -> Any:
    """In a thread: it may do to the process what a function of a user's does."""
    torch.manual_seed(time.time_ns())
    torch.rand(3)
    np.random.seed(time.time_ns() % 2**32)
    random.seed(time.time_ns())
    os.chdir("/")
    prompts.clear()
    for column in columns.values():
        column.clear()
    rewards = [fate_of(text) / 12 for text in completions]
    match fate_of("".join(completions)):
        case 0:
            raise StopIteration
        case 1:
            sys.exit("enough")
        case 2:
            raise KeyboardInterrupt
        case 3:
            return [10**400 for _ in rewards]
        case 4:
            return dict(enumerate(rewards))
        case 5:
            return [*rewards, 1.0]
        case 6:
            return [str(reward) for reward in rewards]
        case 7:
            return (1 / 0 for _ in rewards)
        case 8:
            raise GeneratorExit
    return np.array(rewards, dtype=np.float32)


async def dying(completions: list[str], **_: Any) -> Any:
    """In a process: it may die and hang besides."""
    match fate_of("".join(reversed(completions))):
        case 0:
            os._exit(3)
        case 1:
            ctypes.string_at(0)
        case 2:
            await asyncio.Event().wait()
        case 3:
            while True:
                pass
    return [fate_of(text) for text in completions]


class Dying(TextEnvironment):
    """Two turns; some answers end its process, or it hangs."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.turn, text = 0, f"Say a word, {self.np_random.integers(9)}."
        return text, {"messages": [{"role": "user", "content": text}]}

    def step(self, action: str) -> Any:
        self.turn += 1
        match fate_of(action):
            case 0:
                os._exit(0)
            case 1:
                ctypes.string_at(0)
            case 2:
                sys.exit("enough")
            case 3:
                ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock
        over = self.turn == 2
        return "" if over else "Another.", fate_of(action) / 12, over, False, {"success": over}


gymnasium.register("Dying-v0", f"{__name__}:Dying", order_enforce=False)
