"""Hearing and speaking: a sentence survives the way there and back, and faults are one line."""

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from gearshift.errors import ConfigError, DataError
from gearshift.serve.speech import _says, hear, read_wav, speak
from gearshift.tasks.voice.homes import HOMES

PHRASES = (
    "turn on the kitchen lights",
    "turn off the bedroom lights",
    "pause the soundbar",
    "set the thermostat to twenty one degrees",
    *HOMES["en"].areas,
)
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng here")


def record(path: Path, rate: int = 16000, channels: int = 1, seconds: float = 0.1) -> Path:
    tone = np.sin(np.arange(round(rate * seconds)) / 20) * 8000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(tone.astype(np.int16), channels).tobytes())
    return path


@needs_espeak
def test_speech_there_and_back(tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    first, other = tmp_path / "first.wav", tmp_path / "other.wav"
    speak("Turn on the kitchen lights.", first)
    speak("pause the soundbar", other)  # a word that no dictionary has
    heard = hear(first, phrases=PHRASES)
    assert heard == "turn on the kitchen lights"
    assert hear(other, phrases=PHRASES) == "pause the soundbar"
    # What was heard before changes nothing.
    assert hear(first, phrases=PHRASES) == heard


@needs_espeak
def test_every_language_is_spoken(tmp_path: Path) -> None:
    for language in HOMES:
        path = tmp_path / f"{language}.wav"
        speak("radio", path, language)
        assert len(read_wav(path)) > 8000
    with pytest.raises(ConfigError, match="klingon-x"):
        speak("radio", tmp_path / "no.wav", voice="klingon-x")


def test_without_espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install espeak-ng"):
        speak("radio", tmp_path / "a.wav")


def test_without_pocketsphinx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    with pytest.raises(ConfigError, match="pip install"):
        hear(record(tmp_path / "a.wav"), phrases=("nobody said this before",))


def test_a_recogniser_of_your_own(tmp_path: Path) -> None:
    wav = record(tmp_path / "a.wav")
    mine = tmp_path / "mine.py"
    mine.write_text("def hear(path): return path[-5:]\ndef none(path): return None\nnumber = 1\n")
    assert hear(wav, f"{mine}:hear") == "a.wav"
    for spec, error in (
        (f"{mine}:none", "no text"),
        (f"{mine}:number", "no function `number`"),
        (f"{tmp_path}/no.py:hear", "no recogniser file"),
        ("hear", "not of the form"),
        ("no_such_module:hear", "no_such_module"),
    ):
        with pytest.raises(ConfigError, match=error):
            hear(wav, spec)


def test_recordings(tmp_path: Path) -> None:
    """Other rates and channels come to one sound of the same length."""
    plain = read_wav(record(tmp_path / "a.wav"))
    for rate, channels in ((16000, 2), (44100, 1), (48000, 2)):
        sound = read_wav(record(tmp_path / "b.wav", rate, channels))
        assert abs(len(sound) - len(plain)) < 8 and sound.dtype == np.int16
    text = tmp_path / "c.wav"
    text.write_text("no sound")
    for path, error in (
        (record(tmp_path / "d.wav", 8000), "16000 or more"),
        (text, "no WAV"),
        (tmp_path / "e.wav", "no recording"),
    ):
        with pytest.raises(DataError, match=error):
            hear(path)


def test_words_that_the_dictionary_lacks() -> None:
    sounds = {"mud": ["M AH D"], "room": ["R UW M"], "mu": ["M Y UW"]}
    assert _says("room", sounds) == ["R UW M"]
    assert _says("mudroom", sounds) == ["M AH D R UW M"]
    assert _says("xyzzy", sounds) == []
