"""Attention as both gears compute it: one function for the arithmetic, and its entry in Hugging
Face's registry.

What a layer may attend to arrives as an argument of the model's forward (`layout=`), never as a
global.
Legend: B rows, S queries a row, L keys a row, H query heads, K key heads, R = H / K, D head size, T
packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging as hf_logging

from gearshift.batch import PackedBatch
from gearshift.errors import ModelError
from gearshift.kernels import build as native
from gearshift.kernels.reference import attend
from gearshift.kernels.specs import AttentionOptions

ATTENTION = "gearshift"
"""The name under which Hugging Face models find `hf_attention`."""
NO_INTERFACE = "its attention does not go through Hugging Face's attention interface"


class Layout(Protocol):
    """Carries one forward's attention: who sees whom, and where keys are kept."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[B, H, S, D] queries, [B, K, S, D] keys and values -> [B, H, S, D]."""
        ...


class LostLayoutError(ModelError):
    """An attention layer was called without being told which tokens belong together."""


def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [B, H, S, D] in, [B, S, H, D] out.

    Values of another size than the queries' (latent attention) are filled up with zeros, and what
    these become is cut off.
    """
    if layout is None:
        raise LostLayoutError(
            "This model was loaded for the engine; to call it directly, first run "
            "model.set_attn_implementation('sdpa')."
        )
    if s_aux is not None:
        raise ModelError("its attention has sinks, which the engine does not compute")
    if attention_mask is not None or others.get("position_bias") is not None:
        raise ModelError("it makes attention masks or biases itself, which the engine ignores")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scaling, dropout, sliding_window, softcap)
    layer = int(getattr(module, "layer_idx", 0) or 0)
    size, own = query.shape[-1], value.shape[-1]
    if own > size:
        raise ModelError("its values are longer than its queries, which its cache has no place for")
    if own < size:
        value = F.pad(value, (0, size - own))
    return layout.attend(query, key, value, layer, options).transpose(1, 2)[..., :own], None


AttentionInterface.register(ATTENTION, hf_attention)


def require_attention(model: PreTrainedModel) -> None:
    """Raises `ModelError` where the model would ignore a layout: every sequence would see every
    other.
    """
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(
            f"The model's attention is {model.config._attn_implementation!r}; "
            "the engine needs its own: run "
            f"model.set_attn_implementation({ATTENTION!r})."
        )


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Hugging Face's own attention; the model's comes back after. Raises `ModelError` where the
    model does not obey.
    """
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a model that does not obey only logs that
    try:
        for name in (ATTENTION, "eager"):
            model.set_attn_implementation(name)
            if model.config.get_text_config()._attn_implementation != name:
                raise ModelError(NO_INTERFACE)
        yield
    finally:
        hf_logging.set_verbosity(level)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


class PackedLayout:
    """Attention of a `PackedBatch`: a token sees those of its own sequence and of its sequence's
    ancestors whose position is not after its own.

    Only attention sees padded rows: sequences of about one length are computed together, and each
    row's keys are those of its ancestors, then its own. Everything else in a model runs on T
    tokens.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self.cu, self.parents = batch.cu_seqlens.contiguous(), batch.parents.contiguous()
        firsts = [first for first, _ in batch.trees()]
        self.trees = torch.tensor([*firsts, len(batch.parents)])

    @cached_property
    def rows(self) -> list[_Rows]:
        """Sequences of about one length and of one number of ancestors."""
        lengths = (self.cu[1:] - self.cu[:-1]).tolist()
        depth_of: list[int] = []
        for parent in self.parents.tolist():
            depth_of.append(0 if parent < 0 else depth_of[parent] + 1)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (length, depth) in enumerate(zip(lengths, depth_of, strict=True)):
            alike.setdefault((length.bit_length(), depth), []).append(i)
        return [_Rows(self.batch, members, depth) for (_, depth), members in alike.items()]

    @cached_property
    def back_T(self) -> Tensor:
        """[T]: where each token lies in the rows' outputs, end to end."""
        order_T = torch.cat([rows.tokens for rows in self.rows])
        back_T = torch.empty_like(order_T)
        back_T[order_T] = torch.arange(len(order_T), device=order_T.device)
        return back_T

    @cached_property
    def consecutive(self) -> bool:
        """Whether positions go up by one along each line of ancestors, so that what a query sees
        is a run of keys.
        """
        positions = self.batch.position_ids.cpu()
        steps = positions[1:] - positions[:-1]
        starts = self.cu[1:-1] - 1
        steps[starts] = 1
        child = self.parents >= 0
        ends = positions[self.cu[self.parents[child] + 1] - 1]
        return bool((steps == 1).all() and (positions[self.cu[:-1][child]] == ends + 1).all())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, H, T, D] queries, [1, K, T, D] keys and values -> [1, H, T, D]."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.packed(q, k, v, options).transpose(0, 1)[None]

    def packed(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] queries, keys and values -> [T, H, D]."""
        plain = options.softcap is None and not options.dropout and q.shape[-1] % 2 == 0
        if (
            plain and native.usable(q) and native.has("packed_attend", q.dtype) and self.consecutive
        ):  # fmt: skip
            seen: Tensor = _Compiled.apply(q, k, v, self, options)
            return seen
        out = torch.cat([rows.attend(q, k, v, options) for rows in self.rows])
        picked: Tensor = _Pick.apply(out, self.back_T, None)
        return picked


class _Rows:
    """Sequences that are computed together: N rows of at most S tokens, L keys each."""

    def __init__(self, batch: PackedBatch, members: list[int], depth: int) -> None:
        device, members_N = batch.input_ids.device, torch.tensor(members)
        lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]

        def places(sequences: Tensor) -> tuple[Tensor, Tensor]:
            """[n, longest] tokens of each sequence, filled up with its last, and which are real."""
            inside = torch.arange(int(lengths[sequences].max()))[None]
            length = lengths[sequences, None]
            return batch.cu_seqlens[sequences, None] + inside.minimum(length - 1), inside < length

        def flat(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
            """What `_Pick` takes, and the shape that it fills."""
            kept = torch.nonzero(real.flatten()).squeeze(1)
            return tokens.flatten().to(device), kept.to(device), tokens.shape

        positions = batch.position_ids.cpu()
        own, real = places(members_N)
        self.own, self.slots, self.shape = flat(own, real)
        self.tokens = self.own[self.slots]
        self.positions_NS = positions[own].to(device)
        key_positions, key_real = [positions[own]], [real]
        self.ancestors: list[tuple[Tensor, Tensor, torch.Size, Tensor]] = []
        for _ in range(depth):
            members_N = batch.parents[members_N]
            distinct, which_N = torch.unique(members_N, return_inverse=True)
            tokens, there = places(distinct)
            self.ancestors.insert(0, (*flat(tokens, there), which_N.to(device)))
            key_positions.insert(0, positions[tokens][which_N])
            key_real.insert(0, there[which_N])
        self.positions_NL = torch.cat(key_positions, 1).to(device)
        seen = torch.cat(key_real, 1).to(device)[:, None]
        seen = seen & (self.positions_NL[:, None] <= self.positions_NS[:, :, None])
        # A filled-up query must see something, or softmax makes NaN.
        self.mask = seen | ~real.to(device)[:, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """[T, heads, D] each -> [tokens of these rows, H, D]."""
        mask = self.mask
        if options.window is not None:
            distance = self.positions_NS[:, :, None] - self.positions_NL[:, None]
            mask = mask & (distance < options.window)
        query = _Pick.apply(q, self.own, self.slots).unflatten(0, self.shape)
        out = attend(query.transpose(1, 2), self._keys(k), self._keys(v), mask, options)
        return _Pick.apply(out.transpose(1, 2).flatten(0, 1), self.slots, None)

    def _keys(self, x: Tensor) -> Tensor:
        """[T, K, D] -> [N, K, L, D]: of each row's ancestors, then its own."""
        parts = [
            _Inherit.apply(_Pick.apply(x, tokens, kept).unflatten(0, shape), which)
            for tokens, kept, shape, which in self.ancestors
        ]
        parts.append(_Pick.apply(x, self.own, self.slots).unflatten(0, self.shape))
        return (torch.cat(parts, 1) if self.ancestors else parts[0]).transpose(1, 2)


class _Pick(torch.autograd.Function):
    """x[index]; the gradient comes back from the entries `kept` alone, which pick each row of x at
    most once (None: all do), so that nothing has to be added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, kept: Tensor | None) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(index, kept)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, kept = ctx.saved_tensors
        if kept is not None:
            index, grad = index[kept], grad[kept]
        back = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        back[index] = grad
        return back, None, None


class _Inherit(torch.autograd.Function):
    """x[which] where many entries pick one row: the gradient's sums are one matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, which: Tensor) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(which)
        return x[which]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (which,) = ctx.saved_tensors
        heirs = which[None] == torch.arange(ctx.rows, device=which.device)[:, None]
        return (heirs.to(grad.dtype) @ grad.flatten(1)).view(-1, *grad.shape[1:]), None


class _Compiled(torch.autograd.Function):
    """The same, compiled, for bf16 on a CPU: no scores are kept, and nothing is padded."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, options: AttentionOptions
    ) -> Tensor:
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        norms = torch.empty(q.shape[:2])
        ctx.save_for_backward(q, k, v, out, norms)
        ctx.layout, ctx.options = layout, options
        _Compiled.call("packed_attend", ctx, q, k, v, out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, norms = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        grad = grad.contiguous()
        _Compiled.call("packed_attend_backward", ctx, q, k, v, out, grad, norms, *grads)
        return *grads, None, None

    @staticmethod
    def call(name: str, ctx: Any, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> None:
        """Run one of the two passes."""
        layout, options = ctx.layout, ctx.options
        tensors = (q, k, v, *more, layout.cu, layout.parents, layout.trees)
        steps = (x.stride(0) for x in (q, k, v))
        native.call(
            name, q.dtype, *(x.data_ptr() for x in tensors), len(layout.trees) - 1, *steps,
            q.shape[1], k.shape[1], q.shape[2], options.scaling, options.window or 0,
        )  # fmt: skip
