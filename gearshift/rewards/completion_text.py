"""The parts of a completion: the answer without its thoughts, and the code blocks in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

# Some templates open the thoughts themselves; then the text has only their end, alone on a line.
_THOUGHTS = re.compile(
    r"\s*<think>.*?(?:</think>|\Z)|(?:(?!<think>).)*?^[ \t]*</think>[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_PYTHON = re.compile(r"(?:i?python|py)[\d.]*|[\w./-]+\.py")

# HTML tags are plain text here: a line `<answer>` must not hide the fence below it.
_MARKDOWN = MarkdownIt("commonmark").disable(["inline", "html_block"])


@dataclass(frozen=True)
class Block:
    """A fenced code block of CommonMark."""

    language: str
    """The first word after the fence, or the names in its braces, in small letters; empty if there
    is none.
    """
    content: str


def without_thoughts(text: str) -> str:
    """The text after the thoughts that it begins with; empty if the thoughts do not end."""
    thoughts = _THOUGHTS.match(text)
    return text[thoughts.end() :] if thoughts else text


def code_blocks(text: str) -> list[Block]:
    """Every fenced block in order, also inside lists and quotes. A block without an end goes to the
    end of the text.
    """
    tokens = _MARKDOWN.parse(text)
    return [Block(_language(t.info), t.content) for t in tokens if t.type == "fence"]


def is_python(block: Block) -> bool:
    """Whether a block is marked as Python, in any of the common ways."""
    return any(_PYTHON.fullmatch(word) for word in block.language.split())


def _language(info: str) -> str:
    """The language in `python`, `Python title="x"`, `python:main.py`, `{.python .numbered}`,
    `{code-cell} py`.
    """
    words: list[str] = re.findall(r"[\w./#+-]+", _QUOTED.sub("", info.lower()))
    named = [word.removeprefix(".").removeprefix("language-") for word in words]
    return " ".join(named if info.strip().startswith("{") else named[:1])
