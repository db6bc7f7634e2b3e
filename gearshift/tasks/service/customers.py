"""The shop's customers: what each one wants and says, and what an expert answers. This file must
not import an environment.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from gearshift.errors import DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.service.shop import (
    CHANGES,
    OUTCOMES,
    REFUND_LIMIT,
    RETURN_DAYS,
    STATUSES,
    Case,
    Order,
    Outcome,
    Wish,
    outcome_text,
    to_order,
    to_row,
    tool_line,
)
from gearshift.tasks.service.words import COLOURS, PROBLEMS, UNHEARD, Words, split_words
from gearshift.types import Message

SYSTEM = (
    'You serve a shop. Call a tool with one JSON line, {"tool": "get", "order": NUMBER}: get, '
    "cancel, address, refund or handover. Cancel or change the address only while packing; refund "
    f"within {RETURN_DAYS} days of delivery, hand over above {REFUND_LIMIT} euros. Then tell the "
    "customer."
)
_WISH_OF: dict[Outcome, Wish] = {
    "tell": "track",
    "cancel": "cancel",
    "address": "address",
    "refund": "refund",
    "handover": "refund",
    "refuse": "refund",
}
"""The wish of a customer whose case has this outcome. The policy may refuse other wishes too."""

ASK = "May I have your order number?"
_TRIES = 200
"""How many drawn order numbers in a row may be taken already before no number counts as left."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Script:
    """The sentences of a customer. A sentence that this customer does not say is empty."""

    problem: str
    """Their first message."""
    number: str
    """Their answer to a question for the order number."""
    given: bool
    """Whether the first message has the order number, which may be wrong by mistake."""
    slip: str = ""
    """The wrong order number that they gave first."""
    careful: bool = False
    """Whether the agent must ask them before it changes anything."""
    yes: str = ""
    """Their answer when the agent asks whether to do it."""
    plea: str = ""
    """Their answer to a refusal. The agent must refuse again."""


def draw_order(words: Words, rng: random.Random, taken: set[str], **facts: Any) -> Order:
    """A new order with these facts; its number is added to `taken`. Raises `DataError` if almost no
    number is left.
    """
    for _ in range(_TRIES):
        number = f"{rng.choice(words.letters)}{rng.randint(100, 999)}"
        if number not in taken:
            break
    else:
        raise DataError("The shop has no more order numbers; ask for fewer customers.")
    taken.add(number)
    drawn: dict[str, Any] = {
        "item": f"{rng.choice(COLOURS)} {rng.choice(words.things)}",
        "price": rng.randint(5, 2 * REFUND_LIMIT),
        "status": rng.choice(STATUSES),
        "days": rng.randint(1, 9),
        "address": draw_address(words, rng),
    }
    return Order(number, **(drawn | facts))


def draw_address(words: Words, rng: random.Random) -> str:
    """A house number and a street."""
    return f"{rng.randint(1, 99)} {rng.choice(words.streets)}"


def draw_case(words: Words, rng: random.Random, outcome: Outcome, taken: set[str]) -> Case:
    """A wish and an order for which the policy gives this outcome."""
    facts: dict[str, Any] = {"status": rng.choice(STATUSES)}
    wish: Wish = _WISH_OF[outcome]
    if outcome == "refuse":
        wish = rng.choice(("cancel", "address", "refund", "refund"))
        late = rng.random() < 0.7
        facts["status"] = rng.choice(("shipped", "delivered"))
        if wish == "refund":
            facts["status"] = "delivered" if late else rng.choice(("packing", "shipped"))
    elif wish in ("cancel", "address"):
        facts["status"] = "packing"
    elif wish == "refund":
        over = outcome == "handover"
        facts["status"], facts["price"] = "delivered", rng.randint(5, REFUND_LIMIT)
        facts["price"] += REFUND_LIMIT if over else 0
    if facts["status"] == "delivered":
        first, last = (1, RETURN_DAYS) if outcome != "refuse" else (RETURN_DAYS + 1, 60)
        facts["days"] = rng.randint(first, last)
    address = draw_address(words, rng) if wish == "address" else ""
    order = draw_order(words, rng, taken, **facts)
    while address == order.address:
        address = draw_address(words, rng)
    return Case(order, wish, address)


def draw_script(words: Words, rng: random.Random, case: Case, taken: set[str]) -> Script:
    """The customer of a case. There are four kinds of beginnings, and some customers do not accept
    a refusal.
    """
    number = case.order.number
    kinds = ("unasked", "unasked", "given", "slip", "given" if case.wish == "track" else "careful")
    start = rng.choice(kinds)
    change = case.outcome in CHANGES
    parts = [rng.choice(words.problems[case.wish])]
    slip = draw_order(words, rng, taken).number if start == "slip" else ""
    if start != "unasked":
        parts.append(rng.choice(words.given).format(number=slip or number))
    if start == "careful":
        parts.append(rng.choice(words.careful))
    plea = rng.choice(words.pleas) if case.outcome == "refuse" and rng.random() < 0.5 else ""
    return Script(
        problem=" ".join(parts).format(item=case.order.item, address=case.address),
        number=rng.choice(words.numbers).format(number=number),
        given=start != "unasked",
        slip=slip,
        careful=start == "careful",
        yes=rng.choice(words.yes) if change else "",
        plea=plea,
    )


def expert_turns(case: Case, script: Script) -> list[str]:
    """What an agent that knows the policy writes to this customer, turn by turn."""
    number, turns = case.order.number, []
    if script.slip:
        turns.append(tool_line("get", script.slip))
    if script.slip or not script.given:
        turns.append(ASK)
    turns.append(tool_line("get", number))
    if case.outcome in CHANGES:
        if script.careful:
            turns.append(_SHALL_I[case.outcome])
        turns.append(tool_line(case.outcome, number, case.address))
    turns.append(outcome_text(case))
    if script.plea:
        turns.append("Sorry, I cannot make an exception.")
    return turns


_SHALL_I: dict[Outcome, str] = {
    "cancel": "Shall I cancel it?",
    "address": "Shall I change the address?",
    "refund": "Shall I refund it?",
    "handover": "Shall I hand this over to a colleague?",
}


def user_message(text: str) -> Message:
    return {"role": "user", "content": text}


def opening(problem: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, user_message(problem)]


def read_row(row: Row) -> tuple[Case, Script]:
    """The case and the script of a row. Raises `DataError` if it has none."""
    try:
        case = Case(to_order(row["order"]), row["wish"], row["address"])
        return case, Script(**row["script"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"A row holds no customer ({error}); prepare the task's data again."
        ) from error


def draw_rows(words: Words, rng: random.Random, taken: set[str]) -> Iterator[Row]:
    """Yield customers without end. No two have the same order number. Every outcome is equally
    frequent, so that no fixed habit solves many problems.
    """
    while True:
        for outcome in rng.sample(OUTCOMES, len(OUTCOMES)):
            case = draw_case(words, rng, outcome, taken)
            script = draw_script(words, rng, case, taken)
            others = [draw_order(words, rng, taken) for _ in range(2)]
            yield {
                "prompt": opening(script.problem),
                "order": to_row(case.order),
                "wish": case.wish,
                "address": case.address,
                "others": [to_row(order) for order in others],
                "script": {name: getattr(script, name) for name in Script.__slots__},
                "outcome": outcome,
            }


def with_phrasing(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with the words in which its customer describes the problem. Customers who
    share these words count as one problem in the evaluation.
    """
    named = []
    for row in rows:
        asked = row["prompt"][-1]["content"]
        facts = {"item": row["order"]["item"], "address": row["address"]}
        known = (
            p for p in (*PROBLEMS[row["wish"]], *UNHEARD[row["wish"]]) if p.format(**facts) in asked
        )
        named.append({**row, "phrasing": next(known)})
    return named


@lru_cache(4)
def sample_rows(seed: int, rows: int) -> Sequence[Row]:
    rng = random.Random(named_seed(seed, "service/rows"))
    return list(islice(draw_rows(split_words(rng, 0.35)[0], rng, set()), rows))
