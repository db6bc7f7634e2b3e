"""Rewards that misbehave: `slow` answers when it likes, and hangs once where a file asks it to;
`dying` ends its process, raises or gives no number for some completions, always for the same ones.
"""

import ctypes
import os
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any


def slow(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """The share of letters in a completion, after a moment that nobody can foresee."""
    time.sleep(random.SystemRandom().random() / 200)
    trigger = Path(__file__).with_name("hang")
    if trigger.exists():
        trigger.unlink()
        while True:
            time.sleep(3600)
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]


def dying(prompts: list[Any], completions: list[str], **_: Any) -> list[Any]:
    """A reward for most; the fate of the others is a function of what was written."""
    rewards: list[Any] = []
    for text in completions:
        fate = zlib.crc32(text.encode()) % 60
        if fate == 0:
            os._exit(3)
        if fate == 1:
            ctypes.string_at(0)
        if fate == 2:
            sys.exit("enough")
        if fate == 3:
            raise StopIteration
        rewards.append({4: 10**400, 5: float("nan"), 6: None}.get(fate, fate / 60))
    return rewards
