"""JSON that keeps tuples and the types of dict keys."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gearshift.runtime.tagged_json import decode, encode

KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    KEYS | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


def shape(value: Any) -> Any:
    """The value with the type of each part, for 1 == True == 1.0."""
    if isinstance(value, list | tuple):
        return type(value), [shape(item) for item in value]
    if isinstance(value, dict):
        return dict, [(shape(k), shape(v)) for k, v in value.items()]
    return type(value), value


@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert shape(decode(json.loads(json.dumps(encode(value))))) == shape(value)


def test_names_of_kinds_are_keys_like_others() -> None:
    value = {"a": (1, [2, (3,)]), "b": {4: "x", "tuple": [5]}, "dict": None}
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_other_values_are_the_callers() -> None:
    paths: list[str] = []
    made = encode(
        {"a": [1j]},
        lambda v, path: paths.append(path) or {"complex": str(v)} if isinstance(v, complex) else v,
    )
    assert paths == [".a.0"] and decode(made, lambda kind, text: complex(text)) == {"a": [1j]}
