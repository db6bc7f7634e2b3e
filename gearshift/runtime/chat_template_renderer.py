"""Chat templates are rendered in a process of their own. A template is a program by strangers, and
a process is the only thing that can be ended when the template loops or fills memory.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.types import Message

SECONDS = 5.0
"""Processor time of one rendering; an ordinary one takes less than a thousandth of it."""
MEMORY = 512 << 20
"""How many bytes renderings may use besides the program itself."""
LONGEST_SOURCE = 1 << 20
"""How many characters a template may have; the longest of the known models has less than a tenth.
"""
_SPARE, _GROWTH = 1 << 20, 8
"""A rendered text has at most `_SPARE` characters plus `_GROWTH` for each character of its input.
"""
_PATIENCE = 60.0
"""After this many seconds without an answer the process is ended, even if it got little processor
time.
"""
_TRIES, _SHARE = 3, 100
"""How many renderings of one template may have to be ended: this many, or one in this many."""
_KEPT, _KEPT_SIZE = 256, 1 << 16
"""How many texts are cached, and how many characters a cached text may have."""


class EndlessTemplateError(DataError):
    """A rendering had to be ended: the template takes too much time or memory for one
    conversation.
    """


Rendering = tuple[str, list[tuple[int, int]]]
"""The text, and where its `{% generation %}` blocks begin and end."""

_FAULTS = {
    "slow": f"takes more than {SECONDS:g} seconds for one conversation",
    "memory": f"takes more than {MEMORY >> 20} MB of memory for one conversation",
    "long": "writes a text that is many times as long as the conversation",
    "died": "breaks the program that renders it",
}


class ChatRenderer:
    """One process that renders all templates. It starts when it is needed, and again after it was
    ended.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process that started it; a forked process needs another one."""
        self._numbers: dict[str, int] = {}
        """The number of each template that the process has received."""
        self._recent: OrderedDict[tuple[str, bytes], Rendering] = OrderedDict()
        """The cache: to prepare a row, some of its texts are needed twice."""
        self._counts: dict[str, list[int]] = {}
        """How often each template was rendered, and how often that had to be ended."""

    def start(self) -> None:
        """Start the process, so that it is ready for the first conversation."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                return
            program = Path(__file__).with_name("chat_template_child.py")
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(program), str(SECONDS), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",  # this process's own folder may be gone
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # only this process answers Ctrl-C
            )
            self._owner, self._numbers = os.getpid(), {}

    def forked(self) -> None:
        """Prepare for use in a forked process: the lock may be held by a thread that does not exist
        here, and the pipes belong to the parent.
        """
        self._lock = threading.RLock()
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe is not None and not pipe.closed:
                with open(os.devnull, "r+b") as nothing:
                    os.dup2(nothing.fileno(), pipe.fileno(), inheritable=False)

    def close(self) -> None:
        """End the process; the next conversation starts another one."""
        with self._lock:
            process, self._process = self._process, None
            if process is None or self._owner != os.getpid():
                return
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # requests that were not sent are lost
                    pipe.close()  # type: ignore[union-attr]

    def render(
        self,
        name: str,
        source: str,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        marks: bool = False,
    ) -> Rendering:
        """Render the messages with the template of the model `name`. Raises `DataError` if the
        template refuses them, and `EndlessTemplateError` if it exceeds the limits above.
        """
        asked = _request(messages, arguments, marks)
        with self._lock:
            if (kept := self._recent.get((source, asked))) is not None:
                return kept
            counts = self._counts.setdefault(source, [0, 0])
            if len(source) > LONGEST_SOURCE:
                raise _fault(name, f"has more than {LONGEST_SOURCE:,} characters")
            if counts[1] >= max(_TRIES, counts[0] // _SHARE):
                raise _fault(name, f"had to be ended {counts[1]} times and is not tried again")
            [[kind, *answer]] = self._answers(source, [asked])
            counts[0] += 1
            counts[1] += kind in _FAULTS
        if kind in _FAULTS:
            raise _fault(name, _FAULTS[kind])
        if kind == "refused":
            reason = one_line(answer[0]).rstrip(".")
            raise DataError(f"The chat template refuses this conversation: {reason}.")
        rendering = answer[0], [(start, end) for start, end in answer[1]]
        self._keep(source, asked, rendering)
        return rendering

    def ahead(
        self, source: str, conversations: Sequence[tuple[Sequence[Message], Mapping[str, Any]]]
    ) -> None:
        """Render these pairs of (messages, arguments) in one request and cache the texts: the
        process takes longer to answer than to render.
        """
        with self._lock:
            # only a template that always came to its end
            if not self._counts.get(source, [0, 1])[1]:
                asked = [_request(*each, marks=False) for each in conversations]
                asked = [each for each in asked if (source, each) not in self._recent]
                answers = self._answers(source, asked) if asked else []
                for each, answer in zip(asked, answers, strict=False):
                    if answer[0] == "text":
                        self._keep(source, each, (answer[1], []))

    def _keep(self, source: str, asked: bytes, rendering: Rendering) -> None:
        with self._lock:
            if len(asked) + len(rendering[0]) < _KEPT_SIZE:
                self._recent[source, asked] = rendering
                if len(self._recent) > _KEPT:
                    self._recent.popitem(last=False)

    def _answers(self, source: str, asked: Sequence[bytes]) -> list[list[Any]]:
        """The process's answers. If another program ended the process, it is started and asked once
        more.
        """
        answers: list[list[Any]] = []
        for _ in range(2):
            self.start()
            requests = []
            for each in asked:
                number = self._numbers.get(source)
                given = None if number is not None else source
                number = self._numbers.setdefault(source, len(self._numbers))
                head = json.dumps([number, given, _SPARE + _GROWTH * len(each)]).encode()
                requests.append(head[:-1] + b"," + each[1:])
            answers = self._exchange(b"[" + b",".join(requests) + b"]")
            if answers[0] != ["died"]:
                break
        return answers

    def _exchange(self, request: bytes) -> list[list[Any]]:
        process = self._process
        assert process and process.stdin and process.stdout
        answers: list[list[Any]] = [["died"]]
        try:
            process.stdin.write(len(request).to_bytes(8) + request)
            process.stdin.flush()
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            if not poll.poll(_PATIENCE * 1000):
                answers = [["slow"]]
            elif head := process.stdout.read(8):
                answers = json.loads(process.stdout.read(int.from_bytes(head)))
            elif process.wait() == -signal.SIGPROF:
                answers = [["slow"]]
        except (OSError, ValueError):
            pass
        finally:
            # This also holds when an exception ends this thread: a late answer would be taken for
            # the next one.
            if any(answer[0] in _FAULTS for answer in answers):
                self.close()
        return answers


renderer = ChatRenderer()
os.register_at_fork(after_in_child=renderer.forked)
"""The renderer of this process."""


def _request(messages: Sequence[Message], arguments: Mapping[str, Any], marks: bool) -> bytes:
    """The request as JSON."""
    try:
        return json.dumps([messages, arguments, marks], default=_plain).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"The conversation cannot be given to a chat template ({one_line(str(error))}); "
            "correct its row."
        ) from None


def _plain(value: Any) -> Any:
    """Turn a value that JSON cannot hold into what templates always got for it: a number as it is,
    for another value the name of its type.
    """
    return value.item() if hasattr(value, "item") else f"<{type(value).__name__}>"


def _fault(name: str, what: str) -> EndlessTemplateError:
    return EndlessTemplateError(
        f"The chat template of {one_line(name, 100) or 'the tokenizer'} {what}; give the "
        "tokenizer another template, or take another model."
    )
