"""YAML as people write it. Scalars remember their own text, so that a key of type text gets what
was written (`007`, `1e3`, `no`, `2026-01-01`).
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union

import yaml

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import one_line

MAX_BYTES = 1 << 20
"""How many bytes a recipe may have; the recipes of this project have a few thousand."""
MAX_DEPTH, MAX_VALUES, MAX_NUMBER_LENGTH = 50, 20_000, 400
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class YamlScalar:
    """A number or a truth value of the file: its value, and its text."""

    value: bool | int | float
    text: str

    def __str__(self) -> str:
        return self.text


def coerce(value: Any, annotation: Any) -> Any:
    """Convert the value for a field of this type: a text field gets the text, any other field the
    value.
    """
    kinds = list(_kinds(annotation))
    if isinstance(value, YamlScalar):
        meant = (bool, Any) if isinstance(value.value, bool) else (bool, int, float, Any)
        scalars = any(kind in (str, bool, int, float) for kind in kinds)
        return value.text if scalars and not any(k in meant for k in kinds) else value.value
    if isinstance(value, list):
        wanted = next((k for k in kinds if typing.get_origin(k) in (list, tuple, set)), Any)
        inner = [part for part in typing.get_args(wanted) if part is not ...] or [Any]
        return [coerce(v, inner[min(i, len(inner) - 1)]) for i, v in enumerate(value)]
    if isinstance(value, dict):
        wanted = next((k for k in kinds if typing.get_origin(k) is dict), None)
        if wanted is None and any(hasattr(kind, "model_fields") for kind in kinds):
            return value  # a section converts its own fields
        inside = typing.get_args(wanted)[1] if wanted else Any
        return {key: coerce(v, inside) for key, v in value.items()}
    return value


def _kinds(annotation: Any) -> typing.Iterator[Any]:
    """The types that an annotation allows; a word of a `Literal` counts as text."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _kinds(part)
    elif origin is Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    elif origin is Literal:
        yield from {type(word) for word in typing.get_args(annotation)}
    else:
        yield annotation


class _Loader(yaml.SafeLoader):
    """Reads the scalars of YAML 1.2, and those of 1.1 that mean nothing else in 1.2 (`yes`,
    `1_000`).
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}
        """For each complete node, how many values it contains when its aliases are written out."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse a file that has no end, or hardly one, when its aliases are written out."""
        event = self.peek_event()
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _refuse(f"it is nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                _refuse(f"the alias `{one_line(str(event.anchor), 40)}` contains itself", event)
            self._values += self._sizes[id(node)]
        else:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        if self._values > MAX_VALUES:
            _refuse(f"it holds more than {MAX_VALUES:,} values", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are text; a key that is given twice is an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                _refuse(f"the key `{one_line(name, 60)}` is given twice", key)
            seen.add(name)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)


def _refuse(problem: str, at: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _written(loader: _Loader, node: yaml.ScalarNode) -> YamlScalar:
    text = node.value
    kind = node.tag.removeprefix(_TAG)
    if len(text) > MAX_NUMBER_LENGTH:
        _refuse(f"a number has {len(text):,} characters", node)
    try:
        if kind == "bool":
            return YamlScalar(
                {"yes": True, "on": True, "true": True}.get(text.lower(), False), text
            )
        if kind == "int":
            plain = text.lower().replace("_", "")
            return YamlScalar(int(plain, 0 if re.match("[-+]?0[xob]", plain) else 10), text)
        return YamlScalar(float(re.sub(r"\.(?=inf|nan)", "", text.lower()).replace("_", "")), text)
    except ValueError:
        _refuse(f"`{one_line(text, 40)}` is not a value of type {kind}", node)


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F_]+|0b[01_]+",
    # YAML 1.1 requires a dot and a signed exponent in a float, so `1e-5` would be a text.
    "float": r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), None)
for _kind in ("bool", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _written)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text that `_Loader`, or YAML 1.1, would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    **yaml.SafeDumper.yaml_implicit_resolvers,
    **_Loader.yaml_implicit_resolvers,
}


def to_yaml(tree: Any) -> str:
    """The tree as YAML, which reads back as the same tree."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


# PyYAML itself raises the last two for a value that does not fit its tag, such as `!!timestamp`.
_BROKEN = (yaml.YAMLError, RecursionError, ValueError, AttributeError, TypeError)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises `ConfigError`, with the line, if it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"{path} has more than {MAX_BYTES:,} bytes; a recipe has a few thousand."
            )
        return yaml.load(content.decode("utf-8"), _Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check its rights.") from None
    except _BROKEN as error:
        raise ConfigError(f"{path} is not valid YAML: {_problem(error)}.") from None


def parse_override(override: str, text: str) -> Any:
    """The value of an override. A text that begins with a bracket, a brace or a quote is YAML; any
    other text is one scalar up to its last letter, so a `#` does not cut it and a `: ` does not
    make it a section.
    """
    text = text.strip()
    try:
        if text[:1] in ("[", "{", "'", '"'):
            return yaml.load(text, _Loader)
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        known = tag.removeprefix(_TAG) in ("null", "bool", "int", "float")
        return loader.construct_object(yaml.ScalarNode(tag, text)) if known else text
    except _BROKEN as error:
        raise ConfigError(
            f"The value of the override `{one_line(override, 100)}` is not valid YAML "
            f"({_problem(error)}); quote it."
        ) from None


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, AttributeError | TypeError):
        return "a tag does not fit its value"
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(str(error))
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}: " if mark else ""
    return where + one_line(error.problem or error.context or "it cannot be read")
