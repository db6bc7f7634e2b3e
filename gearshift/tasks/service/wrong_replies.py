"""Wrong replies to a shop's customer, for the pairs that a reward model learns from."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from gearshift.tasks.service.reply_judge import Row, judge
from gearshift.tasks.service.shop import (
    OUTCOMES,
    RETURN_DAYS,
    STATUSES,
    Case,
    numbers,
    outcome_text,
    to_order,
)
from gearshift.types import Message

Talk = tuple[str, str]
"""A remark and its reply."""


def make_pairs(
    rows: Sequence[Row],
    talk: Sequence[Talk],
    remark: Callable[[str], list[Message]],
    rng: random.Random,
) -> list[Row]:
    """A pair of a right and a wrong reply for each customer and for each remark. `remark` makes a
    prompt of a remark.
    """
    pairs: list[Row] = []
    replies = [row["reply"] for row in rows] + [reply for _, reply in talk]
    for row in rows:
        case = Case(to_order(row["order"]), row["wish"], row["address"])
        wrong = row["reply"]
        while judge(wrong, case) == 1.0:
            wrong = rng.choice(_MISTAKES)(case, replies, rng)
        pairs.append({"prompt": row["prompt"], "chosen": row["reply"], "rejected": wrong})
    for said, reply in talk:
        wrong = reply
        while wrong == reply:
            wrong = rng.choice((_other, _cut, _twice, _rude))(reply, replies, rng)
        pairs.append({"prompt": remark(said), "chosen": reply, "rejected": wrong})
    rng.shuffle(pairs)
    return pairs


def _other(reply: str, replies: Sequence[str], rng: random.Random) -> str:
    return rng.choice(replies)


def _cut(reply: str, replies: Sequence[str], rng: random.Random) -> str:
    words = reply.rstrip(".!?").split()
    return " ".join(words[: rng.randint(1, max(1, len(words) - 1))])


def _twice(reply: str, replies: Sequence[str], rng: random.Random) -> str:
    return f"{reply} {reply}"


def _rude(reply: str, replies: Sequence[str], rng: random.Random) -> str:
    jibes = ("Not my problem.", "Whatever.", "Go away.", "What a stupid question.")
    return rng.choice((rng.choice(jibes), f"{rng.choice(jibes)} {reply}"))


def _other_outcome(case: Case, replies: Sequence[str], rng: random.Random) -> str:
    """A reply for another outcome, or for the same outcome of an order in another state, with the
    order's facts. Each outcome is wrong as often as it is right, so a judge must read the order.
    """
    outcome = rng.choice(OUTCOMES)
    status = rng.choice(STATUSES) if outcome == case.outcome else case.order.status
    seen = replace(
        case,
        order=replace(case.order, status=status),
        address=case.address or case.order.address,
    )
    return outcome_text(seen, outcome)


def _blended(case: Case, replies: Sequence[str], rng: random.Random) -> str:
    """The beginning of one outcome's reply and the end of another's, as half-trained policies
    write.
    """
    first, last = (_other_outcome(case, replies, rng).split() for _ in range(2))
    return " ".join([*first[: rng.randint(3, len(first))], *last[rng.randint(3, len(last)) - 1 :]])


def _made_up(case: Case, replies: Sequence[str], rng: random.Random) -> str:
    """The reply with a fact that the order does not have."""
    text = outcome_text(case)
    known = sorted(numbers(text) - {RETURN_DAYS})
    if not known:
        return f"{text} It has cost you {case.order.price + rng.randint(1, 40)} euros."
    wrong = max(1, known[0] + rng.choice((-9, -5, -3, -1, 1, 2, 4, 10)))
    return re.sub(rf"\b{known[0]}\b", str(wrong), text)


def _of_text(
    spoil: Callable[[str, Sequence[str], random.Random], str],
) -> Callable[[Case, Sequence[str], random.Random], str]:
    return lambda case, replies, rng: spoil(outcome_text(case), replies, rng)


# A mistake that finds nothing to spoil returns the right reply.
_MISTAKES: tuple[Callable[[Case, Sequence[str], random.Random], str], ...] = (
    _other_outcome, _other_outcome, _other_outcome, _other_outcome, _other_outcome,
    _blended, _blended, _made_up,
    _of_text(_other), _of_text(_cut), _of_text(_twice), _of_text(_rude),
)  # fmt: skip
