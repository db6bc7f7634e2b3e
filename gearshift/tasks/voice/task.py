"""The voice assistant: the policy turns a request for a home in plain words into one JSON command.

The sentences are Home Assistant's own templates, and its parser's reading of a request is the right
answer (see `grammar.py`). This file has the environment and the data.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.errors import DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.tasks.voice.answer import spoken_answer
from gearshift.tasks.voice.commands import (
    command_text,
    voice_reward,
    wrong_commands,
)
from gearshift.tasks.voice.grammar import Grammar, Template, grammar, read
from gearshift.tasks.voice.house import PANEL
from gearshift.tasks.voice.noise import hear
from gearshift.tasks.voice.phrases import phrases
from gearshift.tasks.voice.requests import (
    Draw,
    halve_templates,
    new_requests,
    request_rng,
    split_templates,
)
from gearshift.types import Message

SYSTEM = "Write the request as one JSON command for the home."

Row = dict[str, Any]
HELDOUT = ("validation", "test")


class VoiceConfig(TaskConfig):
    """The voice assistant's data: what is written, and how much of it."""

    name: Literal["voice_assistant"] = "voice_assistant"
    """The name of the task."""
    labelled: int = Field(default=64, ge=1)
    """How many requests with their command there are for supervised fine-tuning."""
    train: int = Field(default=2000, ge=1)
    """How many requests without a command there are for reinforcement learning."""
    pairs: int = Field(default=384, ge=1)
    """How many pairs of a right and a wrong command there are for the reward model."""
    pairs_heldout: int = Field(default=128, ge=1)
    """How many pairs from validation templates measure the reward model."""
    validation: int = Field(default=256, ge=1)
    """How many requests from validation templates there are; no other template matches them."""
    test: int = Field(default=256, ge=1)
    """How many requests from test templates there are; no other template matches them."""
    heldout_fraction: float = Field(default=0.3, gt=0, lt=1)
    """The share of each intent's sentence templates that training does not use; half of them are
    for validation, the other half for the test."""
    languages: tuple[Literal["en", "de", "es", "fr"], ...] = Field(default=("en",), min_length=1)
    """The languages of the requests, in equal parts. The prompt does not name the language."""
    noise: float = Field(default=0.0, ge=0, le=0.5)
    """The word error rate of a simulated speech recogniser, through which every second request
    passes. The right command is that of the request without errors. With 0 no request has errors.
    """


class VoiceAssistantEnvironment(RowEnvironment):
    """One request, one command. `info` says `exact` (and `success`), `gold` and `utterance`."""

    def __init__(
        self,
        path: str | Path | None = None,
        seed: int = 0,
        rows: int = 256,
        noise: float = 0.0,
    ) -> None:
        """Use the rows of a JSONL file, or `rows` English requests that `seed` draws. With `noise`
        every second episode has its request with that word error rate; the episode's seed decides
        which ones, and with which errors.

        Raises `DataError` if the file is missing or holds no requests.
        """
        found = _sampled(seed, rows) if path is None else read_rows(path, "utterance")
        super().__init__(found, voice_reward)
        self.noise = noise

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        text, info = super().reset(seed=seed, options=options)
        if self.noise and self.np_random.random() < 0.5:
            row = self.rows[info["row"]]
            rng = random.Random(int(self.np_random.integers(1 << 62)))
            text = hear(row["utterance"], row.get("language", "en"), self.noise, rng)
            info["messages"] = _prompt(text)
        return text, info

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        gold = read(row["utterance"], row.get("language", "en"))
        assert gold is not None  # otherwise the reward would be None
        exact = reward == 1.0
        kinds = [row["language"]] if "language" in row else []
        kinds += ["noisy" if row["noisy"] else "clean"] if "noisy" in row else []
        metrics = {f"success_{kind}": float(exact) for kind in kinds}
        return {"exact": exact, "success": exact, "gold": command_text(gold), "metrics": metrics}


def figures(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The success rate of each language, of clean requests and of noisy ones."""
    kinds = sorted({name for sample in samples for name in sample["metrics"]})
    return {
        kind: fmean(s["metrics"][kind] for s in samples if kind in s["metrics"]) for kind in kinds
    }


@lru_cache(4)
def _sampled(seed: int, rows: int) -> Sequence[Row]:
    draws = new_requests(grammar().templates, random.Random(named_seed(seed, "voice/rows")), set())
    return [
        {"prompt": _prompt(u), "utterance": u, "template": t.text}
        for u, t in itertools.islice(draws, rows)
    ]


def _split_languages(
    config: VoiceConfig, seed: int, languages: Sequence[str]
) -> tuple[dict[str, dict[str, list[Template]]], dict[tuple[str, str], Grammar]]:
    """Each language's templates by split, and for each held-out split a parser of all templates but
    those of this split.
    """
    splits: dict[str, dict[str, list[Template]]] = {}
    foreign: dict[tuple[str, str], Grammar] = {}
    for language in languages:
        training, heldout = split_templates(config.heldout_fraction, seed, language)
        halves = dict(zip(HELDOUT, halve_templates(heldout, seed, language), strict=True))
        splits[language] = {"train": training, **halves}
        for split, templates in halves.items():
            mine = {t.text for t in templates}
            others = {t.text for t in (*training, *heldout)} - mine
            foreign[language, split] = Grammar(others.__contains__, language)
    return splits, foreign


class _Requests:
    """The requests of the files: each is drawn once."""

    def __init__(self, config: VoiceConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.languages = tuple(dict.fromkeys(config.languages))
        self.splits, self.foreign = _split_languages(config, seed, self.languages)
        self.used: set[str] = set()

    def take(self, name: str, split: str = "train") -> list[Draw]:
        """The requests of a file, the languages in turn."""
        count: int = getattr(self.config, name)
        each: list[list[Draw]] = []
        for i, language in enumerate(self.languages):
            draws = new_requests(
                self.splits[language][split], request_rng(self.seed, name, language), self.used,
                self.foreign.get((language, split)),
            )  # fmt: skip
            each.append(list(itertools.islice(draws, len(range(i, count, len(self.languages))))))
        taken = [draw for turn in itertools.zip_longest(*each) for draw in turn if draw]
        if len(taken) < count:
            raise DataError(
                f"The templates gave {len(taken)} requests for {name}={count}; ask for fewer."
            )
        return taken

    def rows(self, name: str, draws: Sequence[Draw], noise: float | None = None) -> list[Row]:
        """The rows of a file, with the config's noise unless another is given."""
        noise = self.config.noise if noise is None else noise
        return _rows(draws, self.languages, noise, request_rng(self.seed, f"{name}/noise"))


def prepare(config: VoiceConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl        messages (system, user, assistant)
    train.jsonl           prompt, utterance, template
    validation.jsonl      prompt, utterance, template, command
    test.jsonl            the same
    pairs.jsonl           prompt, chosen, rejected; from training templates
    pairs_heldout.jsonl   the same, from validation templates

    Training, validation and test have templates of their own, and no template of another split
    matches a held-out request.

    If there are other languages than English, rows have their `language`. If there is noise, rows
    have `noisy`: the prompt is the recogniser's text, the utterance the spoken one. `train` has no
    noise: its environment makes new noise in each episode.

    No request is in two files, except that pairs use requests of train. Raises `DataError` if
    the templates have fewer requests than are asked for.
    """
    requests = _Requests(config, seed)
    take, rows = requests.take, requests.rows
    labelled, train = take("labelled"), take("train")
    unseen = {split: take(split, split) for split in HELDOUT}
    if config.pairs > len(train):
        raise DataError(f"pairs={config.pairs} need as many requests as that; raise train.")
    pairs = {"pairs": train[: config.pairs], "pairs_heldout": take("pairs_heldout", "validation")}
    files: dict[str, Iterable[Row]] = {
        "labelled": (
            {"messages": [*row["prompt"], {"role": "assistant", "content": _gold(draw)}]}
            for row, draw in zip(rows("labelled", labelled), labelled, strict=True)
        ),
        "train": rows("train", train, noise=0.0),
    }
    for split, draws in unseen.items():
        files[split] = [
            {**row, "command": _gold(draw)}
            for row, draw in zip(rows(split, draws), draws, strict=True)
        ]
    for name, draws in pairs.items():
        files[name] = _pairs(rows(name, draws), draws, request_rng(seed, f"{name}/wrong"))
    return write_rows(folder, files)


def _pairs(rows: Sequence[Row], draws: Sequence[Draw], rng: random.Random) -> list[Row]:
    """Each request with its command and a wrong one."""
    commands = wrong_commands(((u, t.language) for u, t in draws), rng)
    return [
        {"prompt": row["prompt"], "chosen": right, "rejected": wrong}
        for row, (right, wrong) in zip(rows, commands, strict=True)
    ]


def _rows(
    draws: Sequence[Draw], languages: Sequence[str], noise: float, rng: random.Random
) -> list[Row]:
    """The requests as rows; with noise, every second one of each language has it."""
    rows = []
    for i, (utterance, template) in enumerate(draws):
        noisy = noise > 0 and i // len(languages) % 2 == 1
        heard = hear(utterance, template.language, noise if noisy else 0.0, rng)
        row: Row = {"prompt": _prompt(heard), "utterance": utterance, "template": template.text}
        if tuple(languages) != ("en",):
            row["language"] = template.language
        if noise:
            row["noisy"] = noisy
        rows.append(row)
    return rows


def _prompt(heard: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": heard}]


def _gold(draw: Draw) -> str:
    utterance, template = draw
    gold = read(utterance, template.language)
    assert gold is not None  # `new_requests` yields what the parser reads
    return command_text(gold)


def make(config: VoiceConfig, path: Path) -> VoiceAssistantEnvironment:
    """Training makes new noise in each episode; the other files have theirs already."""
    noise = config.noise if path.stem == "train" else 0.0
    return VoiceAssistantEnvironment(path, noise=noise)


register("gearshift/VoiceAssistant-v0", VoiceAssistantEnvironment)
TASK = Task(
    "voice_assistant",
    VoiceConfig,
    prepare,
    make,
    SYSTEM,
    corpus=figures,
    cluster="template",
    spoken_answer=spoken_answer,
    phrases=phrases,
    panel=PANEL,
)
