"""The judge of a reply to a shop's customer: whether its facts are right, and its manners."""

from __future__ import annotations

import re
from typing import Any

from gearshift.tasks.service.shop import Case, states_facts, to_order
from gearshift.types import Message

Row = dict[str, Any]
LONGEST_WORDS = 40
"""The greatest number of words that a reply may have."""

_RUDE = re.compile(
    r"\b(stupid|idiot|shut up|not my problem|whatever|nonsense|leave me alone|go away|annoying)\b",
    re.I,
)


def has_manners(text: str) -> bool:
    """Whether the reply is polite, complete and short: it has no rude word, ends like a sentence,
    has at most `LONGEST_WORDS` words, and repeats no sentence.
    """
    words, sentences = text.split(), re.findall(r"[^.!?]+[.!?]", text.lower())
    whole = text.rstrip().endswith((".", "!", "?")) and 0 < len(words) <= LONGEST_WORDS
    return whole and not _RUDE.search(text) and len(sentences) == len(set(sentences))


def judge(text: str, case: Case) -> float:
    """1 for a reply that gives the outcome with the right facts and has good manners; 0.2 for
    manners alone, 0.6 for the facts alone.
    """
    right, civil = states_facts(text, case), has_manners(text)
    return 1.0 if right and civil else 0.6 * right + 0.2 * civil


def reply_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    *,
    order: list[Row],
    wish: list[Any],
    address: list[str],
    **_: Any,
) -> list[float | None]:
    """`judge` with TRL's signature."""
    cases = map(Case, map(to_order, order), wish, address)
    return [judge(text, case) for text, case in zip(completions, cases, strict=True)]
