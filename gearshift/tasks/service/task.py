"""Customer service: an agent with tools, a policy, and a customer whose problem must be solved.

The agent calls a tool by writing one line of JSON, whose result comes back with the role `tool`;
anything else goes to the customer, who is scripted. The judge is the shop's database (see
`shop.py`). This file has the task's data.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from gearshift.environments.registry import register
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import write_rows
from gearshift.tasks.service.customers import (
    SYSTEM,
    Row,
    draw_rows,
    expert_turns,
    with_phrasing,
)
from gearshift.tasks.service.desk import PANEL
from gearshift.tasks.service.environment import CustomerServiceEnvironment
from gearshift.tasks.service.words import Words, split_words
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message


class ServiceConfig(TaskConfig):
    """The shop's customers: how many, and what is held out."""

    name: Literal["customer_service"] = "customer_service"
    """The name of the task."""
    labelled: int = Field(default=72, ge=1)
    """How many conversations of an expert there are for supervised fine-tuning."""
    train: int = Field(default=1000, ge=1)
    """How many customers there are for reinforcement learning."""
    validation: int = Field(default=192, ge=1)
    """How many customers there are for validation; their words, items, streets and order numbers
    occur in no other split."""
    test: int = Field(default=192, ge=1)
    """How many customers there are for the test; their words, items, streets and order numbers
    occur in no other split."""
    heldout_fraction: float = Field(default=0.35, gt=0, lt=1)
    """The share of the phrasings, items, streets and order numbers that training does not use; half
    of them are for validation, the other half for the test."""


def converse(row: Row) -> list[Message]:
    """The conversation of an expert with the customer of a row."""
    environment = CustomerServiceEnvironment.of([row])
    _, info = environment.reset(options={"row": 0})
    messages = list(info["messages"])
    for turn in expert_turns(environment.case, environment.script):
        messages.append({"role": "assistant", "content": turn})
        _, _, _, _, info = environment.step(turn)
        messages += info.get("messages", [])
    return messages


def prepare(config: ServiceConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl   messages: an expert's conversations with training customers
    train.jsonl      prompt, order, wish, address, others, script, outcome
    validation.jsonl the same, and phrasing; with words, items, streets and order numbers of its own
    test.jsonl       the same, with a third set of these

    No order is in two files. Raises `DataError` if there are too few order numbers.
    """
    train, validation, test = split_words(
        random.Random(named_seed(seed, "service/words")), config.heldout_fraction
    )
    taken: set[str] = set()

    def take(name: str, words: Words) -> list[Row]:
        rng = random.Random(named_seed(seed, f"service/{name}"))
        return list(islice(draw_rows(words, rng, taken), getattr(config, name)))

    labelled = take("labelled", train)
    files = {
        "labelled": [{"messages": converse(row)} for row in labelled],
        "train": take("train", train),
        "validation": with_phrasing(take("validation", validation)),
        "test": with_phrasing(take("test", test)),
    }
    return write_rows(folder, files)


def make(config: ServiceConfig, path: Path) -> CustomerServiceEnvironment:
    """The environment over the rows of `path`."""
    return CustomerServiceEnvironment(path)


register("gearshift/CustomerService-v0", CustomerServiceEnvironment)
TASK = Task(
    "customer_service",
    ServiceConfig,
    prepare,
    make,
    SYSTEM,
    cluster="phrasing",
    panel=PANEL,
)
