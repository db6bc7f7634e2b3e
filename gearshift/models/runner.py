"""The one way in which a model is run: policy, reference, critic and reward model alike.

A described architecture runs as plain functions over its own weights (`layers.py`); any other one
through Hugging Face's modules (`hf_forward.py`). This file does not know which stage asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.errors import DataError, GearshiftError
from gearshift.kernels.dispatch import kernels_of
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import Head
from gearshift.models.adapters import adapted_layers
from gearshift.models.check import check
from gearshift.models.classifier import (
    leaves,
    pack_unscored,
    padded_logits,
    padded_scores,
    reads_last_token,
    whole_sequences,
)
from gearshift.models.describe import Plan, described, head_of
from gearshift.models.exact import Limit
from gearshift.models.fused import AliasedWeights
from gearshift.models.hf_forward import has_active_dropout, has_dropout, hf_hidden
from gearshift.models.layers import described_hidden
from gearshift.models.logprobs import TokenScores, token_logprobs
from gearshift.models.sharded import ShardedModel
from gearshift.models.units import make_unit, run_in
from gearshift.models.vocabulary import vocabulary_size
from gearshift.models.work import TrainingWork
from gearshift.models.zero import ZeroModel
from gearshift.runtime.distributed import world
from gearshift.runtime.ends_alone import ends_alone

Form = Literal["described", "hugging_face"]
Decode = Callable[["ModelRunner", list[list[int]]], list[Tensor]]
"""A function from token sequences to the logits of each one's last tokens, as a generating engine
computes them.
"""
EXACT = "its scores are to be exactly those of Hugging Face's forward"
"""The reason why a classifier that is not trained runs through Hugging Face's modules."""
OF_TOKENS = "the logits of a token classifier are not described"


class ModelRunner:
    """A model and the form in which it runs.

    `hidden`, `logprobs` and `values` are for decoders; `scores` and `token_logits` are for
    classifiers, which may be encoders. Gradients flow where they are enabled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        value_head: nn.Module | None = None,
        recompute: bool = False,
        undescribed: str | None = None,
        fuse: bool = True,
        decode: Decode | None = None,
        checked: bool = True,
        keep_whole: bool = True,
    ) -> None:
        """Fuse the weights of a described architecture, and compare what is computed with Hugging
        Face's own forward; raises `ModelError` where they differ.

        Args:
            value_head: reads `values` from the hidden states.
            recompute: keep only each layer's input, and compute the layer again in the backward
                pass. For described architectures.
            undescribed: a reason to run Hugging Face's modules, though the architecture may be
                described.
            fuse: see `FusedLinear`.
            decode: compare what a generating engine computes, too.
            checked: False makes no comparison, for the one caller that shows the differences.
            keep_whole: whether the whole model stays in memory beside a copy that is split over the
                ranks. If not, the split copy computes everything.
        """
        self.keep_whole = keep_whole
        self.model, self.value_head, self.recompute = model, value_head, recompute
        self.plan: Plan | None = None
        self.why = undescribed
        """Why the model is not described; None where it is."""
        if undescribed is None:
            self.plan, self.why = described(model)
        self.head, linear = _heads(model)
        if self.plan is not None and linear is None:
            self.plan, self.why = None, "it has no linear head on its hidden states"
        make_unit(model)
        self.weights: AliasedWeights | None = None
        if self.plan is not None:
            assert linear is not None
            fuse = fuse and (keep_whole or not self._splits)
            self.weights = AliasedWeights(self.plan, linear, fuse)
            for layer in self.plan.layers:
                make_unit(layer.unit)
        self.kernels: Kernels = kernels_of(model)
        self.vocabulary = vocabulary_size(model)
        self.work = TrainingWork(model, self.plan)
        """What was trained: see there."""
        self.learner = self
        """The runner that computes what needs gradients: this one, or that of a split copy. Where
        no whole model is kept, it computes everything.
        """
        self._sharded: ShardedModel | ZeroModel | None = None
        self.limit: Limit | None = None
        packs = self.head is not None or value_head is not None or self.weights is not None
        if packs and checked:
            hidden = None if self.weights is None else self._described
            written = None if decode is None else lambda tokens: decode(self, tokens)
            self.limit = check(model, self.plan, hidden, written, head=self.head is not None)

    @property
    def form(self) -> Form:
        """Whether the model runs by its description or through Hugging Face's modules."""
        return "hugging_face" if self.weights is None else "described"

    def form_line(self, role: str) -> str:
        """One line that says how the model of this role runs, and why."""
        return form_line(role, self.model, self.why)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: the model's parameters. Where models are split over the ranks,
        it is this rank's rows of a copy's, which computes what needs gradients from now on; the
        model then has the copy's weights as of the last `weights_changed`. A model with adapters is
        not split, because only they have gradients.

        Raises `ModelError` for a model that cannot be split.
        """
        self.split()
        return list(self.learner.model.parameters())

    def split(self) -> None:
        """Split the model over the ranks, where `scale.strategy` splits models. Raises `ModelError`
        for a model that cannot be split.
        """
        if self._splits and self._sharded is None:
            self._shard()

    @property
    def _splits(self) -> bool:
        return world().sharded and not adapted_layers(self.model)

    def _shard(self) -> None:
        layers = None if self.plan is None else [layer.unit for layer in self.plan.layers]
        if world().deepspeed is None:
            self._sharded = ShardedModel(self.model, layers, self.keep_whole)
        else:
            self._sharded, self.keep_whole = ZeroModel(self.model, layers), True
        self.learner = ModelRunner(
            self._sharded.model,
            value_head=self.value_head,
            recompute=self.recompute,
            undescribed=self.why,
            fuse=False,
            checked=False,
        )
        for name in ("work", "limit", "kernels"):
            setattr(self.learner, name, getattr(self, name))

    @property
    def zero_root(self) -> nn.Module | None:
        """What DeepSpeed's ZeRO-3 splits of the model; None where it splits nothing."""
        return self._sharded.root if isinstance(self._sharded, ZeroModel) else None

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        for runner in {self, self.learner}:
            runner.model.train(mode)

    def weights_changed(self) -> None:
        """Write the weights of the split copy, if there is one, into the whole model, if it is
        kept. All ranks must call it.
        """
        if self._sharded and self.keep_whole:
            self._sharded.write_whole()

    @property
    def kept(self) -> PreTrainedModel:
        """The model that has the weights in memory: the whole one, or the split copy."""
        return self.model if self.is_whole else self.learner.model

    @property
    def stateful(self) -> PreTrainedModel | ShardedModel:
        """What gives the weights to a checkpoint, and takes them from one."""
        return self.model if self.is_whole else cast(ShardedModel, self._sharded)

    @property
    def is_whole(self) -> bool:
        """Whether `model` has its weights: each rank has all of them."""
        return self.keep_whole or self._sharded is None

    def whole_state(self) -> dict[str, Tensor] | None:
        """The model's state by name, on the main rank's host, where no whole model is kept; else
        None. All ranks must call it.
        """
        if self.is_whole:
            return None
        assert isinstance(self._sharded, ShardedModel)
        return self._sharded.whole_state()

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[T, H] last hidden states of the packed tokens. Raises `DataError` for a token that the
        model does not have, `CapacityError` for a sequence that is too long for it.
        """
        return self._run("_hidden", batch)

    def logprobs(
        self, batch: PackedBatch, temperature: float = 1.0, value_head: nn.Module | None = None
    ) -> TokenScores:
        """Log-probs, entropy and (with `value_head`) values of the scored tokens, from one pass.

        Log-probs are under softmax(logits / temperature).
        """
        return self._run("_logprobs", batch, temperature, value_head)

    def values(self, batch: PackedBatch) -> Tensor:
        """[M] float32: the value of the state before each scored token."""
        return self._run("_values", batch)

    def scores(self, batch: PackedBatch) -> Tensor:
        """[N] float32: a classifier's score of each sequence that no other one continues.

        A described decoder computes what sequences have in common once. Any other model runs on
        padded rows.
        """
        if self.shares_prompts:
            return self._run("_scores", batch)
        if reads_last_token(self.model):
            return self._run("_padded_scores", batch)
        return self._run_forward("_padded_scores", batch)

    @torch.no_grad()
    def score_all(
        self, sequences: Sequence[Sequence[int]], micro_batch_tokens: int = 8192
    ) -> list[float]:
        """Scores of many token sequences, in batches of similar length, without gradients."""
        scores = [0.0] * len(sequences)
        batch: list[int] = []
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for i, after in zip_longest(order, order[1:]):
            batch.append(i)
            if after is None or len(sequences[after]) * (len(batch) + 1) > micro_batch_tokens:
                packed = pack_unscored([sequences[j] for j in batch]).to(self.kept.device)
                values = self.scores(packed).tolist()
                for j, value in zip(batch, values, strict=True):
                    scores[j] = value
                batch = []
        return scores

    def token_logits(self, batch: PackedBatch) -> Tensor:
        """[T] float32: a token classifier's one logit of each token; no sequence continues another
        one. The model runs on padded rows.
        """
        return self._run_forward("_token_logits", batch)

    @property
    def shares_prompts(self) -> bool:
        """Whether `scores` computes once what sequences have in common, without padding."""
        return self.weights is not None and not has_active_dropout(self.model)

    @property
    def _acting(self) -> ModelRunner:
        return self.learner if torch.is_grad_enabled() or not self.is_whole else self

    def _run(self, name: str, *args: Any) -> Any:
        """The method of this name, by the runner that computes now, inside its model's unit."""
        runner = self._acting
        try:
            with nullcontext() if self.is_whole else ends_alone():
                return run_in(runner.model, getattr(runner, name), *args)
        except BaseException:
            if self._sharded:
                self._sharded.reset()
            raise

    def _run_forward(self, name: str, batch: PackedBatch) -> Any:
        """The same where the work calls the model's own forward, around which FSDP gathers."""
        return self._run(name, batch) if self.zero_root else getattr(self._acting, name)(batch)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        if len(batch) and (last := int(batch.input_ids.max())) >= self.vocabulary:
            raise DataError(
                f"A row has the token {last} and the model {self.vocabulary} tokens; take out what "
                "stands for an image or a sound."
            )
        if self.limit:
            self.limit.check(batch)
        self.work.add(batch)
        if self.weights is not None and not has_active_dropout(self.model):
            return self._described(batch)
        if self.recompute:
            raise GearshiftError(
                "engine.recompute is built for described architectures without dropout; switch it "
                "off, or lower micro_batch_tokens to save memory."
            )
        return hf_hidden(self.model, batch)

    def _described(self, batch: PackedBatch) -> Tensor:
        assert self.plan is not None and self.weights is not None
        return described_hidden(self.plan, self.weights, self.kernels, batch, self.recompute)

    def _logprobs(
        self, batch: PackedBatch, temperature: float, value_head: nn.Module | None
    ) -> TokenScores:
        assert self.head is not None
        rows_MH = self._hidden(batch)[batch.logit_indices]
        self.work.add_head(batch)
        scores = token_logprobs(self.head, rows_MH, batch.targets, temperature)
        return scores if value_head is None else scores._replace(values=value_head(rows_MH))

    def _values(self, batch: PackedBatch) -> Tensor:
        assert self.value_head is not None
        values: Tensor = self.value_head(self._hidden(batch)[batch.logit_indices])
        return values

    def _padded_scores(self, batch: PackedBatch) -> Tensor:
        return padded_scores(self.model, whole_sequences(batch))

    def _token_logits(self, batch: PackedBatch) -> Tensor:
        return padded_logits(self.model, whole_sequences(batch))

    def _scores(self, batch: PackedBatch) -> Tensor:
        last_N = batch.cu_seqlens[1:][leaves(batch)] - 1
        last_NH = self._hidden(batch)[last_N.to(batch.input_ids.device)]
        scores: Tensor = cast(Any, self.model).score(last_NH)[:, 0].float()
        return scores


def form_line(role: str, model: PreTrainedModel, why: str | None) -> str:
    """One line that says how the model of this role runs, and why. `why` it is not described."""
    modules = "Hugging Face's modules, about 2 times slower,"
    if why is not None:
        return f"{role}: {modules} because {why}"
    line = f"{role}: described layers ({model.config.model_type})"
    return f"{line}; {modules} where its dropout is on" if has_dropout(model) else line


def _heads(model: PreTrainedModel) -> tuple[Head | None, nn.Module | None]:
    """The head that gives tokens their log-probabilities, and the last linear layer."""
    if model.get_output_embeddings() is not None:
        head = head_of(model)
        return head, head.linear
    return None, cast(Any, model).score if reads_last_token(model) else None
