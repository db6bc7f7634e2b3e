"""The sentences that a speech recogniser expects in front of a voice assistant's model."""

from __future__ import annotations

from pathlib import Path

from gearshift.data import load_rows
from gearshift.errors import ConfigError, DataError
from gearshift.tasks.voice.homes import HOMES
from gearshift.tasks.voice.noise import spoken


def phrases(run: Path) -> tuple[str, ...]:
    """A run's training requests and the names of the home, in small letters, words alone.

    Raises `DataError` if the folder is no run of the voice assistant, `ConfigError` if it has no
    English request: the recogniser that comes with gearshift knows only English.
    """
    path = run / "data" / "train.jsonl"
    if not path.is_file():
        raise DataError(f"There is no {path}; name the folder of a run of the voice assistant.")
    rows = load_rows(str(path))
    if not all("utterance" in row for row in rows):
        raise DataError(f"{path} holds no requests; name a run of the voice assistant.")
    english = [row["utterance"] for row in rows if row.get("language", "en") == "en"]
    if not english:
        raise ConfigError(
            "pocketsphinx recognises English only; name a recogniser with --recogniser."
        )
    return tuple(spoken(text, "en") for text in (*english, *HOMES["en"].words))
