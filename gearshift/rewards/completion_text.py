"""Parts of what a model says: its answer without the thoughts, and the code blocks in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

# Some templates open the thoughts themselves; then only their end is in the text, on a line alone.
_THOUGHTS = re.compile(
    r"\s*<think>.*?(?:</think>|\Z)|(?:(?!<think>).)*?^[ \t]*</think>[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_PYTHON = re.compile(r"(?:i?python|py)[\d.]*|[\w./-]+\.py")

# Tags are text here: a line `<answer>` must not hide the fence below it.
_MARKDOWN = MarkdownIt("commonmark").disable(["inline", "html_block"])


@dataclass(frozen=True)
class Block:
    """A fenced code block of CommonMark."""

    language: str
    """Its first word, or the names in braces, in small letters; empty where there is none."""
    content: str


def without_thoughts(text: str) -> str:
    """What follows the thoughts that a text begins with; nothing if they do not end."""
    thoughts = _THOUGHTS.match(text)
    return text[thoughts.end() :] if thoughts else text


def code_blocks(text: str) -> list[Block]:
    """Every block between fences, in order, those in lists and quotes too. One that nothing closes
    goes on to the end.
    """
    tokens = _MARKDOWN.parse(text)
    return [Block(_language(t.info), t.content) for t in tokens if t.type == "fence"]


def is_python(block: Block) -> bool:
    """Whether a block says that it is Python, in one of the ways in which this is said."""
    return any(_PYTHON.fullmatch(word) for word in block.language.split())


def _language(info: str) -> str:
    """`python`, `Python title="x"`, `python:main.py`, `{.python .numbered}`, `{code-cell} py`."""
    words: list[str] = re.findall(r"[\w./#+-]+", _QUOTED.sub("", info.lower()))
    named = [word.removeprefix(".").removeprefix("language-") for word in words]
    return " ".join(named if info.strip().startswith("{") else named[:1])
