"""Customer service: an agent with tools, a policy, and a customer whose problem must be solved.

The agent calls a tool by writing one line of JSON, whose result comes back with the role `tool`;
anything else goes to the customer, who is scripted. The judge is the shop's database (see
`service_shop`). A room of its own because the conversation and its data stand here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import gymnasium
from pydantic import Field

from gearshift.environments.base import TextEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.service.shop import (
    CHANGES,
    OUTCOMES,
    REFUND_LIMIT,
    RETURN_DAYS,
    STATUSES,
    Case,
    Order,
    Outcome,
    Shop,
    Wish,
    outcome_text,
    refuses,
    tells,
    to_order,
    to_row,
    tool_line,
)
from gearshift.tasks.service.words import (
    COLOURS,
    PROBLEMS,
    UNHEARD,
    Words,
    split_words,
)
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

SYSTEM = (
    'You serve a shop. Call a tool with one JSON line, {"tool": "get", "order": NUMBER}: get, '
    "cancel, address, refund or handover. Cancel or change the address only while packing; refund "
    f"within {RETURN_DAYS} days of delivery, hand over above {REFUND_LIMIT} euros. Then tell the "
    "customer."
)
TURNS = 6
"""What an agent may write in an episode."""

_WISH_OF: dict[Outcome, Wish] = {
    "tell": "track",
    "cancel": "cancel",
    "address": "address",
    "refund": "refund",
    "handover": "refund",
    "refuse": "refund",
}
"""What a customer wishes where the policy makes this of it; it may refuse other wishes too."""

ASK = "May I have your order number?"
LOOKUP, ACT, TOLD = 0.1, 0.2, 0.7
"""Rewards: the customer's order was looked up; it is as the policy wants it; the customer was told.
They add up to 1, and only a solved problem gets them all."""
WASTE, HARM = -0.05, -0.2
"""Rewards: a turn that helped nobody; a change that the policy or the customer forbids, or a last
word that is not true."""

# How often an order number may be taken before they count as used up.
_TRIES = 200

Row = dict[str, Any]
_COLUMNS = ("order", "wish", "address", "others", "script")


class ServiceConfig(TaskConfig):
    """The shop's customers: how many, and what is held out."""

    name: Literal["customer_service"] = "customer_service"
    """Which task this is."""
    labelled: int = Field(72, ge=1)
    """Conversations of an expert, for supervised fine-tuning."""
    train: int = Field(1000, ge=1)
    """Customers for reinforcement learning."""
    validation: int = Field(192, ge=1)
    """Customers with words, items, streets and order numbers of their own."""
    test: int = Field(192, ge=1)
    """The same, with others again."""
    heldout_fraction: float = Field(0.35, gt=0, lt=1)
    """Share of phrasings, items, streets and order numbers that training never sees: half of them
    are for validation, half for the test."""


# Customers


@dataclass(frozen=True, slots=True)
class Script:
    """What a customer will say. An empty line is a thing that this one does not say."""

    problem: str
    """Their first message."""
    number: str
    """The answer to who asks for the order number."""
    given: bool
    """The first message has the order number, right or (a slip) wrong."""
    slip: str = ""
    """The wrong order number that they gave first."""
    careful: bool = False
    """They want to be asked before anything is changed."""
    yes: str = ""
    """The answer to who asks whether to do it."""
    plea: str = ""
    """What they say to a refusal; it must be refused again."""


def draw_order(words: Words, rng: random.Random, taken: set[str], **facts: Any) -> Order:
    """A new order with these facts; its number goes to `taken`. Raises `DataError` if hardly one
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
    """A wish of which the policy makes this."""
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
    """The customer of a case: four kinds of beginnings, and who refuses to take no."""
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
_ASKS_NUMBER = re.compile(r"\bnumber\b.*\?|\border (id|code)\b.*\?", re.I | re.S)
_ASKS_LEAVE = re.compile(
    r"\b(shall|should|may|can|could) (i|we)\b.*\?|\b(want|like) me\b.*\?", re.I
)


# The environment


class CustomerServiceEnvironment(TextEnvironment):
    """A customer, a shop's tools, and `TURNS` turns. Each row is one customer with one problem.

    An episode ends when the customer has been told something final, when something forbidden was
    done, or after the last turn. Solved: the database is as the policy wants it, the order was
    looked up, and the customer knows the outcome. Rewards: see `LOOKUP` and what follows it.
    """

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 256) -> None:
        """Over the customers of a JSONL file, or over `rows` customers that `seed` draws.

        Raises `DataError` if the file is missing or holds no customers.
        """
        super().__init__()
        self.rows = _drawn(seed, rows) if path is None else read_rows(path, *_COLUMNS)
        self._running = False

    @classmethod
    def of(cls, rows: Sequence[Row]) -> CustomerServiceEnvironment:
        """Over these customers."""
        environment = cls(rows=1)
        environment.rows = rows
        return environment

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = self.choose(options, len(self.rows))
        row = self.rows[index]
        self.case, self.script = read_row(row)
        others = map(to_order, row["others"])
        self.shop = Shop({o.number: o for o in (self.case.order, *others)})
        self._goal = {**self.shop.orders, self.case.order.number: self.case.goal}
        self._running, self._turn, self._patient = True, 0, True
        self._found = self._allowed = self._refused = False
        self.errors = 0
        return self.script.problem, {"messages": _prompt(self.script.problem), "row": index}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the episode is over or has not begun."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._turn += 1
        answer, reward = self._tool(action) if _is_call(action) else self._customer(action)
        success = reward >= TOLD
        over = answer is None
        cut = not over and self._turn >= TURNS
        self._running = not (over or cut)
        info: dict[str, Any] = {"success": success, "gold": outcome_text(self.case)}
        if over or cut:
            info["metrics"] = {
                "turns": float(self._turn),
                "database": float(self.shop.orders == self._goal),
                "tool_errors": float(self.errors),
            }
        if answer is not None:
            info["messages"] = [answer]
        return answer["content"] if answer else "", reward, over, cut, info

    def _tool(self, line: str) -> tuple[Message | None, float]:
        """A tool's answer, and its reward; no answer ends the episode."""
        before = self.shop.orders[self.case.order.number]
        called = self.shop.call(line)
        answer: Message = {"role": "tool", "content": called.answer}
        if called.order is None:
            self.errors += 1
            # The customer's slip is found out by asking the tool: no fault of the agent's.
            slipped = self.script.slip and f'"{self.script.slip}"' in line and self.errors == 1
            return answer, 0.0 if slipped else WASTE
        if called.did is None:
            first = called.order == self.case.order.number and not self._found
            self._found = self._found or first
            return answer, LOOKUP if first else WASTE
        asked = self._allowed or not self.script.careful
        if not (asked and self.shop.orders == self._goal and before != self.case.goal):
            return None, HARM
        return answer, ACT

    def _customer(self, text: str) -> tuple[Message | None, float]:
        """What the customer says to it, and its reward; nothing ends the episode."""
        script = self.script
        if _ASKS_NUMBER.search(text):
            told = script.given and not (script.slip and self.errors)
            return _user(script.number), WASTE if told else 0.0
        if script.yes and _ASKS_LEAVE.search(text) and "help" not in text:
            wanted = script.careful and not self._allowed
            self._allowed = True
            return _user(script.yes), 0.0 if wanted else WASTE
        if not self._found and self._patient:
            self._patient = False
            return _user(script.problem), WASTE
        if self._refused:
            return None, self._final if refuses(text) else HARM
        if not (self._found and self.shop.orders == self._goal and tells(text, self.case)):
            return None, HARM
        if script.plea:
            self._refused = True
            return _user(script.plea), 0.0
        return None, self._final

    @property
    def _final(self) -> float:
        """For the customer who knows; where nothing was to be changed, for that too."""
        return TOLD if self.case.outcome in CHANGES else ACT + TOLD


def _is_call(text: str) -> bool:
    return text.lstrip().startswith("{") or '"tool"' in text


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _prompt(problem: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, _user(problem)]


# The data


def read_row(row: Row) -> tuple[Case, Script]:
    """What a row says. Raises `DataError` if it says something else."""
    try:
        case = Case(to_order(row["order"]), row["wish"], row["address"])
        return case, Script(**row["script"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"A row holds no customer ({error}); prepare the task's data anew."
        ) from error


def draw_rows(words: Words, rng: random.Random, taken: set[str]) -> Iterator[Row]:
    """Customers without end, no two with one order number; every outcome equally often, so that no
    habit solves many problems.
    """
    while True:
        for outcome in rng.sample(OUTCOMES, len(OUTCOMES)):
            case = draw_case(words, rng, outcome, taken)
            script = draw_script(words, rng, case, taken)
            others = [draw_order(words, rng, taken) for _ in range(2)]
            yield {
                "prompt": _prompt(script.problem),
                "order": to_row(case.order),
                "wish": case.wish,
                "address": case.address,
                "others": [to_row(order) for order in others],
                "script": {name: getattr(script, name) for name in Script.__slots__},
                "outcome": outcome,
            }


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
    test.jsonl       the same, with others again

    No order stands in two files. Raises `DataError` if there are too few order numbers.
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


def with_phrasing(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with the words that its problem is told in: customers who share them are one
    problem of the evaluation.
    """
    named = []
    for row in rows:
        asked = row["prompt"][-1]["content"]
        facts = {"item": row["order"]["item"], "address": row["address"]}
        told = (
            p for p in (*PROBLEMS[row["wish"]], *UNHEARD[row["wish"]]) if p.format(**facts) in asked
        )
        named.append({**row, "phrasing": next(told)})
    return named


@lru_cache(4)
def _drawn(seed: int, rows: int) -> Sequence[Row]:
    rng = random.Random(named_seed(seed, "service/rows"))
    return list(islice(draw_rows(split_words(rng, 0.35)[0], rng, set()), rows))


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
)
