"""The base class of every component's config, and how YAML and `key=value` words fill one.

`explain.py` explains what is wrong with one, `keys.py` lists its keys.
This file knows no component; the config classes stand beside the components.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from gearshift.errors import ConfigError
from gearshift.runtime.explain import explain
from gearshift.runtime.keys import models_of, short, tags_of
from gearshift.runtime.terminal import one_line
from gearshift.runtime.urls import check_no_secret
from gearshift.runtime.yaml_text import MAX_DEPTH, coerce, parse_override, read_yaml, to_yaml

C = TypeVar("C", bound="Config")
T = TypeVar("T")
RECORDED = {"recorded": True}
"""The validation context of a config that a run has recorded, without its neutral keys."""
_NEUTRAL = "cannot change what comes of a run"
Neutral = Annotated[T, _NEUTRAL]
"""The type of a key whose value may change while a run is resumed."""


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("a path needs at least one character, and no null character.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a path must not contain half of a character.") from None
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
        for key, why in cls.unused(tree).items():
            raise ValueError(f"`{'.'.join(key)}` is set and not used, because {why}")
        tree = cls.filled(tree)
        types = {name: field.annotation for name, field in cls.model_fields.items()}
        return {key: coerce(value, types.get(key, Any)) for key, value in tree.items()}

    @classmethod
    def filled(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree with what one of its keys stands for; a class with presets says what."""
        return tree

    @classmethod
    def unused(cls, tree: dict[str, Any]) -> dict[tuple[str, ...], str]:
        """The keys that the tree sets and that nothing reads, each with the reason and the way out;
        a class whose sections exclude each other says which.
        """
        return {}


def load(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """The config in the YAML file at `path` (None: all defaults), changed by `overrides`.

    An override is `key.sub=value` or, for a list, `key.0.sub=value`; its value is one scalar up to
    its last letter, or YAML in brackets, braces or quotes. A key of type text gets the text as it
    is written. Where overrides make a section one of another kind (`task.name=...`), or one that
    is not used (`algorithm=dpo`), nothing of the file's section stays. Raises `ConfigError`, one
    line, on a missing or broken file, a bad override, or a bad key, type or value.
    """
    tree = read_mapping(path) if path else {}

    def write(tree: dict[str, Any]) -> None:
        for override in overrides:
            _apply(tree, override)

    tree = overridden(cls, tree, write)
    return validated(cls, tree, f"{path}: " if path else "")


def validated(cls: type[C], tree: dict[str, Any], where: str = "") -> C:
    """The config that this tree describes. Raises `ConfigError`, one line that begins with `where`,
    on a bad key, type or value.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise ConfigError(where + explain(cls, tree, errors)) from None


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


def from_identity(kind: type[C], tree: Any) -> C:
    """The config of an `identity`; the keys that it lacks have their defaults, which their class
    may refuse elsewhere. Raises `ValidationError` if another version wrote it.
    """
    return kind.model_validate(tree, context=RECORDED)


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
    return [] if before == after else [f"`{key}` was {short(before)} and is {short(after)}"]


def overridden(
    cls: type[Config], tree: dict[str, Any], write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The tree after `write` has changed it; a section whose kind the change switches, or that it
    puts out of use, starts empty.
    """
    changed = copy.deepcopy(tree)
    write(changed)
    kinds, unused = _kinds(cls, changed), cls.unused(tree)
    switched = [key for key, kind in _kinds(cls, tree) if (key, kind) not in kinds]
    switched += [key for key in cls.unused(changed) if key not in unused]
    if not switched:
        return changed
    for key in switched:
        _delete(tree, key)
    write(tree)
    return tree


def _kinds(cls: type[Config], tree: Any, at: tuple[str, ...] = ()) -> list[tuple[Any, str]]:
    """The sections of the tree that may be of several kinds, each by its keys, and their kinds."""
    found: list[tuple[Any, str]] = []
    tree = cls.filled(tree) if isinstance(tree, dict) else {}
    for name, field in cls.model_fields.items():
        section, key = tree.get(name), (*at, name)
        if not isinstance(section, dict):
            continue
        if tags := tags_of(field):
            kind = section.get(str(field.discriminator))
            found += [(key, kind)] if isinstance(kind, str) and kind in tags else []
        else:
            for model in models_of(field.annotation):
                found += _kinds(model, section, key) if issubclass(model, Config) else []
    return found


def _delete(tree: dict[str, Any], key: Sequence[str]) -> None:
    """Take the section out of the tree, if it is there."""
    *path, last = key
    node: Any = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)


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
        raise ConfigError(f"{path} is not a regular file; name the YAML file itself.")
    if not path.is_file():
        names = [f.name for f in path.parent.glob("*") if f.is_file()]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path."
        raise ConfigError(f"There is no file {path}; {hint}")
    tree = read_yaml(path)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} holds {short(tree)}; a recipe is made of `key: value` lines.")
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
                    f"The override `{shown}`: the list `{here}` has no entry"
                    f" `{one_line(part, 40)}`; it has {len(node)}, counted from 0."
                )
        elif not isinstance(node, dict):
            raise ConfigError(
                f"The override `{shown}`: `{here}` is {short(node)}, which contains no keys."
            )
        if depth == len(parts) - 1:
            node[slot] = value
        elif isinstance(node, dict) and node.get(slot) is None:
            node[slot] = {}
        node = node[slot]
