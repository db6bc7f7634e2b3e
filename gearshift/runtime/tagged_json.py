"""JSON that keeps tuples and the types of keys: `{"tuple": [...]}`, `{"dict": [[key, value]]}`.

It knows Python's containers only; the caller encodes all other values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def encode(value: Any, leaf: Callable[[Any, str], Any] = lambda v, _: v, path: str = "") -> Any:
    """Lists, tuples and dicts as JSON; `leaf` encodes any other value, and gets its path."""
    if isinstance(value, list | tuple):
        items = [encode(item, leaf, f"{path}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = value.items()
        return {"dict": [[encode(k, leaf, path), encode(v, leaf, f"{path}.{k}")] for k, v in pairs]}
    return leaf(value, path)


def decode(value: Any, leaf: Callable[[str, Any], Any] | None = None) -> Any:
    """The inverse of `encode`; `leaf` decodes an object `{kind: content}` of any other kind."""
    if isinstance(value, list):
        return [decode(item, leaf) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(decode(item, leaf) for item in content)
    if kind == "dict" or leaf is None:
        return {decode(k, leaf): decode(v, leaf) for k, v in content}
    return leaf(kind, content)
