"""What the shop's customers say and buy, in three parts: for training, validation and the test.
It must not import orders or customers.
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
UNHEARD: Mapping[str, Sequence[str]] = {
    "track": (
        "Has the courier picked up my {item}?",
        "My {item} seems to be lost, can you find out?",
        "I need to know which day the {item} comes.",
        "Did you forget about my {item}?",
        "Give me an update on the {item}, please.",
        "Is my {item} still in your warehouse?",
        "The {item} should be with me by now. What is the matter?",
        "Tell me how my order of a {item} is coming along.",
    ),
    "cancel": (
        "I no longer want the {item}, take it off my account.",
        "Could you stop my {item} before it leaves?",
        "My husband bought a {item} already, so please drop ours.",
        "Annul my purchase of the {item}.",
        "Forget the {item}, I cannot afford it now.",
        "I would rather not have the {item} after all.",
        "Can I still call the {item} back?",
        "The {item} was a wrong click. Undo it.",
    ),
    "address": (
        "Can the {item} be brought to {address}?",
        "Let the courier take my {item} to {address}.",
        "I live at {address} now, so send the {item} there.",
        "My {item} would go to an empty house. Make it {address}.",
        "Correct the street for my {item}, please: {address}.",
        "The right place for the {item} is {address}.",
        "Please update where my {item} goes, it is {address}.",
        "Could the {item} reach me at {address}?",
    ),
    "refund": (
        "The {item} came in pieces. I want to be paid back.",
        "Take the {item} back and return what it cost me.",
        "I am sending the {item} back, please pay me.",
        "My {item} stopped working after a day. Refund me.",
        "The {item} is too small for me, what about my money?",
        "This {item} is a disappointment, I ask for the price of it.",
        "Your {item} is useless. Give me the money again.",
        "Can you reimburse me for the {item}?",
    ),
}
"""Only customers of validation and the test say these; without them, those customers would have too
few words.
"""
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
    """One split's part of all phrases, items and streets."""

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


def split_words(rng: random.Random, fraction: float) -> tuple[Words, Words, Words]:
    """(training, validation, test). About this share of every list is held out, half for validation
    and half for the test, at least one entry for each. `UNHEARD` is held out too.
    """

    def parts(items: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        mixed = rng.sample(items, len(items))
        cut = min(len(mixed) - 1, max(2, round(fraction * len(mixed))))
        return mixed[cut:], mixed[: cut // 2], mixed[cut // 2 : cut]

    problems = {wish: parts(said) for wish, said in PROBLEMS.items()}
    for wish, said in UNHEARD.items():
        problems[wish][1].extend(said[::2])
        problems[wish][2].extend(said[1::2])
    lists = (THINGS, STREETS, LETTERS, NUMBERS, GIVEN, CAREFUL, YES, PLEAS)
    every = [parts(items) for items in lists]
    train, validation, test = (
        Words({wish: of[part] for wish, of in problems.items()}, *(p[part] for p in every))
        for part in range(3)
    )
    return train, validation, test
