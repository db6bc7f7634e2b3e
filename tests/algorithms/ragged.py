"""Random rows of different lengths, as lists for oracles and as flat tensors for us."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = st.floats(-3, 3, allow_nan=False, width=32)


def rows(values: int = 1) -> st.SearchStrategy[list[list[tuple[float, ...]]]]:
    """1 to 5 rows of 1 to 7 tokens, `values` floats a token."""
    token = st.tuples(*[FLOATS] * values)
    return st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=5)


def column(data: list[list[tuple[float, ...]]], i: int) -> list[list[float]]:
    return [[token[i] for token in row] for row in data]


def flat(data: list[list[float]]) -> tuple[Tensor, Tensor]:
    """[M] float64, and the length of each row."""
    values = torch.tensor([x for row in data for x in row], dtype=torch.float64)
    return values, torch.tensor([len(row) for row in data])


def assert_rows(ours: Tensor, expected: list[list[float]], atol: float = 1e-9) -> None:
    assert torch.allclose(ours, flat(expected)[0], atol=atol)
