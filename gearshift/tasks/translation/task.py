"""Machine translation: a product's messages from English, judged on a product never trained on.

The text is what translators wrote into the catalogues of installed packages.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime.config import PathText
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import Row, read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.tasks.translation.catalogues import catalogue
from gearshift.tasks.translation.score import (
    LANGUAGES,
    chrf,
    corpus_scores,
    in_language,
    keeps_placeholders,
    placeholders,
)
from gearshift.types import Message

SYSTEM = "Translate the message of a program."

Sources = Mapping[str, Mapping[str, str]]
"""English message -> language -> translation."""


class TranslationConfig(TaskConfig):
    """The translator's data: which products' messages, which languages, and how many."""

    name: Literal["translation"] = "translation"
    """The name of the task."""
    languages: list[Literal["es", "de", "fr"]] = Field(default=["es", "de", "fr"], min_length=1)
    """Languages to translate into, from English."""
    products: list[PathText] = Field(default=["wagtail", "Django"], min_length=1)
    """The products whose message catalogues are trained on: names of installed packages, or folders
    with LANGUAGE/LC_MESSAGES/*.po."""
    validation_product: PathText = "django-oscar"
    """The product whose catalogues are for validation; a message that another product also has is
    left out."""
    test_product: PathText = "django-helpdesk"
    """The product whose catalogues are for the test; a message that another product also has is
    left out."""
    labelled: int = Field(default=1500, ge=1)
    """How many messages with a translation there are for supervised fine-tuning."""
    train: int = Field(default=1500, ge=1)
    """How many further messages there are for reinforcement learning."""
    validation: int = Field(default=480, ge=1)
    """How many messages of the validation product are evaluated; each occurs once, in one language.
    """
    test: int = Field(default=400, ge=1)
    """How many messages of the test product are evaluated; each occurs once, in one language."""
    max_words: int = Field(default=12, ge=1)
    """How many words a message may have; longer messages are left out."""

    @field_validator("languages")
    @classmethod
    def _no_language_twice(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("names a language twice; name each once")
        return value

    @model_validator(mode="after")
    def _held_out(self) -> TranslationConfig:
        for split in ("validation_product", "test_product"):
            if (name := getattr(self, split)) in self.products:
                raise ValueError(f"{split} {name} is among the products trained on; name another")
        if self.validation_product == self.test_product:
            raise ValueError(f"test_product {name} is the validation product too; name another")
        return self


def score_translation(completion: str, source: str, reference: str, language: str) -> float:
    """chrF against the reference, 0 to 1. It is halved if a placeholder is lost or invented, and
    halved again if the language is wrong. It is 1 for the reference itself.
    """
    kept = keeps_placeholders(source, completion)
    right = in_language(completion, language)
    return chrf(completion, reference) * (1.0 if kept else 0.5) * (1.0 if right else 0.5)


def translation_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    *,
    source: list[str],
    reference: list[str],
    language: list[str],
    **_: Any,
) -> list[float | None]:
    """`score_translation` with TRL's signature."""
    columns = zip(completions, source, reference, language, strict=True)
    return [score_translation(*column) for column in columns]


class TranslationEnvironment(RowEnvironment):
    """One message, one translation. `info` says `success` (the reference's very words), `gold`,
    and the metrics `chrf`, `placeholders` and `language`.
    """

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 256) -> None:
        """Use the rows of a JSONL file, or `rows` messages of the default products.

        Raises `DataError` if the file is missing or holds no such rows.
        """
        columns = ("source", "reference", "language")
        chosen = _sampled(seed, rows) if path is None else read_rows(path, *columns)
        super().__init__(chosen, translation_reward)

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        metrics = {
            "chrf": chrf(action.strip(), row["reference"]),
            "placeholders": float(keeps_placeholders(row["source"], action)),
            "language": float(in_language(action, row["language"])),
        }
        success = action.strip() == row["reference"]
        return {"success": success, "gold": row["reference"], "metrics": metrics}


def corpus(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Corpus chrF and BLEU, in total and by language, and the share of messages with placeholders
    whose translation keeps them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {"": list(samples)}
    for sample in samples:
        groups.setdefault(f"_{language_of(sample['prompt'])}", []).append(sample)
    figures: dict[str, float] = {}
    for group, members in groups.items():
        scores = corpus_scores(
            [s["completion"].strip() for s in members], [s["gold"] for s in members]
        )
        figures |= {f"corpus_{name}{group}": score for name, score in scores.items()}
    filled = [s["metrics"]["placeholders"] for s in samples if placeholders(s["gold"])]
    return figures | ({"placeholders_kept": fmean(filled)} if filled else {})


def ask(source: str, language: str) -> list[Message]:
    """The conversation that asks for a translation."""
    user = f"Translate to {LANGUAGES[language]}: {source}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def language_of(prompt: str) -> str:
    """The language that a user's message from `ask` asks for."""
    return next(k for k, name in LANGUAGES.items() if prompt.startswith(f"Translate to {name}: "))


def prepare(config: TranslationConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl   messages (system, user, assistant)
    train.jsonl      prompt, source, reference, language, product
    validation.jsonl the same, of the validation product
    test.jsonl       the same, of the test product

    No source is in two files, in any language. Raises `DataError` if the catalogues hold
    fewer messages than are asked for.
    """
    rng = random.Random(named_seed(seed, "translation/split"))
    known = _training(config)
    validation = _heldout(config, config.validation_product, config.test_product)
    test = _heldout(config, config.test_product, config.validation_product)
    sources = rng.sample(list(known), len(known))
    cut = round(len(sources) * config.labelled / (config.labelled + config.train))
    labelled = _rows(known, sources[:cut], config, "labelled")
    train = _rows(known, sources[cut:], config, "train")
    files: dict[str, list[Row]] = {
        "labelled": [
            {"messages": [*row["prompt"], {"role": "assistant", "content": row["reference"]}]}
            for row in labelled
        ],
        "train": train,
    }
    for split, unseen in (("validation", validation), ("test", test)):
        order = rng.sample(list(unseen), len(unseen))
        files[split] = _rows(unseen, order, config, split, once=True)
    return write_rows(folder, files)


def _training(config: TranslationConfig) -> Sources:
    sources: dict[str, dict[str, str]] = {}
    for product in config.products:
        for source, translations in _usable(config, product).items():
            for language, translation in translations.items():
                sources.setdefault(source, {}).setdefault(language, translation)
    return sources


def _heldout(config: TranslationConfig, product: str, other: str) -> Sources:
    """The held-out product's messages without those that a training product or the other held-out
    product has too, used or not. The comparison ignores case and punctuation at the end.
    """
    seen = {
        _plain(source)
        for known in (*config.products, other)
        for language in config.languages
        for source in catalogue(known, language)
    }
    usable = _usable(config, product)
    return {source: texts for source, texts in usable.items() if _plain(source) not in seen}


def _usable(config: TranslationConfig, product: str) -> Sources:
    """The product's messages that are short enough and not mostly markup, with the translations
    that differ from them and pass the checks that a policy's must pass.
    """
    sources: dict[str, dict[str, str]] = {}
    for language in config.languages:
        for source, text in catalogue(product, language).items():
            markup = sum(map(len, placeholders(source).elements()))
            words = len(source.split()) <= config.max_words and 2 * markup <= len(source)
            fits = words and source != text
            if fits and keeps_placeholders(source, text) and in_language(text, language):
                sources.setdefault(source, {})[language] = text
    return sources


def _rows(
    known: Sources, order: Sequence[str], config: TranslationConfig, name: str, once: bool = False
) -> list[Row]:
    """As many rows as the config asks for. First each source comes in one language, with the
    languages in turn; then (unless `once`) each source comes in its next language.
    """
    count: int = getattr(config, name)
    rows: list[Row] = []
    for turn in range(1 if once else len(config.languages)):
        for i, source in enumerate(order):
            languages = [k for k in config.languages if k in known[source]]
            if turn < len(languages):
                language = languages[(i + turn) % len(languages)]
                prompt, reference = ask(source, language), known[source][language]
                texts = {"source": source, "reference": reference, "language": language}
                rows.append({"prompt": prompt, **texts})
    if len(rows) < count:
        raise DataError(
            f"The catalogues have {len(rows)} messages for {name}={count}; ask for fewer, or raise "
            "max_words."
        )
    return rows[:count]


def _plain(source: str) -> str:
    return source.casefold().rstrip(".:!? ")


def _sampled(seed: int, rows: int) -> Sequence[Row]:
    config = TranslationConfig(train=rows)
    known = _training(config)
    rng = random.Random(named_seed(seed, "translation/rows"))
    return _rows(known, rng.sample(list(known), len(known)), config, "train")


def make(config: TranslationConfig, path: Path) -> TranslationEnvironment:
    """The environment over the rows of `path`."""
    return TranslationEnvironment(path)


register("gearshift/Translation-v0", TranslationEnvironment)
TASK = Task(
    "translation",
    TranslationConfig,
    prepare,
    make,
    SYSTEM,
    metric="chrf",
    corpus=corpus,
)
