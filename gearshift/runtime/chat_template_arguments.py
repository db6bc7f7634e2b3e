"""The arguments that every rendering of a chat gets besides its messages: those of the recipe, and
a fixed date. They are stored on the tokenizer, because every rendering has the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.errors import ConfigError, ModelError
from gearshift.runtime.chat_template_renderer import renderer
from gearshift.runtime.terminal import one_line

_ATTRIBUTE = "chat_arguments"
_DIRECTIVES = (*"aAbBcdDeFgGhHIjmMpRSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M", "-S", "-j")


def bind_arguments(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], today: date | None
) -> None:
    """Give these arguments to every rendering with this tokenizer, and `today` (None: the current
    day) as its date. Raises `ConfigError` for an argument that the template does not read.
    """
    if tokenizer.chat_template:
        renderer.start()
    for name in arguments:
        if not reads(tokenizer, name):
            raise ConfigError(
                f"model.chat_template_kwargs: the chat template does not read `{name}`; "
                "correct the name, or take it out."
            )
    setattr(tokenizer, _ATTRIBUTE, (dict(arguments), today or datetime.now().date()))


def bound_arguments(
    tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The bound arguments, as arguments of `apply_chat_template`; empty if nothing was bound."""
    if not hasattr(tokenizer, _ATTRIBUTE):
        return {}
    arguments, today = getattr(tokenizer, _ATTRIBUTE)
    if not reads(tokenizer, "strftime_now"):
        return dict(arguments)
    template = _fixed_date(today) + tokenizer.get_chat_template(None, tools)
    return {"chat_template": template, **arguments}


@lru_cache(4)
def _fixed_date(today: date) -> str:
    """The start of a template that makes `strftime_now` always return the first moment of this day.

    It is a macro, because templates get plain data only and no functions.
    """
    now = datetime.combine(today, time())
    parts = {f"%{letter}": now.strftime(f"%{letter}") for letter in _DIRECTIVES}
    return (
        "{% macro strftime_now(form) %}{% set ns = namespace(text=form) %}"
        f"{{% for name, value in {json.dumps({**parts, '%%': '%'})}.items() %}}"
        "{% set ns.text = ns.text.replace(name, value) %}{% endfor %}{{ ns.text }}"
        # without this, the end of the block would remove the template's first newline
        '{% endmacro %}{{ "" }}'
    )


def reads(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the template's source contains this name."""
    return re.search(rf"\b{re.escape(name)}\b", template_source(tokenizer)) is not None


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template; all of them, joined, if there are several named ones."""
    template = tokenizer.chat_template or ""
    templates = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(each, str) for each in templates):
        raise ModelError(
            f"The chat template of {one_line(tokenizer.name_or_path, 100)} is not a text; "
            "correct its "
            "tokenizer_config.json, or take another model."
        )
    return "\n".join(templates)
