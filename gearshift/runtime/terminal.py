"""Text of models, servers, files and users, as a terminal or a log may have it.

Whoever prints or keeps such a text passes it through here; nothing else knows what is dangerous.
"""

from __future__ import annotations

import re
import sys
from typing import IO

# Control characters but newline and tab, line separators, marks that turn the direction of what
# follows, and halves of surrogate pairs, which UTF-8 cannot write.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, most: int | None = None) -> str:
    r"""The text, its control characters written as `\x1b`, cut to `most` characters.

    Newlines and tabs stay. Each character is judged alone, so a stream may be passed in pieces.
    """
    if most is not None and len(text) > most:
        text = text[:most]  # before the work, which 100 MB would make long
        return _UNSAFE.sub(_escaped, text)[: max(0, most - 3)] + "..."
    text = _UNSAFE.sub(_escaped, text)
    return text if most is None or len(text) <= most else text[: max(0, most - 3)] + "..."


def one_line(text: str, most: int = 300) -> str:
    """The same in one line, for errors: white space becomes single spaces."""
    return printable(" ".join(text[: 4 * most + 100].split()), most)


def say(text: str, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print the text, printable, at once; to standard output if no file is given."""
    print(printable(text), end=end, file=file or sys.stdout, flush=True)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
