"""The keys that a config class and its sections have: `gearshift keys` prints them, errors suggest
them.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def describe_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each key that starts with `prefix`, `key: type = default - docstring`; nested
    keys are dotted. A section of several kinds may be written as `task[gym]`, as `task.gym`, or as
    its keys are, `task.id`.
    """
    lines = []
    for key, field in leaves(cls):
        if not any(way.startswith(prefix) for way in _ways(key)):
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is PydanticUndefined else f" = {short(default)}"
        text = f"  - {' '.join(field.description.split())}" if field.description else ""
        lines.append(f"{key}: {_type_name(field.annotation)}{shown}{text}")
    return lines


def _ways(key: str) -> list[str]:
    """The ways to write a key: `rl.loss[gspo|sapo].name` is `rl.loss.name`, `rl.loss.gspo.name`."""
    section, bracket, rest = key.partition("[")
    if not bracket:
        return [key]
    tags, _, rest = rest.partition("]")
    return [key, section + rest, *(f"{section}.{tag}{rest}" for tag in tags.split("|"))]


def tags_of(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The sections that a field may hold, by the tag that selects one; {} if no tag does."""
    name = field.discriminator
    if not isinstance(name, str):
        return {}
    return {
        tag: model
        for model in models_of(field.annotation)
        for tag in typing.get_args(model.model_fields[name].annotation)
    }


def leaves(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field. A list's elements stand under `0`, a dict's under
    `<name>`.
    """
    for name, field in cls.model_fields.items():
        key, inner = f"{prefix}{name}", models_of(field.annotation)
        if inner != [field.annotation]:
            yield key, field
        origin = typing.get_origin(field.annotation)
        inside = "0." if origin in (list, tuple) else "<name>." if origin is dict else ""
        tags = tags_of(field)
        for model in inner:
            own = "|".join(tag for tag, kind in tags.items() if kind is model)
            tagged = f"[{own}]" if own else ""
            yield from leaves(model, f"{key}{tagged}.{inside}")


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The configs in a type: `list[A] | B | None` -> A, B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_of(part)]


def _type_name(annotation: Any) -> str:
    """The type as `gearshift keys` shows it: `list[str] | null`, `'linear' | 'cosine'`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin is Annotated:
        return _type_name(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, parts))
    if origin:
        return f"{origin.__name__}[{', '.join(map(_type_name, parts))}]"
    if annotation in (None, types.NoneType):
        return "null"
    return getattr(annotation, "__name__", "...")


def short(value: Any) -> str:
    """The value as JSON, cut so that it fits a line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
