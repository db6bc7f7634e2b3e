"""A task of your own: its data, its environment, and its name for recipes of this program."""

import random
from pathlib import Path
from typing import Literal

from gearshift import RowEnvironment, Task, TaskConfig, read_rows, train_rl, write_rows


class SumsConfig(TaskConfig):
    name: Literal["sums"] = "sums"
    largest: int = 9
    """The largest number of a sum."""


def prepare(config: SumsConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the rows of each split; no problem stands in two of them."""
    numbers = range(1, config.largest + 1)
    sums = [(a, b) for a in numbers for b in numbers if a <= b]
    random.Random(seed).shuffle(sums)
    rows = [{"prompt": f"{a} + {b} = ?", "answer": str(a + b)} for a, b in sums]
    return write_rows(folder, {"validation": rows[:8], "test": rows[8:16], "train": rows[16:]})


def exact(prompts, completions, answer, **columns):
    return [float(text.strip() == right) for text, right in zip(completions, answer)]


def make(config: SumsConfig, path: Path) -> RowEnvironment:
    """An environment over the rows of one split."""
    return RowEnvironment(read_rows(path), exact)


task = Task("sums", SumsConfig, prepare, make, metric="reward")
sizes = {"prompts": 8, "group_size": 4, "max_new_tokens": 8}
result = train_rl("embedded", task=task, largest=12, steps=2, rollout=sizes, output="runs/sums")
print({policy: figures["reward"] for policy, figures in result.heldout.items()})
