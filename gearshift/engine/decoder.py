"""One forward of the generation gear: tokens at places in, last hidden states out, keys and values
cached.

A described architecture runs as plain functions over the aliased buffers; any other through the
Hugging Face forward, with the same cache and the same attention.
Legend: T tokens, C hidden, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gearshift.engine.block_cache import KVCache
from gearshift.errors import ModelError
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import AttentionMetadata, AttentionOptions
from gearshift.models.describe import Plan, trunk_of
from gearshift.models.fused import AliasedWeights
from gearshift.models.layers import Angles, embed, layers
from gearshift.models.runner import ModelRunner


class Decoder:
    """A model in the generation gear: tokens at places in, logits out, keys and values cached."""

    def __init__(
        self,
        runner: ModelRunner,
        kernels: Kernels,
        cache: KVCache,
        max_length: int,
    ) -> None:
        """`max_length`: no token stands at this position or beyond."""
        self.max_length = max_length
        assert runner.head is not None, "the engine makes sure"
        self.model, self.plan, self.weights = runner.model, runner.plan, runner.weights
        self.head = runner.head
        self.kernels, self.cache = kernels, cache
        self._steps: dict[tuple[int, int], Step] = {}
        self._recorded_at = cache.moves

    def __call__(self, input_ids: Tensor, places: AttentionMetadata) -> Tensor:
        """[T] token ids at `places` -> [B, V] logits of the wanted ones."""
        with self._alone():
            if self.plan is None or self.weights is None:
                return self._logits(
                    hf_forward(self.model, self.kernels, self.cache, input_ids, places)
                )
            x, angles = embed(self.plan, input_ids, places.positions)
            return self._described(self.plan, self.weights, x, angles, places)

    def _alone(self) -> AbstractContextManager[Any]:
        """Where tensor operations do more than is exact, they are held to one order."""
        fine, plan = self.model.dtype == torch.float32, self.plan
        if self.head.softcap is not None:
            return self.kernels.batch_invariant()
        if fine and (plan is None or not all(isinstance(y.act, str) for y in plan.layers)):
            return self.kernels.batch_invariant()
        return nullcontext()

    def steps(
        self,
        input_ids: Tensor,
        positions: Tensor,
        table: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token after another for each of B rows: [B] newest tokens, their positions, [B, W]
        blocks, [B] temperatures, [S, B] uniforms. The blocks have room for S more, or what goes
        beyond is not needed.

        Returns the last step's [B, V] logits, good until the next call, [S, B] tokens and their
        log-probs; see `Kernels.sample`.
        """
        if self._recorded_at != self.cache.moves:
            self.forget()
        B, width = table.shape
        rows = self.kernels.padded_rows(B)
        # The last column is nobody's block: a row that has ended writes there.
        columns = -(-(width + 1) // 8) * 8
        step = self._steps.get((rows, columns))
        if step is None:
            step = self._steps[rows, columns] = Step(self, rows, columns)
        step.fill(input_ids, positions, table, temperature)
        tokens, logprobs = [], []
        for uniforms_B in uniforms:
            step.uniforms[:B] = uniforms_B
            logits = step.run()
            tokens.append(step.ids[:B].clone())
            logprobs.append(step.logprobs[:B].clone())
        return logits[:B], torch.stack(tokens), torch.stack(logprobs)

    def forget(self) -> None:
        """Record anew: something that steps read is elsewhere now."""
        self._steps.clear()
        self._recorded_at = self.cache.moves

    def _described(
        self,
        plan: Plan,
        weights: AliasedWeights,
        x: Tensor,
        angles: Angles,
        places: AttentionMetadata,
    ) -> Tensor:
        def attention(
            layer: int,
            qkv: Tensor,
            rotary: tuple[Tensor, Tensor] | None,
            options: AttentionOptions,
        ) -> Tensor:
            store = self.cache.layer(layer, qkv[:, : plan.kv_heads])
            query = self.kernels.apply_rotary_and_write(qkv, rotary, store, places)
            return self.kernels.attend(query, store, places, options)

        multiply, wanted = self.kernels.linear, places.logits_indices
        hidden = layers(
            plan, weights, self.kernels, x, angles, attention, wanted, multiply=multiply
        )
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.weights is None:
            return self.head.shaped(self.head.linear(hidden))
        return self.head.shaped(self.weights.head(hidden, self.kernels.linear))


class Step:
    """One step of so many rows, over tensors that stay where they are: recorded once, then called.

    The tokens that it draws are the next step's input.
    """

    def __init__(self, decoder: Decoder, rows: int, columns: int) -> None:
        device = decoder.model.device
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.table = torch.zeros((rows, columns), dtype=torch.int64, device=device)
        self.temperature = torch.ones(rows, device=device)
        self.uniforms = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(rows, device=device)
        self._places = AttentionMetadata(
            torch.arange(rows, device=device), self.positions, self.table
        )
        self._decoder = decoder
        self._run: Callable[[], Tensor] | None = None

    def fill(
        self, input_ids: Tensor, positions: Tensor, table: Tensor, temperature: Tensor
    ) -> None:
        """The rows' newest tokens; rows beyond them are nobody's."""
        B, width = table.shape
        self.ids[:B] = input_ids
        self.positions[:B] = positions - 1  # a step begins by going one on
        self.positions[B:] = -1
        self.table.zero_()
        self.table[:B, :width] = table
        self.temperature[:B] = temperature

    def run(self) -> Tensor:
        """The logits; `ids` and `logprobs` are then those of the tokens drawn."""
        if self._run is None:
            self._run = self._record()
        return self._run()

    def _record(self) -> Callable[[], Tensor]:
        decoder, places = self._decoder, self._places
        plan, weights = decoder.plan, decoder.weights

        def draw(logits: Tensor) -> Tensor:
            decoder.kernels.sample(logits, self.temperature, self.uniforms, self.ids, self.logprobs)
            return logits

        def advance() -> None:
            # A row that has ended may be drawn further, but no table of positions goes further.
            self.positions.add_(1).clamp_(max=decoder.max_length - 1)

        def plain() -> Tensor:
            advance()
            return draw(
                decoder(self.ids, AttentionMetadata(places.seq_ids, self.positions, self.table))
            )

        if plan is None or weights is None:
            return plain
        x, angles = embed(plan, self.ids, self.positions.clamp(min=0))

        def prepare() -> None:
            advance()
            places.refresh()
            now, turned = embed(plan, self.ids, self.positions)
            x.copy_(now)
            for old, new in zip(angles, turned, strict=True):
                old[0].copy_(new[0])
                old[1].copy_(new[1])

        def run() -> Tensor:
            return draw(decoder._described(plan, weights, x, angles, places))

        began = self.ids.clone(), self.positions.clone()
        recorded = decoder.kernels.capture(prepare, run)
        self.ids.copy_(began[0])  # recording took a step
        self.positions.copy_(began[1])
        return recorded or plain


def hf_forward(
    model: PreTrainedModel,
    kernels: Kernels,
    cache: KVCache,
    input_ids: Tensor,
    places: AttentionMetadata,
) -> Tensor:
    """[T] token ids at `places` -> [B, C] states of the wanted ones, through Hugging Face's own
    modules.
    """
    out = trunk_of(model)(
        input_ids=input_ids[None],
        position_ids=places.positions[None],
        use_cache=False,
        layout=CachedLayout(kernels, cache, places),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden if places.logits_indices is None else hidden[places.logits_indices]


class CachedLayout:
    """The attention of a Hugging Face model in the generation gear: write, then look."""

    def __init__(self, kernels: Kernels, cache: KVCache, places: AttentionMetadata) -> None:
        self.kernels, self.cache, self.places = kernels, cache, places
        self._written: set[int] = set()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, H, T, D] queries, [1, K, T, D] new keys and values -> [1, H, T, D]."""
        if layer in self._written:
            raise ModelError("it attends more than once in a layer, which has one place for keys")
        self._written.add(layer)
        qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).contiguous()
        store = self.cache.layer(layer, qkv[:, : key.shape[1]])
        query = self.kernels.apply_rotary_and_write(qkv, None, store, self.places)
        return self.kernels.attend(query, store, self.places, options).transpose(0, 1)[None]
