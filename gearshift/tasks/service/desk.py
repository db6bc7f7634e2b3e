"""The orders that the chat page shows: those that a conversation names, after the tools that the
agent called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gearshift.tasks.rows import read_rows
from gearshift.tasks.service.environment import is_call
from gearshift.tasks.service.shop import Order, Shop, to_order, to_row
from gearshift.tasks.task import TaskPanel
from gearshift.types import Message

_SHOWN = 3
"""How many customers the page offers to be."""


def shop_state(config: Any, run: Path, messages: Sequence[Message]) -> dict[str, Any]:
    """The shop after the calls of a conversation: `orders` that it names, the last tool's `answer`,
    and `customers`, who can be played. `answer` is None unless the last message calls a tool. The
    customers and orders are those of the validation split. Raises `DataError` if the run has none.
    """
    orders, customers = _database(run / "data" / "validation.jsonl")
    shop, answer = Shop(orders), None
    for message in messages:
        called = message["role"] == "assistant" and is_call(message["content"])
        answer = shop.call(message["content"]).answer if called else None
    said = " ".join(message["content"] for message in messages if message["role"] != "system")
    named = [order for number, order in shop.orders.items() if number in said]
    shown = [{**to_row(order), "text": str(order)} for order in named]
    return {"orders": shown, "answer": answer, "customers": customers}


@lru_cache(1)
def _database(path: Path) -> tuple[Mapping[str, Order], Sequence[Mapping[str, str]]]:
    """The orders by their numbers, and the first customers: `order` and what each says first."""
    rows = read_rows(path, "order", "others", "script")
    orders = [to_order(row) for r in rows for row in (r["order"], *r["others"])]
    customers = [
        {"order": row["order"]["number"], "problem": row["script"]["problem"]}
        for row in rows[:_SHOWN]
    ]
    return {order.number: order for order in orders}, customers


PANEL = TaskPanel(Path(__file__).parent / "web", shop_state)
