"""The program that renders chat templates: it reads requests and writes texts until its input ends.
A rendering that takes too long ends the program; one that takes too much memory is an error in its
answer.

A template comes with a model and may be malicious. So this file is a program of its own and imports
nothing of gearshift; `chat_template_renderer` starts it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main(seconds: float, memory: int) -> None:
    """Answer requests; each message, in both directions, is 8 bytes of length and then JSON. Each
    rendering may use `seconds` of processor time and `memory` bytes.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # macOS has neither this file nor this limit
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    templates: dict[int, str] = {}
    asks, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := asks.read(8):
        requests = json.loads(asks.read(int.from_bytes(head)))
        reply = b"[" + b",".join(_timed(r, templates, seconds) for r in requests) + b"]"
        answers.write(len(reply).to_bytes(8) + reply)
        answers.flush()


def _timed(request: list[Any], templates: dict[int, str], seconds: float) -> bytes:
    """The timer's signal ends the program, even in the middle of a call into C."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    answer = _answer(request, templates)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return answer


def _answer(request: list[Any], templates: dict[int, str]) -> bytes:
    try:
        number, source, most, messages, arguments, marks = request
        if source is not None:
            templates[number] = source
        [text], spans = render_jinja_template(
            [messages],
            chat_template=templates[number],
            return_assistant_tokens_mask=marks,
            **arguments,
        )
        if len(text) > most:
            return b'["long"]'
        return json.dumps(["text", text, spans[0] if marks else []]).encode()
    except MemoryError:
        return b'["memory"]'
    except Exception as error:
        return json.dumps(["refused", _words(error)]).encode()


def _words(error: Exception) -> Any:
    """The text of the template's error, which may be any object."""
    try:
        words = str(error)[:2000]
    except Exception:
        words = ""
    return words or type(error).__name__


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
