"""Which layer of a model is computed differently: the residual stream after each layer, in both
gears, beside that of Hugging Face's own forward. This file does not know the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.models.check import Decode, Hidden, alone, packed, relative, sequences, tolerated
from gearshift.models.describe import Plan, trunk_of
from gearshift.models.exact import context_length

Stream = list[list[Tensor]]
"""For each layer the states [T, H] after it, one entry a forward."""


class LayerGap(NamedTuple):
    """How far the states after a layer are from Hugging Face's, over what is tolerated."""

    layer: int
    training: float
    generation: float | None


@torch.no_grad()
def layer_gaps(
    model: PreTrainedModel, plan: Plan | None, hidden: Hidden, decode: Decode | None = None
) -> list[LayerGap]:
    """The gap of each layer, in the order of the layers; empty where the layers are not found.

    The sequences, `hidden` and `decode` are those of `check`. Distances are relative to the length
    of a state. Above 1 is more than `check` tolerates of the logits.
    """
    units = _decoder_layers(model, plan)
    tokens = sequences(model, 0, context_length(model.config) or 2**20)
    exact = [_record(units, False, partial(alone, model, row, False)) for row in tokens]
    theirs = [[calls[0] for calls in layer] for layer in zip(*exact, strict=True)]
    batch = packed(tokens, model.device)
    trained = _record(units, plan is not None, lambda: hidden(batch))
    written = _record(units, plan is not None, lambda: decode(tokens)) if decode else None
    lengths = [len(row) for row in tokens]
    gaps = []
    for i, rows in enumerate(theirs):
        training = _gap(model, trained[i][0].split(lengths), rows)
        generation = None if written is None else _gap(model, *_newest(written[i], rows))
        gaps.append(LayerGap(i, training, generation))
    return gaps


def _newest(calls: list[Tensor], theirs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each sequence the states that its last logits come from: by the generation gear, and by
    Hugging Face. The first forward computes the prompts, each later one a token of each sequence.
    """
    known = torch.tensor([len(row) - len(calls) for row in theirs])
    ends = known.cumsum(0) - 1
    first = calls[0] if len(calls[0]) == len(theirs) else calls[0][ends.to(calls[0].device)]
    ours = torch.stack([first, *calls[1:]], 1)
    return list(ours), [row[-len(calls) - 1 : -1] for row in theirs]


def _gap(model: PreTrainedModel, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(tolerated(model, relative(mine, exact)) for mine, exact in pairs)


def _decoder_layers(model: PreTrainedModel, plan: Plan | None) -> list[nn.Module]:
    if plan is not None:
        return [layer.unit for layer in plan.layers]
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in trunk_of(model).modules() if isinstance(m, nn.ModuleList))
    return list(next((found for found in lists if len(found) == count), []))


def _record(units: list[nn.Module], described: bool, run: Callable[[], Any]) -> Stream:
    """The states after each layer while `run` runs."""
    stream: Stream = [[] for _ in units]
    with ExitStack() as stack:
        for unit, states in zip(units, stream, strict=True):
            recorder = _described(unit, states) if described else _module(unit, states)
            stack.enter_context(recorder)
        run()
    return stream


@contextmanager
def _described(unit: Any, states: list[Tensor]) -> Iterator[None]:
    """Record a described layer: the residual stream and what is still to be added to it."""
    before = vars(unit)["run"]

    def run(work: Callable[..., Any], *args: Any) -> Any:
        x, delta = before(work, *args)
        states.append(x.float() + delta.float())
        return x, delta

    vars(unit)["run"] = run
    try:
        yield
    finally:
        vars(unit)["run"] = before


@contextmanager
def _module(unit: nn.Module, states: list[Tensor]) -> Iterator[None]:
    """Record a layer of Hugging Face's, which gives [1, T, H], alone or first in a tuple."""

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out)[0].float())

    handle = unit.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
