"""Talk to a model in the terminal, its answer appearing as it is sampled."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from gearshift.data.chat import render_prompt
from gearshift.data.text import stream_text
from gearshift.engine import Engine
from gearshift.errors import GearshiftError
from gearshift.runtime.terminal import echo, printable
from gearshift.types import Message, SamplingParams


def reply(
    engine: Engine, messages: list[Message], params: SamplingParams, request_id: int = 0
) -> Iterator[str]:
    """The answer's text in pieces."""
    prompt = render_prompt(engine.tokenizer, messages)
    with engine.generating():
        stream = engine.stream(prompt, params, request_id)
        try:
            yield from stream_text(engine.tokenizer, stream)
        finally:  # a caller that stops reading ends the request
            stream.abort()


def chat(engine: Engine, system: str | None, params: SamplingParams, remember: bool) -> None:
    """Read lines, answer them, until /quit or the end of input. `remember` keeps earlier turns in
    the prompt.
    """
    console = Console(highlight=False)
    console.print("[dim]/new starts over, /quit leaves.[/dim]")
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    turn = 0
    while True:
        try:
            line = console.input("[bold]you>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/new" or not remember:
            messages = list(opening)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        try:
            said = []
            for piece in reply(engine, messages, params, request_id=turn):
                # Not by rich, which would read brackets and `:smile:`, and replace tabs.
                echo(piece, end="")
                said.append(piece)
            console.print()
        except GearshiftError as error:
            console.print(printable(str(error)), style="red", markup=False)
            messages = list(opening)
            continue
        messages.append({"role": "assistant", "content": "".join(said)})
        turn += 1
