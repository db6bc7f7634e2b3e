"""Speech: turns a recording into words, and words into a recording. Other programs do the work:
pocketsphinx or the user's own recogniser listens, and espeak-ng speaks. It must not import a task.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import wave
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gearshift.errors import ConfigError, DataError
from gearshift.runtime.terminal import one_line
from gearshift.runtime.user_functions import load_function

RATE = 16000
"""Samples per second that pocketsphinx's model needs."""
_PAUSE = 0.3
"""Seconds of near silence around a recording, by which a recogniser measures the background."""
_HISS = 60.0
"""Amplitude of the noise that is added, because the logarithm of digital silence is not finite."""
_WEIGHT = 9.0
"""The weight of the expected sentences relative to the sounds."""

NO_VOICE = "Speaking needs espeak-ng, which is not there; apt-get install espeak-ng."
NO_EARS = "Hearing needs pocketsphinx; pip install 'gearshift[speech]', or name a recogniser."


def missing(recogniser: str | None = None) -> dict[str, str]:
    """What `hear` and `speak` need and do not find, one sentence for each that cannot work."""
    deaf = recogniser is None and find_spec("pocketsphinx") is None
    mute = shutil.which("espeak-ng") is None
    return {**({"hear": NO_EARS} if deaf else {}), **({"speak": NO_VOICE} if mute else {})}


def speak(
    text: str, path: str | Path, language: str = "en", speed: int = 150, voice: str | None = None
) -> None:
    """Write the text, spoken, as a WAV file: `speed` in words a minute, by a voice of espeak-ng.

    Raises `ConfigError` without espeak-ng or such a voice.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise ConfigError(NO_VOICE)
    name = voice or {"en": "en-us"}.get(language, language)
    command = [program, "-v", name, "-s", str(speed), "-w", str(path), "--stdin"]
    done = subprocess.run(
        command, input=text.encode(errors="replace"), capture_output=True, check=False
    )
    if done.returncode or not Path(path).is_file():
        reason = one_line(done.stderr.decode(errors="replace")) or "it gives no reason"
        raise ConfigError(f"espeak-ng does not write {path} in the voice {name}: {reason}.")


def hear(path: str | Path, recogniser: str | None = None, phrases: Iterable[str] = ()) -> str:
    """The words in a WAV file.

    `recogniser` is `module:function` or `file.py:function`, called with the file's path; without
    it, pocketsphinx recognises English. It expects the words of `phrases`, in small letters and in
    the orders that they have there; without `phrases` it expects any English.

    Raises `ConfigError` where a part is missing, `DataError` if the file is no WAV of speech.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no recording {path}; check the path.")
    if recogniser is not None:
        heard = load_function(recogniser, "recogniser")(str(path))
        if not isinstance(heard, str):
            raise ConfigError(
                f"The recogniser {recogniser} returned {type(heard).__name__}, no text."
            )
        return heard
    sound = read_wav(path)
    decoder = _decoder(tuple(phrases))
    decoder.start_utt()
    # The whole utterance at once, so that its own mean is subtracted, and not that of earlier ones.
    decoder.process_raw(sound.tobytes(), full_utt=True)
    decoder.end_utt()
    best = decoder.hyp()
    return " ".join(best.hypstr.split()) if best else ""


def read_wav(path: str | Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    """16-bit samples, `RATE` a second, with a pause around them; channels are averaged.

    Raises `DataError` if it is no such file, or too coarse for speech.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{path} is no WAV file: {error or 'it is empty'}.") from error
    if width != 2 or rate < 16000:
        raise DataError(
            f"{path} has {8 * width} bits at {rate} Hz; record 16 bits at 16000 or more."
        )
    sound = np.frombuffer(raw[: len(raw) // (2 * channels) * 2 * channels], np.int16)
    sound = sound.reshape(-1, channels).mean(1)
    length = len(sound) * RATE // rate
    sound = np.interp(np.arange(length) * (rate / RATE), np.arange(len(sound)), sound)
    pause = np.zeros(round(_PAUSE * RATE))
    padded = np.concatenate([pause, sound, pause])
    padded += np.random.default_rng(0).normal(0.0, _HISS, len(padded))
    return np.clip(padded, -32768, 32767).astype(np.int16)


@lru_cache(4)
def _decoder(phrases: tuple[str, ...]) -> Any:
    """pocketsphinx over a trigram model of the phrases."""
    try:
        from pocketsphinx import Decoder, get_model_path
        from pocketsphinx.lm import ArpaBoLM
    except ImportError as error:
        raise ConfigError(NO_EARS) from error
    known = {
        "hmm": get_model_path("en-us/en-us"),
        "samprate": RATE,
        "loglevel": "FATAL",
        "lw": _WEIGHT,
    }
    listed = get_model_path("en-us/cmudict-en-us.dict")
    if not phrases:
        return Decoder(**known, dict=listed, lm=get_model_path("en-us/en-us.lm.bin"))
    sounds = _pronunciations(listed)
    lines = [phrase.split() for phrase in phrases]
    words = {w: says for line in lines for w in line if (says := _says(w, sounds))}
    model = ArpaBoLM(
        text="\n".join(" ".join(line) for line in lines if all(w in words for w in line)),
        add_start=True,
    )
    model.compute()
    with tempfile.TemporaryDirectory() as folder:
        lm, dictionary = Path(folder) / "phrases.arpa", Path(folder) / "phrases.dict"
        model.write_file(str(lm))
        entries = [
            f"{word}{f'({i})' if i else ''} {say}\n"
            for word, says in sorted(words.items())
            for i, say in enumerate(says)
        ]
        dictionary.write_text("".join(entries), encoding="utf-8")
        return Decoder(**known, dict=str(dictionary), lm=str(lm))


def _pronunciations(path: str) -> Mapping[str, list[str]]:
    """The dictionary's words, each with its pronunciations."""
    sounds: dict[str, list[str]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        word, _, says = line.partition(" ")
        sounds.setdefault(word.partition("(")[0].replace("'", ""), []).append(says.strip())
        if "'" in word:
            sounds.setdefault(word.partition("(")[0], []).append(says.strip())
    return sounds


def _says(word: str, sounds: Mapping[str, list[str]]) -> list[str]:
    """The pronunciation of the word. A word that is not in the dictionary is split into two that
    are ("sound bar").
    """
    if word in sounds:
        return sounds[word]
    cuts = sorted(range(2, len(word) - 1), key=lambda place: abs(2 * place - len(word)))
    for place in cuts:
        left, right = sounds.get(word[:place]), sounds.get(word[place:])
        if left and right:
            return [f"{left[0]} {right[0]}"]
    return []
