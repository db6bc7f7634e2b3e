"""What the shop's customers say and buy, in two halves: one for training, one held out.

A room of its own because it is all words; it knows neither orders nor who answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROBLEMS: Mapping[str, Sequence[str]] = {
    "track": (
        "Where is my {item}?",
        "When will my {item} get here?",
        "Has my {item} been sent yet?",
        "I would like to know what happened to my {item}.",
        "I am still waiting for the {item} that I ordered.",
        "Can you check the delivery of my {item}?",
        "Any news about my {item}?",
        "How long until I have my {item}?",
        "Please tell me the status of my order, the {item}.",
        "I ordered a {item} and have heard nothing since.",
        "What is going on with my {item}?",
        "Could you look up how far along my {item} is?",
    ),
    "cancel": (
        "I want to cancel my {item}.",
        "Please cancel the order of the {item}.",
        "I changed my mind about the {item}, please stop the order.",
        "I ordered the {item} by mistake. Can you cancel it?",
        "Do not send the {item}, I do not need it any more.",
        "How can I get out of my order for a {item}?",
        "I found the {item} cheaper elsewhere, so cancel mine.",
        "Call off my {item}, please.",
        "My {item} is no longer needed, could you withdraw the order?",
        "I bought the {item} twice. Please drop this one before it goes out.",
        "Is it possible to undo my purchase of the {item}?",
        "Scrap my order for the {item}, please.",
    ),
    "address": (
        "Please send my {item} to {address} instead.",
        "I am moving. Can my {item} go to {address}?",
        "The address for my {item} is wrong, it should be {address}.",
        "Change the delivery address of my {item} to {address}.",
        "I want the {item} delivered to {address}.",
        "Could you ship the {item} to {address}, not to my old flat?",
        "My {item} must go to {address}, I gave the wrong street.",
        "New address for the {item}: {address}.",
        "I will not be home. Deliver my {item} to {address}.",
        "Can you redirect my {item} to {address}?",
        "I made a typo in the street, my {item} belongs at {address}.",
        "We have a new place, {address}. Please bring the {item} there.",
    ),
    "refund": (
        "I want my money back for the {item}.",
        "The {item} is broken. Please refund it.",
        "I would like to return the {item}.",
        "I am not happy with the {item}, can I get a refund?",
        "My {item} does not work, I want to send it back.",
        "Please refund my {item}.",
        "The {item} is not what I expected. Can I give it back?",
        "How do I get a refund for the {item}?",
        "I do not like the {item} and want to return it.",
        "The {item} fell apart, pay me back.",
        "Can I hand back the {item} and get what I paid?",
        "The {item} is faulty and I expect to be reimbursed.",
    ),
}
NUMBERS = ("It is {number}.", "{number}", "My order number is {number}.", "Sure, it is {number}.",
           "The number is {number}.", "That would be {number}.")  # fmt: skip
GIVEN = ("The order number is {number}.", "My order is {number}.", "Order {number}.",
         "It is order {number}.", "This is about order {number}.", "Number {number}.")  # fmt: skip
CAREFUL = ("Ask me before you change anything.", "Please check with me before you do it.",
           "Do nothing without asking me first.", "Let me confirm before you do anything.",
           "I want to approve it first.", "Get my okay before you act.")  # fmt: skip
YES = ("Yes, please.", "Yes, go ahead.", "Yes, do it.", "Okay, please do.", "That is right, yes.",
       "Please do.")  # fmt: skip
PLEAS = ("Please make an exception.", "Can you not do it just this once?", "But I really need it!",
         "Come on, nobody will know.", "That is not fair, do it anyway.",
         "I insist, please do it.")  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "grey", "yellow", "brown")
THINGS = (
    "kettle", "lamp", "backpack", "chair", "blanket", "jacket", "keyboard", "toaster", "mirror",
    "umbrella", "clock", "suitcase", "speaker", "pillow", "bicycle helmet", "coffee grinder",
    "desk fan", "rain coat", "water bottle", "tent", "scarf", "wallet", "vase", "radio",
    "yoga mat", "rug", "teapot", "camera bag", "bookshelf", "pair of gloves", "wrist watch",
    "office lamp", "picnic basket", "door mat", "hammock", "stool",
)  # fmt: skip
STREETS = (
    "Mill Lane", "Park Road", "Station Street", "Church Hill", "River Walk", "Oak Avenue",
    "King Street", "Garden Close", "Bridge Road", "Harbour View", "Castle Street", "Elm Grove",
    "Market Square", "North Road", "School Lane", "Victoria Road", "Green Lane", "York Street",
    "Chapel Street", "Windmill Way", "Forest Drive", "Lake Road", "Orchard Row", "Queen Street",
)  # fmt: skip
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Words:
    """One half of everything that is said."""

    problems: Mapping[str, Sequence[str]]
    things: Sequence[str]
    streets: Sequence[str]
    letters: Sequence[str]
    """What order numbers begin with."""
    numbers: Sequence[str]
    given: Sequence[str]
    careful: Sequence[str]
    yes: Sequence[str]
    pleas: Sequence[str]


def split_words(rng: random.Random, fraction: float) -> tuple[Words, Words]:
    """(training, held out): about this share of every list is held out, one at least."""

    def halves(items: Sequence[str]) -> tuple[list[str], list[str]]:
        mixed = rng.sample(items, len(items))
        cut = min(len(mixed) - 1, max(1, round(fraction * len(mixed))))
        return mixed[cut:], mixed[:cut]

    problems = {wish: halves(said) for wish, said in PROBLEMS.items()}
    lists = (THINGS, STREETS, LETTERS, NUMBERS, GIVEN, CAREFUL, YES, PLEAS)
    pairs = [halves(items) for items in lists]
    train, heldout = (
        Words({wish: both[half] for wish, both in problems.items()}, *(p[half] for p in pairs))
        for half in (0, 1)
    )
    return train, heldout
