"""Checks that a model is computed correctly for the loaded checkpoint: a few tokens run through the
forms that will be used, and are compared with Hugging Face's own forward of each sequence alone.
This file does not know the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.errors import ModelError
from gearshift.kernels.specs import AttentionOptions
from gearshift.models.attention import LostLayoutError, PackedLayout, eager_attention
from gearshift.models.describe import Plan, head_of, trunk_of
from gearshift.models.exact import Limit, context_length, keeps_state, limits, named, shortest
from gearshift.models.hf_forward import hf_hidden

_LENGTHS = 8, 17
"""Tokens of the two sequences; the longer one needs a second block of the cache."""
NEW = 3
"""How many tokens of each sequence are written one by one."""
_DRAWS = 3
"""Different sequences that are tried before a model is refused: in a mixture of experts two may
score alike, and a rounding then picks another.
"""
_FINE, _COARSE = 1e-3, 0.1
"""What is tolerated in fp32 and in bf16, relative to how far logits spread. Leaks and wrong
positions are 0.1 to 1.5 of it, roundings 1e-6 and 0.03."""
_HEAD = (
    "its logits are not those of its head on its hidden states: the head has a transform, or a "
    "scale that is not known"
)
_LOST = (
    "a layer of it drops keyword arguments, so that attention does not know which tokens "
    "belong together"
)

Hidden = Callable[[PackedBatch], Tensor]
"""A packed batch to its last hidden states [T, H]."""
Decode = Callable[[list[list[int]]], list[Tensor]]
"""Token sequences to the logits [S, V] of each one's last tokens but one, S at most `NEW`, as a
batch that generates them computes them."""


@torch.no_grad()
def check(
    model: PreTrainedModel,
    plan: Plan | None,
    hidden: Hidden | None = None,
    decode: Decode | None = None,
    head: bool = True,
) -> Limit | None:
    """Compare what the engine computes with Hugging Face's eager attention; raises `ModelError`
    with the family and the reason if they differ. Returns up to which length they do not.

    Two sequences of 8 and 17 tokens are written in one batch by the generation gear (`decode`, if
    given): their prompts at once, their last three tokens one by one. Then they are scored packed
    (`hidden`; None: by the model's own modules), the second as a prompt with its completion. The
    logits of every position (`head`; else the hidden states) must be those of each sequence alone,
    up to 1e-3 of their spread in fp32, 0.1 in bf16.

    What it costs is bounded by the tokens: 6 forwards (7 without a plan) of at most 25, whatever
    the model; on a large one, as many times the reading of its weights. It leaves nothing behind.
    """
    if state := keeps_state(model):
        raise _refused(model, state)
    windows = {layer.attention.window for layer in plan.layers} if plan else set()
    hidden = hidden or _Watched(model, windows)
    longest = context_length(model.config) or 2**20
    found, draw = None, 0
    with _undisturbed(model):
        while draw < _DRAWS:
            tokens = sequences(model, draw, longest)
            try:
                why = _difference(model, tokens, hidden, decode, head)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except LostLayoutError as error:
                raise _refused(model, _LOST) from error
            except ModelError as error:
                raise _refused(model, str(error)) from error
            except Exception as error:
                said = next(iter(str(error).strip().splitlines()), "")
                raise _refused(model, f"{type(error).__name__}: {said}") from error
            limit = shortest(limits(model, windows))
            if why is None:
                return limit
            if limit and limit.tokens < max(map(len, tokens)):
                longest = limit.tokens  # longer ones are refused by the limit
            else:
                found, draw = found or why, draw + 1
    raise _refused(model, str(found))


def _difference(
    model: PreTrainedModel,
    tokens: list[list[int]],
    hidden: Hidden,
    decode: Decode | None,
    head: bool,
) -> str | None:
    """The fault that these sequences show; None if there is none."""
    with eager_attention(model):  # refuses at once where attention cannot be switched
        pass
    if "position_ids" not in signature(trunk_of(model).forward).parameters:
        raise ModelError(
            "it counts positions itself: a packed sequence goes on from the one before"
        )
    hidden_TH = hidden(packed(tokens, model.device))
    if head:
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ModelError("it has no linear language-model head")
        if linear.in_features != hidden_TH.shape[1]:
            raise ModelError(_HEAD)
    lengths = [len(row) for row in tokens]
    ours = (head_of(model).logits(hidden_TH) if head else hidden_TH).split(lengths)
    theirs = [alone(model, row, head) for row in tokens]
    if not all(bool(row.isfinite().all()) for row in theirs):
        raise ModelError(
            "Hugging Face's own forward of it gives numbers that are not finite, so its config "
            "(eps, rotary parameters) is not that of its weights"
        )
    if not (gap := _gap(model, ours, theirs)) <= 1:
        exact = [alone(model, row, False) for row in tokens]
        if head and _gap(model, hidden_TH.split(lengths), exact) <= 1:
            return _HEAD
        if _gap(model, [alone(model, row, False, counted=True) for row in tokens], exact) > 1:
            return "its positions do not count from 0"
        return f"packed sequences differ from each alone, by {gap:.3g} times what is tolerated"
    if decode is not None:
        written = decode(tokens)
        exact = [row[-len(new) - 1 : -1] for new, row in zip(written, theirs, strict=True)]
        if not (gap := _gap(model, written, exact)) <= 1:
            return f"what it writes differs from each alone, by {gap:.3g} times what is tolerated"
    return None


def _gap(model: PreTrainedModel, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """How far the rows of each sequence are from Hugging Face's, relative to how far those spread,
    over what is tolerated: above 1 is too far. Softmax does not see what all logits have in common.
    """
    worst = 0.0
    for pair in zip(ours, theirs, strict=True):
        mine, exact = (x.float() - x.float().mean(-1, keepdim=True) for x in pair)
        gap = tolerated(model, relative(mine, exact))
        if not gap <= worst:  # a NaN too
            worst = gap
    return worst


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """[S]: the distance of the rows of `ours` [S, n] from those of `theirs`, over their length."""
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)


def tolerated(model: PreTrainedModel, gaps: Tensor) -> float:
    """The gap of a sequence, from the [S] relative gaps of its tokens, over what is tolerated. In
    fp32 the worst token counts; in bf16 the median, for there a rounding sends single tokens to
    other experts.
    """
    if model.dtype in (torch.float32, torch.float64):
        return float(gaps.max() / _FINE)
    return float(gaps.median() / _COARSE)


def sequences(model: PreTrainedModel, draw: int, longest: int) -> list[list[int]]:
    """Tokens from the middle of the vocabulary, where no special ones are."""
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(draw)
    low, high = rows // 8, max(rows // 8 + 1, rows // 2)
    return [
        torch.randint(low, high, (min(length, longest),), generator=generator).tolist()
        for length in _LENGTHS
    ]


def packed(tokens: list[list[int]], device: torch.device) -> PackedBatch:
    """The first row whole; the second as a prompt and what follows it."""
    first, second = tokens
    cut = max(1, len(second) - NEW)
    lengths = [len(first), cut, len(second) - cut]
    positions = [*range(len(first)), *range(len(second))]
    return PackedBatch(
        input_ids=torch.tensor([*first, *second], device=device),
        position_ids=torch.tensor(positions, device=device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        parents=torch.tensor([-1, -1, 1]),
        loss_mask=torch.zeros(len(positions), dtype=torch.bool, device=device),
    )


def alone(model: PreTrainedModel, row: list[int], head: bool, counted: bool = False) -> Tensor:
    """Logits (or hidden states) of one sequence by Hugging Face's forward; `counted`: with its
    positions given, from 0 on.
    """
    given = {"input_ids": torch.tensor([row], device=model.device), "use_cache": False}
    if counted:
        given["position_ids"] = torch.arange(len(row), device=model.device)[None]
    with eager_attention(model):
        if head:
            logits: Tensor = model(**given).logits[0]
            return logits
        hidden: Tensor = trunk_of(model)(**given).last_hidden_state[0]
        return hidden


class _Watched:
    """A model's own modules over a packed batch; keeps the windows that attention is asked for."""

    def __init__(self, model: PreTrainedModel, windows: set[int | None]) -> None:
        self.model, self.windows = model, windows

    def __call__(self, batch: PackedBatch) -> Tensor:
        self.layout = PackedLayout(batch)
        return hf_hidden(self.model, batch, self)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        self.windows.add(options.window)
        return self.layout.attend(query, key, value, layer, options)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode; each module's own mode and the random numbers come back after."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _refused(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{named(model)} would be computed wrongly, so it is refused: {why}. docs/models.md lists "
        "the families that run."
    )
