"""The base class of every component's config, and how YAML and `key=value` words fill one.

All errors in a recipe are explained here, in one form: the key, the given value, what is accepted.
This file knows no component; the config classes stand beside the components.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined, to_jsonable_python

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import one_line
from gearshift.runtime.urls import check_no_secret
from gearshift.runtime.yaml_text import MAX_DEPTH, coerce, parse_override, read_yaml, to_yaml

C = TypeVar("C", bound="Config")
T = TypeVar("T")
_NEUTRAL = "cannot change what comes of a run"
Neutral = Annotated[T, _NEUTRAL]
"""The type of a key whose value may change while a run is resumed."""


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("a path has at least one character, and none of them is null.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a path has no half of a character.") from None
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_path)]
"""The type of a key that names a file or a folder; `~` is the user's home folder."""


class Config(BaseModel):
    """The base of all configs. Unknown keys are errors, a config is immutable, and the docstring of
    a field describes its key.
    """

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # the value may be a secret
    )

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return coerce(tree, Any)
        _check_no_secret(tree)
        types = {name: field.annotation for name, field in cls.model_fields.items()}
        return {key: coerce(value, types.get(key, Any)) for key, value in tree.items()}


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The config in the YAML file at `path` (None: all defaults), changed by `overrides`.

    An override is `key.sub=value` or, for a list, `key.0.sub=value`; its value is one scalar up to
    its last letter, or YAML in brackets, braces or quotes. A key of type text gets the text as it
    is written. Raises `ConfigError`, one line, on a missing or broken file, a bad override, or a
    bad key, type or value.
    """
    tree = read_mapping(path) if path else {}
    for override in overrides:
        _apply(tree, override)
    return validated(cls, tree, f"{path}: " if path else "")


def validated(cls: type[C], tree: dict[str, Any], where: str = "") -> C:
    """The config that this tree describes. Raises `ConfigError`, one line that begins with `where`,
    on a bad key, type or value.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise ConfigError(where + _explain(cls, tree, errors)) from None


def dump(config: Config) -> str:
    """The resolved config as YAML; `load` reads it back as an equal config."""
    return to_yaml(config.model_dump(mode="json"))


def identity(config: Any) -> Any:
    """The resolved config as JSON, without the keys that cannot change the result of a run."""
    if isinstance(config, Config):
        fields = type(config).model_fields.items()
        kept = [name for name, field in fields if _NEUTRAL not in field.metadata]
        return {name: identity(getattr(config, name)) for name in kept}
    if isinstance(config, list | tuple):
        return [identity(item) for item in config]
    return to_jsonable_python(config)


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """The differences between two identities, for example `rl.steps was 20 and is 30`."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        dot = f"{key}." if key else ""
        return [
            line
            for name in names
            for line in differences(before.get(name), after.get(name), f"{dot}{name}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{key}.{i}")]
    return [] if before == after else [f"`{key}` was {_short(before)} and is {_short(after)}"]


def describe_keys(cls: type[BaseModel]) -> list[str]:
    """One line for each key, `key: type = default - docstring`; nested keys are dotted."""
    lines = []
    for key, field in _leaves(cls):
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is PydanticUndefined else f" = {_short(default)}"
        text = f"  - {' '.join(field.description.split())}" if field.description else ""
        lines.append(f"{key}: {_type_name(field.annotation)}{shown}{text}")
    return lines


def _check_no_secret(value: Any, key: str = "") -> None:
    """Raises `ValueError` with the key of an address that contains a secret."""
    if isinstance(value, str):
        try:
            check_no_secret(value)
        except ValueError as error:
            raise ValueError(f"`{key}`: {error}") from None
    elif isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_no_secret(inner, f"{key}.{name}" if key else str(name))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises `ConfigError`."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file; name the YAML file itself.")
    if not path.is_file():
        names = [f.name for f in path.parent.glob("*") if f.is_file()]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path."
        raise ConfigError(f"There is no file {path}; {hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} holds {_short(tree)}; a recipe is made of `key: value` lines.")
    return tree or {}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Write one `key.sub=value` into the tree, and make the sections that it needs."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    shown = one_line(override, 100)
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"The override `{shown}` is not of the form key.sub=value.")
    value = parse_override(override, text)
    node: Any = tree
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        slot: Any = part
        if isinstance(node, list):
            slot = int(part) if part.isdecimal() and len(part) < 10 else len(node)
            if slot >= len(node):
                raise ConfigError(
                    f"The override `{shown}`: the list `{here}` has {len(node)} entries,"
                    f" counted from 0, and no `{one_line(part, 40)}`."
                )
        elif not isinstance(node, dict):
            raise ConfigError(
                f"The override `{shown}`: `{here}` is {_short(node)}, which has no keys inside."
            )
        if depth == len(parts) - 1:
            node[slot] = value
        elif isinstance(node, dict) and node.get(slot) is None:
            node[slot] = {}
        node = node[slot]


def _explain(cls: type[BaseModel], tree: dict[str, Any], errors: list[ErrorDetails]) -> str:
    """Explain the first error. Branches of a union that failed at the same key count as one
    error.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    # A misspelt key often comes with a missing one; then the spelling is the more useful error.
    for error in sorted(errors, key=lambda e: e["type"] != "extra_forbidden"):
        by_key.setdefault(_dotted(tree, error), []).append(error)
    key, same = next(iter(by_key.items()))
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    kind = same[0]["type"]
    shown = one_line(key, 100)
    if kind == "extra_forbidden":
        return f"unknown key `{shown}`; {_nearest(cls, tree, key)}{more}"
    if kind == "missing":
        return f"`{shown}` is missing; it has no default.{more}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(cls, key, same[0])
    wanted = " or ".join(dict.fromkeys(_wanted(e) for e in same))
    if kind == "value_error":
        return f"`{shown}`: {wanted}{more}" if key else f"{wanted}{more}"
    return f"`{shown}` is {_short(same[0]['input'])}; it should be {wanted}.{more}"


def _tag_problem(cls: type[BaseModel], key: str, error: ErrorDetails) -> str:
    """Explain that the key that selects one of several sections is missing or wrong."""
    which = f"{key}.{error['ctx']['discriminator'].strip(chr(39))}"
    fields = [field for name, field in cls.model_fields.items() if name == key]
    known = [tag for field in fields for tag in _tags(field)]
    tag = error["ctx"].get("tag")
    if tag is None:
        return f"`{which}` is missing; there are {', '.join(known)}."
    near = difflib.get_close_matches(str(tag), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    return f"`{which}` is {_short(tag)}; {hint}"


def _tags(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The sections that a field may hold, by the tag that selects one; {} if no tag does."""
    name = field.discriminator
    if not isinstance(name, str):
        return {}
    return {model.model_fields[name].default: model for model in _models(field.annotation)}


def _dotted(node: Any, error: ErrorDetails) -> str:
    """The key as the user writes it: pydantic's location without the names of union branches."""
    keys = []
    for i, part in enumerate(error["loc"]):
        indices = range(len(node)) if isinstance(node, list) else ()
        inside = part in (node if isinstance(node, dict) else indices)
        if inside:
            node = node[part]
        if inside or (error["type"] == "missing" and i == len(error["loc"]) - 1):
            keys.append(str(part))
    return ".".join(keys)


def _wanted(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "model_attributes_type"):
        return "a section with keys of its own"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message.removeprefix("Input should be ").split(", unable to")[0]


def _nearest(cls: type[BaseModel], tree: dict[str, Any], key: str) -> str:
    """Suggest the key that the user may have meant instead of an unknown one."""
    *path, last = key.split(".")
    level: list[type[BaseModel]] = [cls]
    node: Any = tree
    chosen: list[type[BaseModel]] = []
    for part in path:
        fields = [m.model_fields[part] for m in level if part in m.model_fields]
        # A list's index and a dict's key are not fields: the models inside them are already in
        # `level`.
        level = [m for f in fields for m in _models(f.annotation)] if fields else level
        if isinstance(node, list) and part.isdecimal():
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.get(part)
        said = node if isinstance(node, dict) else {}
        chosen = [
            m for f in fields for t, m in _tags(f).items() if said.get(str(f.discriminator)) == t
        ]
        level = chosen or level  # a key of another task is not accepted here
    keys = list(dict.fromkeys(name for model in level for name in model.model_fields))
    near = difflib.get_close_matches(last, keys, n=1)
    if near:
        return f"did you mean `{'.'.join([*path, near[0]])}`?"
    elsewhere = [k for k, _ in _leaves(cls) if k.split(".")[-1] == last]
    if elsewhere and not chosen:
        where = re.sub(r"\[.*?\]", "", elsewhere[0])  # this part names one of several sections
        return f"did you mean `{where}`?"
    return f"the keys there are {', '.join(keys)}."


def _leaves(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field; a list's elements are under `0`, a dict's under `<name>`."""
    for name, field in cls.model_fields.items():
        key, inner = f"{prefix}{name}", _models(field.annotation)
        if inner != [field.annotation]:
            yield key, field
        origin = typing.get_origin(field.annotation)
        inside = "0." if origin is list else "<name>." if origin is dict else ""
        tags = {model: tag for tag, model in _tags(field).items()}
        for model in inner:
            tagged = f"[{tags[model]}]" if model in tags else ""
            yield from _leaves(model, f"{key}{tagged}.{inside}")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configs in a type: `list[A] | B | None` -> A, B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


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


def _short(value: Any) -> str:
    """The value as JSON, cut so that it fits a line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
