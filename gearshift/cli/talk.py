"""The commands that use a model in the terminal: `chat` and `generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift.errors import DataError
from gearshift.runtime.terminal import echo

if TYPE_CHECKING:
    from gearshift.engine import Engine
    from gearshift.pipeline.recipe import Recipe
    from gearshift.tasks.task import Task
    from gearshift.types import SamplingParams


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    chat_command = commands.add_parser(
        "chat",
        help="talk to a run's model in the terminal",
        description="Talk to a model in the terminal.",
    )
    generate_command = commands.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt. Control characters in the answer, except newline and tab, "
        "are printed as escapes such as \\x1b.",
    )
    for command in (chat_command, generate_command):
        command.add_argument(
            "run",
            help="a run's folder, a stage's folder, or any model (a folder or a Hugging Face name)",
        )
    generate_command.add_argument("prompt", help="the prompt: a text, or a WAV file of speech")
    for command in (chat_command, generate_command):
        command.add_argument(
            "--system", help="the system message; by default the one of the run's task"
        )
        command.add_argument(
            "--temperature",
            type=float,
            default=0.0,
            help="0 (the default) takes the most likely tokens",
        )
        command.add_argument(
            "--max-new-tokens", type=int, default=256, help="the most tokens of an answer; 256"
        )
        command.add_argument("--seed", type=int, default=0, help="the seed of sampling; 0")
    chat_command.set_defaults(do=chat)
    generate_command.add_argument(
        "--speak", metavar="WAV", help="write the spoken answer to this file"
    )
    generate_command.add_argument(
        "--language", default="en", help="the language of the spoken answer; en"
    )
    generate_command.add_argument(
        "--recogniser", help="module:function or file.py:function that gives the text of a WAV file"
    )
    generate_command.set_defaults(do=generate)


def chat(arguments: argparse.Namespace) -> None:
    """Talk to a model in the terminal."""
    from gearshift.serve.chat import chat

    engine, system, task, _ = _open(arguments)
    # Such a task's model was trained on single requests, so it never saw earlier turns.
    remember = arguments.system is not None or task is None or task.system is None
    chat(engine, system, _params(arguments, engine), remember=remember)


def generate(arguments: argparse.Namespace) -> None:
    """Answer one prompt."""
    from gearshift.serve.chat import reply

    engine, system, task, run = _open(arguments)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _prompt(arguments, task, run)})
    pieces = []
    for piece in reply(engine, messages, _params(arguments, engine)):
        echo(piece, end="")
        pieces.append(piece)
    echo("")
    if arguments.speak:
        from gearshift.serve.speech import speak

        answer = "".join(pieces)
        if task and task.spoken_answer:
            answer = task.spoken_answer(answer, arguments.language)
        speak(answer, arguments.speak, arguments.language)
        echo(f"spoken into {arguments.speak}: {answer}", file=sys.stderr)


def _open(
    arguments: argparse.Namespace,
) -> tuple[Engine, str | None, Task | None, Path | None]:
    """The engine and the system message of the model that the user named; the task and the folder
    of its run.
    """
    from gearshift.engine import Engine
    from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
    from gearshift.pipeline.policy import find_policy
    from gearshift.tasks.registry import get_task

    name, recipe = find_policy(arguments.run)
    config = recipe.model if recipe else ModelConfig()
    model, tokenizer = load_policy(config, name), load_tokenizer(config, name)
    task = get_task(recipe.task.name) if recipe and recipe.task else None
    system = system_of(recipe)
    if arguments.system is not None:
        system = _text(arguments.system)
    run = Path(recipe.run.dir) if recipe else None
    return Engine(model, tokenizer, seed=arguments.seed), system, task, run


def system_of(recipe: Recipe | None) -> str | None:
    """The system message that the run trained its model with."""
    from gearshift.tasks.registry import get_task

    if recipe is None or recipe.task is None:
        return None
    return get_task(recipe.task.name).system or getattr(recipe.task, "system", None)


def _prompt(arguments: argparse.Namespace, task: Task | None, run: Path | None) -> str:
    """The prompt, or the words of a recording."""
    from gearshift.serve.speech import hear

    if not arguments.prompt.lower().endswith(".wav"):
        return _text(arguments.prompt)
    phrases: Sequence[str] = ()
    if task and task.phrases and run and not arguments.recogniser:
        phrases = task.phrases(run)
    words = hear(arguments.prompt, arguments.recogniser, phrases)
    if not words:
        raise DataError(f"No words were found in {arguments.prompt}; record it again.")
    echo(f"heard: {words}", file=sys.stderr)
    return words


def _text(word: str) -> str:
    """A word of the command line as Unicode; bytes that are not valid are replaced."""
    return word.encode(errors="surrogateescape").decode(errors="replace")


def _params(arguments: argparse.Namespace, engine: Engine) -> SamplingParams:
    from gearshift.types import SamplingParams

    longest = min(arguments.max_new_tokens, max(1, engine.max_length // 2))
    return SamplingParams(temperature=arguments.temperature, max_new_tokens=longest)
