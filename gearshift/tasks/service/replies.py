"""Customer service in one answer: an order, a question, and a reply that must be right and polite.

Besides the shop's own questions there are real dialogues (chatterbot-corpus), for supervised tuning
and for the reward model's pairs. The judge of the shop's replies is a function (`reply_judge.py`),
not a model, so that a reward model's mistakes show.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.service.customers import Row, draw_case, with_phrasing
from gearshift.tasks.service.reply_judge import has_manners, reply_reward
from gearshift.tasks.service.shop import (
    OUTCOMES,
    REFUND_LIMIT,
    RETURN_DAYS,
    Case,
    outcome_text,
    states_facts,
    to_order,
    to_row,
)
from gearshift.tasks.service.words import Words, split_words
from gearshift.tasks.service.wrong_replies import Talk, make_pairs
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

SYSTEM = (
    "Answer the shop's customer politely, with what the order says. "
    "Orders are cancelled or change address only while packing. "
    f"Refunds: within {RETURN_DAYS} days after delivery; over {REFUND_LIMIT} euros a colleague "
    "decides."
)
TOPICS = (
    "ai", "botprofile", "computers", "conversations", "emotion", "food", "greetings", "health",
    "history", "humor",
    "literature", "money", "movies", "science", "sports", "tech_support", "trivia",
)  # fmt: skip
"""The corpus's files whose content suits a shop."""
_COLUMNS = ("order", "wish", "address")


class RepliesConfig(TaskConfig):
    """The one-answer customer service: how much of what, and what is held out."""

    name: Literal["customer_replies"] = "customer_replies"
    """The name of the task."""
    labelled: int = Field(default=32, ge=1)
    """How many right replies to customers there are for supervised fine-tuning."""
    dialogues: int = Field(default=96, ge=0)
    """How many real remarks with their replies there are for supervised fine-tuning."""
    train: int = Field(default=6000, ge=1)
    """How many customers without a reply there are for reinforcement learning."""
    validation: int = Field(default=256, ge=1)
    """How many customers there are for validation; their words, items, streets and order numbers
    occur in no other split."""
    test: int = Field(default=256, ge=1)
    """How many customers there are for the test; their words, items, streets and order numbers
    occur in no other split."""
    pairs: int = Field(default=6000, ge=1)
    """How many pairs of a right and a wrong reply to a training customer there are for the reward
    model."""
    talk_pairs: int = Field(default=250, ge=0)
    """How many pairs of a real reply and a wrong one there are for the reward model."""
    pairs_heldout: int = Field(default=200, ge=1)
    """How many pairs measure the reward model. A fifth of them are from real dialogues that it did
    not learn from; the others are from further customers, who use the words of validation."""
    heldout_fraction: float = Field(default=0.35, gt=0, lt=1)
    """The share of the phrasings, items, streets, order numbers and dialogues that training does
    not use. Half of these phrasings, items, streets and order numbers are for validation, the other
    half for the test."""


class CustomerRepliesEnvironment(RowEnvironment):
    """One customer, one reply. Solved: the judge gives 1."""

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 256) -> None:
        """Use the customers of a JSONL file, or `rows` customers that `seed` draws. Raises
        `DataError` if the file is missing or holds no customers.
        """
        super().__init__(
            _drawn(seed, rows) if path is None else read_rows(path, *_COLUMNS), reply_reward
        )

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        case = Case(to_order(row["order"]), row["wish"], row["address"])
        return {
            "success": reward == 1.0,
            "gold": outcome_text(case),
            "metrics": {
                "facts": float(states_facts(action, case)),
                "manners": float(has_manners(action)),
            },
        }


def dialogues() -> list[Talk]:
    """The corpus's remarks with the first reply to each, in its order. Raises `DataError` if the
    package is missing.
    """
    try:
        package = importlib.metadata.distribution("chatterbot-corpus")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "The real dialogues need a package; run: pip install 'gearshift[service]'"
        ) from error
    found: dict[str, str] = {}
    for topic in TOPICS:
        path = Path(str(package.locate_file(f"chatterbot_corpus/data/english/{topic}.yml")))
        for said in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            remark, reply = (" ".join(str(s).split()) for s in said[:2])
            if len(remark) <= 120 and 8 <= len(reply) <= 160:
                found.setdefault(remark, reply)
    return list(found.items())


def prompt_of(case: Case, question: str) -> list[Message]:
    """The order as the shop sees it, and what the customer says."""
    said = f"Order {case.order.number}: {case.order}.\n{question}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]


def draw_customers(words: Words, rng: random.Random, taken: set[str]) -> Iterator[Row]:
    """Yield customers without end. Every outcome is equally frequent."""
    while True:
        for outcome in OUTCOMES:
            case = draw_case(words, rng, outcome, taken)
            question = rng.choice(words.problems[case.wish])
            question = question.format(item=case.order.item, address=case.address)
            yield {
                "prompt": prompt_of(case, question),
                "order": to_row(case.order),
                "wish": case.wish,
                "address": case.address,
                "outcome": outcome,
                "reply": outcome_text(case),
            }


def prepare(config: RepliesConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages: right replies to customers, and real dialogues
    train.jsonl           prompt, order, wish, address, outcome, reply
    validation.jsonl      the same, and phrasing; with its own words, items, streets and numbers
    test.jsonl            the same as validation, with a third set of these
    pairs.jsonl           prompt, chosen, rejected: customers of train, and real dialogues
    pairs_heldout.jsonl   the same, of validation's words and held-out dialogues

    No order is in two files, except that pairs use train's customers. Raises `DataError` if
    there is less than is asked for.
    """

    def rng(name: str) -> random.Random:
        return random.Random(named_seed(seed, f"replies/{name}"))

    known, validation, test = split_words(rng("words"), config.heldout_fraction)
    taken: set[str] = set()
    talk = dialogues()
    rng("dialogues").shuffle(talk)
    cut = round(config.heldout_fraction * len(talk))
    heard, unheard = talk[cut:], talk[:cut]
    wanted = max(config.dialogues, config.talk_pairs)
    if len(heard) < wanted:
        raise DataError(f"There are {len(heard)} dialogues for {wanted}; ask for fewer.")

    def take(name: str, words: Words, count: int) -> list[Row]:
        return list(islice(draw_customers(words, rng(name), taken), count))

    labelled, train = take("labelled", known, config.labelled), take("train", known, config.train)
    if config.pairs > len(train):
        raise DataError(f"pairs={config.pairs} need as many customers as that; raise train.")
    fifth = config.pairs_heldout // 5
    strangers = take("pairs_heldout", validation, config.pairs_heldout - fifth)
    answered = [(row["prompt"], row["reply"]) for row in labelled]
    answered += [(_remark(said), reply) for said, reply in heard[: config.dialogues]]
    files: dict[str, list[Row]] = {
        "labelled": [
            {"messages": [*prompt, {"role": "assistant", "content": reply}]}
            for prompt, reply in answered
        ],
        "train": train,
        "validation": with_phrasing(take("validation", validation, config.validation)),
        "test": with_phrasing(take("test", test, config.test)),
        "pairs": make_pairs(
            train[: config.pairs], heard[: config.talk_pairs], _remark, rng("pairs/wrong")
        ),
        "pairs_heldout": make_pairs(
            strangers, unheard[:fifth], _remark, rng("pairs_heldout/wrong")
        ),
    }
    return write_rows(folder, files)


def _remark(said: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]


@lru_cache(4)
def _drawn(seed: int, rows: int) -> Sequence[Row]:
    rng = random.Random(named_seed(seed, "replies/rows"))
    return list(islice(draw_customers(split_words(rng, 0.35)[0], rng, set()), rows))


def make(config: RepliesConfig, path: Path) -> CustomerRepliesEnvironment:
    """The environment over the rows of `path`."""
    return CustomerRepliesEnvironment(path)


register("gearshift/CustomerReplies-v0", CustomerRepliesEnvironment)
TASK = Task(
    "customer_replies",
    RepliesConfig,
    prepare,
    make,
    SYSTEM,
    cluster="phrasing",
)
