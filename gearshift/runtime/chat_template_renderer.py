"""Chat templates are rendered in a process of their own: a template is a program of strangers, and
one that loops or fills memory can only be ended from outside.
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
"""Bytes that renderings may use beside the program itself."""
LONGEST_SOURCE = 1 << 20
"""Characters of a template; the longest of known models has less than a tenth."""
_SPARE, _GROWTH = 1 << 20, 8
"""A text has at most so many characters, and so many for each that goes in."""
_PATIENCE = 60.0
"""Seconds until a process that does not answer is ended, however little processor time it got."""
_TRIES, _SHARE = 3, 100
"""Renderings of one template that may have to be ended: so many, or one of so many."""
_KEPT, _KEPT_SIZE = 256, 1 << 16
"""Texts that are kept, and the characters of one that is."""


class EndlessTemplateError(DataError):
    """A template had to be ended: it takes too long or too much for one conversation."""


Rendering = tuple[str, list[tuple[int, int]]]
"""The text, and where its `{% generation %}` blocks stand."""

_FAULTS = {
    "slow": f"takes more than {SECONDS:g} seconds for one conversation",
    "memory": f"takes more than {MEMORY >> 20} MB of memory for one conversation",
    "long": "writes a text that is many times as long as the conversation",
    "died": "breaks the program that renders it",
}


class ChatRenderer:
    """One process for all templates: started when it is needed, and anew where it was ended."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process that started it: one that is forked needs another."""
        self._numbers: dict[str, int] = {}
        """The templates that it knows."""
        self._recent: OrderedDict[tuple[str, bytes], Rendering] = OrderedDict()
        """Preparing a row asks for some of its texts twice."""
        self._counts: dict[str, list[int]] = {}
        """How often each template was rendered, and had to be ended."""

    def start(self) -> None:
        """Start the process, so that it is ready when the first conversation comes."""
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
                cwd="/",  # this process's own may be gone
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
            self._owner, self._numbers = os.getpid(), {}

    def forked(self) -> None:
        """In a process that was forked: the lock may be held by a thread that is not here, and the
        pipes are the other's alone.
        """
        self._lock = threading.RLock()
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe is not None and not pipe.closed:
                with open(os.devnull, "r+b") as nothing:
                    os.dup2(nothing.fileno(), pipe.fileno(), inheritable=False)

    def close(self) -> None:
        """End the process; the next conversation starts another."""
        with self._lock:
            process, self._process = self._process, None
            if process is None or self._owner != os.getpid():
                return
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was not sent is lost
                    pipe.close()  # type: ignore[union-attr]

    def render(
        self,
        name: str,
        source: str,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        marks: bool = False,
    ) -> Rendering:
        """What the template of model `name` makes of the messages. Raises `DataError` if it refuses
        them, and `EndlessTemplateError` if it does not end within the bounds above.
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
        """Render what will be asked for next, (messages, arguments) each, in one go: a process
        takes longer to answer than to render.
        """
        with self._lock:
            if not self._counts.get(source, [0, 1])[1]:  # one that comes to its end
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
        """What the program says. One that somebody else ended is started and asked once more."""
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
            # Also where this thread is ended here: an answer that waits would be the next one's.
            if any(answer[0] in _FAULTS for answer in answers):
                self.close()
        return answers


renderer = ChatRenderer()
os.register_at_fork(after_in_child=renderer.forked)
"""The one of this process."""


def _request(messages: Sequence[Message], arguments: Mapping[str, Any], marks: bool) -> bytes:
    """As JSON."""
    try:
        return json.dumps([messages, arguments, marks], default=_plain).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"The conversation cannot be given to a chat template ({one_line(str(error))}); mend "
            "its row."
        ) from None


def _plain(value: Any) -> Any:
    """What is no JSON, as templates have always been given it: numbers as they are, else a name."""
    return value.item() if hasattr(value, "item") else f"<{type(value).__name__}>"


def _fault(name: str, what: str) -> EndlessTemplateError:
    return EndlessTemplateError(
        f"The chat template of {one_line(name, 100) or 'the tokenizer'} {what}; give the "
        "tokenizer another template, or take another model."
    )
