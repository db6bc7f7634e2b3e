"""The requests of a voice assistant: which sentence templates are held out, and new requests from
templates. This file must not import an environment.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from gearshift.runtime.seeding import named_seed
from gearshift.tasks.voice.grammar import Grammar, Template, grammar, read

Draw = tuple[str, Template]
"""A request, and the template that it comes from."""

_TRIES = 60
"""How often an intent may fail to give a new request before it counts as exhausted."""


def split_templates(
    heldout_fraction: float, seed: int, language: str = "en"
) -> tuple[list[Template], list[Template]]:
    """(training, held-out) templates: about this share of each intent's sentences is held out.

    A combination of slots is never held out completely: held-out requests are new in their words,
    not in their meaning. Templates with the same text stay together, in training if several intents
    have it.
    """
    rng = request_rng(seed, "templates", language)
    everything = grammar(language).templates
    by_intent: dict[str, dict[str, list[Template]]] = {}
    for template in everything:
        by_intent.setdefault(template.intent, {}).setdefault(template.text, []).append(template)
    shared = Counter(text for texts in by_intent.values() for text in texts)
    heldout: set[str] = set()
    for texts in by_intent.values():
        wanted = round(heldout_fraction * len(texts))
        left = [t.combination for same in texts.values() for t in same]
        for text in rng.sample(list(texts), len(texts)):
            mine = [t.combination for t in texts[text]]
            if (
                wanted > 0
                and shared[text] == 1
                and all(left.count(c) > mine.count(c) for c in mine)
            ):
                heldout.add(text)
                wanted -= 1
                for combination in mine:
                    left.remove(combination)
    return (
        [t for t in everything if t.text not in heldout],
        [t for t in everything if t.text in heldout],
    )


def halve_templates(
    heldout: Sequence[Template], seed: int, language: str = "en"
) -> tuple[list[Template], list[Template]]:
    """(validation, test): each intent's held-out sentences go alternately to the two, so that both
    have about as many.
    """
    rng = request_rng(seed, "validation", language)
    texts: dict[str, list[str]] = {}
    for template in heldout:
        of_intent = texts.setdefault(template.intent, [])
        if template.text not in of_intent:
            of_intent.append(template.text)
    mixed = [text for same in texts.values() for text in rng.sample(same, len(same))]
    validation = set(mixed[::2])
    return (
        [t for t in heldout if t.text in validation],
        [t for t in heldout if t.text not in validation],
    )


def request_rng(seed: int, name: str, language: str = "en") -> random.Random:
    """English has the same seeds whether or not there are other languages."""
    place = "" if language == "en" else f"{language}/"
    return random.Random(named_seed(seed, f"voice/{place}{name}"))


def new_requests(
    templates: Sequence[Template],
    rng: random.Random,
    used: set[str],
    known: Grammar | None = None,
) -> Iterator[Draw]:
    """Yield new requests, one of each intent in turn, so that any first part holds all intents
    equally.

    Left out are sentences that no one says, those in `used` (to which new ones are added), those
    that the parser reads as another intent or not at all, and those that `known` reads. An intent
    without new requests drops out. The requests end when no intent is left.
    """
    by_intent: dict[str, list[Template]] = {}
    for template in templates:
        by_intent.setdefault(template.intent, []).append(template)
    while by_intent:
        for intent in rng.sample(list(by_intent), len(by_intent)):
            for _ in range(_TRIES):
                template = rng.choice(by_intent[intent])
                judge = grammar(template.language)
                utterance = judge.write(template, rng)
                if utterance in used or judge.home.clumsy.search(utterance):
                    continue
                gold = read(utterance, template.language)
                if gold and gold.intent == intent and not (known and known.reads(utterance)):
                    used.add(utterance)
                    yield utterance, template
                    break
            else:
                del by_intent[intent]
