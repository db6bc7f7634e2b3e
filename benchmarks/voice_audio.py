"""From sound to command: held-out requests spoken by espeak-ng, heard by pocketsphinx, obeyed.

    python -m benchmarks.voice_audio runs/voice_languages            # 64 requests
    python -m benchmarks.voice_audio RUN --n 128 --recogniser my.py:hear

Each English validation request of the run is spoken in one of several voices, heard, and given to
the run's policy; the command is right if it is that of what was said. Beside it the same requests
as text. The recogniser's sentence model is built from the run's training requests and the home's
names: it has seen no held-out template. Writes benchmarks/results/voice_audio.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, versions, write
from gearshift.data.chat import render_prompt
from gearshift.engine import Engine
from gearshift.errors import GearshiftError
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.rollouts.intervals import interval
from gearshift.serve.speech import hear, speak
from gearshift.tasks.rows import read_rows
from gearshift.tasks.voice.commands import is_exact
from gearshift.tasks.voice.noise import spoken, word_error_rate
from gearshift.tasks.voice.phrases import phrases as run_phrases
from gearshift.tasks.voice.task import SYSTEM
from gearshift.types import SamplingParams

VOICES = (("en-us", 150), ("en-us+f3", 140), ("en-us+m3", 160), ("en-gb", 140))
"""espeak-ng's name of a voice, and words a minute."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--recogniser", help="module:function or file.py:function; f(wav) -> text")
    parser.add_argument("--stage", default="rl", help="which policy of the run")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.run, arguments.n, arguments.recogniser, arguments.stage)
    except GearshiftError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print("wrote", write("voice_audio", result))


def measure(run: Path, count: int, recogniser: str | None, stage: str) -> dict[str, Any]:
    """Speak, hear and obey the run's first `count` English validation requests."""
    found = read_rows(run / "data" / "validation.jsonl", "utterance", "template")
    rows = [row for row in found if row.get("language", "en") == "en"][:count]
    said = [row["utterance"] for row in rows]
    phrases = () if recogniser else run_phrases(run)
    began = time.perf_counter()
    heard = [
        _through_the_air(text, VOICES[i % len(VOICES)], recogniser, phrases)
        for i, text in enumerate(said)
    ]
    seconds = time.perf_counter() - began
    engine = _engine(run / stage)
    answers = {"text": _commands(engine, said), "audio": _commands(engine, heard)}
    right = {
        source: [is_exact(command, text) for command, text in zip(commands, said, strict=True)]
        for source, commands in answers.items()
    }
    result: dict[str, Any] = {
        "run": run.name,
        "stage": stage,
        "requests": len(said),
        "word_error_rate": _rate(said, heard),
        "heard_without_error": sum(map(_same, said, heard)) / len(said),
        "seconds_a_request": seconds / len(said),
    }
    for source, exact in right.items():
        templates = [row["template"] for row in rows]
        spread = interval([float(e) for e in exact], templates)
        result[f"exact_from_{source}"] = [sum(exact) / len(exact), *spread]
    result["voices"] = {
        f"{voice} {speed}": {
            "word_error_rate": _rate(said[i :: len(VOICES)], heard[i :: len(VOICES)]),
            "exact": sum(right["audio"][i :: len(VOICES)]) / len(said[i :: len(VOICES)]),
        }
        for i, (voice, speed) in enumerate(VOICES[: len(said)])
    }
    for name, value in result.items():
        print(f"{name:20} {_shown(value)}")
    for text, words, command, fine in zip(
        said[:8], heard, answers["audio"], right["audio"], strict=False
    ):
        print(f"{'+' if fine else '-'} {text} | {words} | {command}")
    parts = versions("pocketsphinx", "home-assistant-intents")
    return {**result, "machine": machine(), "versions": parts}


def _through_the_air(
    text: str, voice: tuple[str, int], recogniser: str | None, phrases: Sequence[str]
) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.wav"
        speak(text, path, voice=voice[0], speed=voice[1])
        return hear(path, recogniser, phrases)


def _engine(folder: Path) -> Engine:
    config = ModelConfig()
    return Engine(load_policy(config, str(folder)), load_tokenizer(config, str(folder)))


def _commands(engine: Engine, requests: Sequence[str]) -> list[str]:
    prompts = [
        render_prompt(
            engine.tokenizer,
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
        )
        for text in requests
    ]
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=64))
    return [
        str(engine.tokenizer.decode(group[0].token_ids, skip_special_tokens=True))
        for group in groups
    ]


def _same(said: str, heard: str) -> bool:
    return spoken(said, "en") == spoken(heard, "en")


def _rate(said: Sequence[str], heard: Sequence[str]) -> float:
    return word_error_rate(zip(said, heard, strict=True), "en")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return json.dumps(value) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
