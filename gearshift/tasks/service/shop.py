"""A small shop: its orders, its tools, its policy, and what an agent may write to a customer. It
judges what an agent does and writes. It must not import customers or environments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gearshift.errors import DataError

RETURN_DAYS = 30
"""Days after delivery in which an order may be refunded."""
REFUND_LIMIT = 100
"""Up to this many euros an agent may refund. Above, a colleague decides."""

Status = Literal["packing", "shipped", "delivered"]
STATUSES: tuple[Status, ...] = ("packing", "shipped", "delivered")
Wish = Literal["track", "cancel", "address", "refund"]
"""What a customer wants: to know where the order is, or one change to it."""
WISHES: tuple[Wish, ...] = ("track", "cancel", "address", "refund")
Outcome = Literal["tell", "cancel", "address", "refund", "handover", "refuse"]
"""What the policy decides about a wish."""
OUTCOMES: tuple[Outcome, ...] = ("tell", "cancel", "address", "refund", "handover", "refuse")
CHANGES: tuple[Outcome, ...] = ("cancel", "address", "refund", "handover")
"""Outcomes that change the order."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order: a row of the shop's database."""

    number: str
    item: str
    price: int
    """Euros."""
    status: Status
    days: int
    """Days until it arrives (shipped), since it came (delivered), or until it ships (packing)."""
    address: str
    state: str = "open"
    """`open`, or what an agent made of it: `cancelled`, `refunded`, `handed over`."""

    def __str__(self) -> str:
        """The text by which the tools show the order."""
        s = "" if self.days == 1 else "s"
        where = {
            "packing": f"packing, ships in {self.days} day{s}",
            "shipped": f"shipped, arrives in {self.days} day{s}",
            "delivered": f"delivered {self.days} day{s} ago",
        }
        return f"{self.item}, {self.price} euros, {where[self.status]}"


@dataclass(frozen=True, slots=True)
class Case:
    """A wish that a customer has of one order."""

    order: Order
    wish: Wish
    address: str = ""
    """The new address, if the wish is a change of the address."""

    @property
    def outcome(self) -> Outcome:
        """What the policy decides about the wish. Cancel or change the address only while the order
        is packed; refund only what was delivered, within `RETURN_DAYS` days, and up to
        `REFUND_LIMIT` euros; hand over what costs more.
        """
        order = self.order
        if self.wish == "track":
            return "tell"
        if self.wish in ("cancel", "address"):
            return self.wish if order.status == "packing" else "refuse"
        if order.status != "delivered" or order.days > RETURN_DAYS:
            return "refuse"
        return "refund" if order.price <= REFUND_LIMIT else "handover"

    @property
    def goal(self) -> Order:
        """The order as the policy wants it in the end."""
        return changed(self.order, self.outcome, self.address)


def changed(order: Order, outcome: Outcome, address: str = "") -> Order:
    """The order after this was done to it."""
    states = {"cancel": "cancelled", "refund": "refunded", "handover": "handed over"}
    if outcome == "address":
        return replace(order, address=address)
    return replace(order, state=states[outcome]) if outcome in states else order


TOOLS: dict[str, Outcome | None] = {
    "get": None,
    "cancel": "cancel",
    "address": "address",
    "refund": "refund",
    "handover": "handover",
}
"""The tools by name, and what each does to an order; `get` only shows it."""


def tool_line(tool: str, order: str, address: str = "") -> str:
    """A call of a tool, in the form that an agent must write."""
    return json.dumps({"tool": tool, "order": order, **({"address": address} if address else {})})


@dataclass(frozen=True, slots=True)
class Called:
    """The result of a call."""

    answer: str
    order: str | None = None
    """The number of the order that was shown or changed; None if the call failed."""
    did: Outcome | None = None
    """What was done to it."""


class Shop:
    """The database, and the tools that work on it. No tool checks the policy: agents must do so."""

    def __init__(self, orders: Mapping[str, Order]) -> None:
        self.orders = dict(orders)

    def call(self, line: str) -> Called:
        """Do what the line asks for. The answer names what is wrong with the line."""
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            return Called("Error: that is not one line of JSON.")
        if not isinstance(call, dict) or not isinstance(call.get("tool"), str):
            return Called('Error: name a "tool".')
        if call["tool"] not in TOOLS:
            return Called(f"Error: there is no such tool; there are {', '.join(TOOLS)}.")
        number, did = call.get("order"), TOOLS[call["tool"]]
        if not isinstance(number, str) or number not in self.orders:
            return Called("Error: no order found with this number.")
        address = call.get("address", "")
        if did == "address" and not (isinstance(address, str) and address.strip()):
            return Called('Error: the new "address" is missing.')
        if did is None:
            return Called(str(self.orders[number]), number)
        self.orders[number] = changed(self.orders[number], did, address)
        return Called("Done.", number, did)


_NO = re.compile(r"\b(can ?not|can't|unable|not possible|not able|sorry|won't|no longer)\b", re.I)
_TOLD: dict[Outcome, str] = {
    "cancel": r"\bcancel",
    "refund": r"\brefund",
    "handover": r"\b(colleague|manager|supervisor)",
}


def refuses(text: str) -> bool:
    """Whether the text refuses the wish."""
    return bool(_NO.search(text))


def states_facts(text: str, case: Case) -> bool:
    """Whether the text gives the customer the outcome: what was done, or that it cannot be done and
    why. The text must have the facts that matter (the sum, the new street, the days), and no number
    that neither the order nor the policy has.
    """
    if not numbers(text) <= _known_numbers(case):
        return False
    order, outcome = case.order, case.outcome
    if outcome == "refuse":
        return refuses(text) and bool(re.search(_why(case), text, re.I))
    if outcome == "handover":
        return "handover" in _claims(text) <= {"handover", "refund"}
    if refuses(text) or not _claims(text) <= {outcome}:
        return False
    if outcome == "tell":
        return _says(text, order)
    if outcome == "address":
        return case.address.lower() in text.lower()
    return outcome in _claims(text) and (outcome == "cancel" or order.price in numbers(text))


def outcome_text(case: Case, outcome: Outcome | None = None) -> str:
    """A sentence that gives the outcome. For an outcome that is not the right one, it is the
    sentence that a wrong reply would use.
    """
    outcome = outcome or case.outcome
    order, item = case.order, f"Your {case.order.item}"
    s = "" if order.days == 1 else "s"
    where = {
        "packing": f"is being packed and ships in {order.days} day{s}",
        "shipped": f"has shipped and arrives in {order.days} day{s}",
        "delivered": f"was delivered {order.days} day{s} ago",
    }
    if outcome == "refuse":
        if case.wish != "refund":
            return f"Sorry, I cannot do that: the order is already {order.status}."
        if order.status == "delivered":
            return f"Sorry, I cannot refund it: more than {RETURN_DAYS} days have passed."
        return "Sorry, I cannot refund it: it is not delivered yet."
    return {
        "tell": f"{item} {where[order.status]}.",
        "cancel": f"{item} is cancelled.",
        "address": f"{item} now goes to {case.address}.",
        "refund": f"{item} is refunded: {order.price} euros.",
        "handover": f"A colleague will decide on your refund of {order.price} euros.",
    }[outcome]


def numbers(text: str) -> set[int]:
    """The whole numbers in a text that are not part of a word."""
    return {int(n) for n in re.findall(r"(?<![\w.])\d{1,9}(?!\w)", text)}


def _claims(text: str) -> set[Outcome]:
    """The changes that a text mentions."""
    return {outcome for outcome, words in _TOLD.items() if re.search(words, text, re.I)}


def _known_numbers(case: Case) -> set[int]:
    order = case.order
    known = {order.price, order.days, RETURN_DAYS, REFUND_LIMIT}
    return known | numbers(order.address) | numbers(case.address) | numbers(order.item)


def _says(text: str, order: Order) -> bool:
    words = {"packing": r"pack", "shipped": r"ship|way|arriv", "delivered": r"deliver"}
    return order.days in numbers(text) and bool(re.search(words[order.status], text, re.I))


def _why(case: Case) -> str:
    """What a refusal must mention."""
    if case.wish != "refund":
        return rf"\b({case.order.status}|sent|on its way|left)\b"
    if case.order.status == "delivered":
        return rf"\b({RETURN_DAYS}|thirty) days\b"
    return r"\b(deliver|arriv|receiv)"


def to_row(order: Order) -> dict[str, Any]:
    """An order as JSON."""
    return asdict(order)


def to_order(row: Any) -> Order:
    """An order from JSON. Raises `DataError` if the JSON is not an order."""
    try:
        return Order(**row)
    except TypeError as error:
        raise DataError(f"This is not an order: {row!r}; prepare the task's data again.") from error
