"""The conversation with a customer: the shop's tools, the customer's answers, and the rewards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.tasks.rows import read_rows
from gearshift.tasks.service.customers import Row, opening, read_row, sample_rows, user_message
from gearshift.tasks.service.shop import (
    CHANGES,
    Shop,
    outcome_text,
    refuses,
    states_facts,
    to_order,
)
from gearshift.types import Message

TURNS = 6
"""How many messages the policy may write in an episode."""
LOOKUP, ACT, TOLD = 0.1, 0.2, 0.7
"""Rewards: the agent looked up the order; the order is as the policy wants it; the customer knows
the outcome. They add up to 1, and only a solved problem gets them all.
"""
WASTE, HARM = -0.05, -0.2
"""Negative rewards: a turn that does not help; a change that the policy or the customer forbids, or
a last message that is not true.
"""

_COLUMNS = ("order", "wish", "address", "others", "script")
_ASKS_NUMBER = re.compile(r"\bnumber\b.*\?|\border (id|code)\b.*\?", re.I | re.S)
_ASKS_LEAVE = re.compile(
    r"\b(shall|should|may|can|could) (i|we)\b.*\?|\b(want|like) me\b.*\?", re.I
)


class CustomerServiceEnvironment(TextEnvironment):
    """A customer, a shop's tools, and `TURNS` turns. Each row is one customer with one problem.

    An episode ends when the agent has given the customer a final answer, when the agent has done
    something forbidden, or after the last turn. Solved: the database is as the policy wants it, the
    order was looked up, and the customer knows the outcome. Rewards: see `LOOKUP` and what follows
    it.
    """

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 256) -> None:
        """Use the customers of a JSONL file, or `rows` customers that `seed` draws. Raises
        `DataError` if the file is missing or holds no customers.
        """
        super().__init__()
        self.rows = sample_rows(seed, rows) if path is None else read_rows(path, *_COLUMNS)
        self._running = False

    @classmethod
    def of(cls, rows: Sequence[Row]) -> CustomerServiceEnvironment:
        """Use these customers."""
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
        self._running, self._turn, self._repeats_problem = True, 0, True
        self._found = self._allowed = self._refused = False
        self.errors = 0
        return self.script.problem, {"messages": opening(self.script.problem), "row": index}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the episode is over or has not begun."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._turn += 1
        answer, reward = self._tool(action) if is_call(action) else self._customer(action)
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
        """A tool's answer, and its reward. An answer of None ends the episode."""
        before = self.shop.orders[self.case.order.number]
        called = self.shop.call(line)
        answer: Message = {"role": "tool", "content": called.answer}
        if called.order is None:
            self.errors += 1
            # Only a call of the tool shows that the customer's number is wrong, so the call is not
            # punished.
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
        """The customer's answer, and the reward. An answer of None ends the episode."""
        script = self.script
        if _ASKS_NUMBER.search(text):
            known = script.given and not (script.slip and self.errors)
            return user_message(script.number), WASTE if known else 0.0
        if script.yes and _ASKS_LEAVE.search(text) and "help" not in text:
            wanted = script.careful and not self._allowed
            self._allowed = True
            return user_message(script.yes), 0.0 if wanted else WASTE
        if not self._found and self._repeats_problem:
            self._repeats_problem = False
            return user_message(script.problem), WASTE
        if self._refused:
            return None, self._final if refuses(text) else HARM
        if not (self._found and self.shop.orders == self._goal and states_facts(text, self.case)):
            return None, HARM
        if script.plea:
            self._refused = True
            return user_message(script.plea), 0.0
        return None, self._final

    @property
    def _final(self) -> float:
        """The reward for a customer who knows the outcome, and for an order that was right to leave
        unchanged.
        """
        return TOLD if self.case.outcome in CHANGES else ACT + TOLD


def is_call(text: str) -> bool:
    """Whether an agent's message is for a tool, and not for the customer."""
    return text.lstrip().startswith("{") or '"tool"' in text
