"""The memory of a micro-batch's forward and backward pass, measured on models of two and of three
layers: their difference is what a layer takes, and the rest is taken by head and embedding. It
needs no weights of the real model. It must not import a stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from gearshift.batch import PackedBatch, pack_groups
from gearshift.kernels.build import kernels_left_out
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.attention import ATTENTION
from gearshift.models.exact import context_length
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.runtime.peak_memory import NoDraws, peak_memory
from gearshift.runtime.terminal import one_line
from gearshift.trainers.needs import MemoryNeeds, Tree

_MOST = 4096
"""Tokens that are measured at most; more take as many times the memory."""
_CLASSES = {
    "logprobs": AutoModelForCausalLM,
    "scores": AutoModelForSequenceClassification,
    "token_logits": AutoModelForTokenClassification,
}


@dataclass
class Activations:
    """What a stage's micro-batches take, beside the gradients of the whole model."""

    config: PretrainedConfig
    needs: MemoryNeeds
    dtype: torch.dtype
    device: torch.device
    lora: AdapterConfig | None = None
    policy: type[PreTrainedModel] | None = None
    """The class of the policy, where `AutoModelForCausalLM` does not find it by the config: a model
    of images keeps the config of its text part."""
    unknown: str = ""
    """Why they could not be measured."""
    _known: dict[tuple[int, bool], float] = field(default_factory=dict)

    def bytes(self, tokens: int, recompute: bool) -> float:
        """At the peak of a micro-batch of so many tokens; `recompute`: layers are computed again in
        the backward pass. The embedding's gradient is in it, and no other one. 0 if it cannot be
        measured: a figure ends no run.
        """
        key = min(tokens, _MOST), recompute
        if key not in self._known:
            try:
                self._known[key] = self._measured(*key)
            except Exception as error:  # a model of the hub runs code of its own
                self._known[key] = 0.0
                self.unknown = one_line(f"{type(error).__name__}: {error}", 200)
        return self._known[key] * tokens / key[0]

    def _measured(self, tokens: int, recompute: bool) -> float:
        tree, longest = self.needs.tree, context_length(self.config) or 2**20
        prompt = min(tree.prompt, longest // 2)
        tree = Tree(prompt, tree.completions, min(tree.length, longest - prompt))
        batch = _batch(tree, tokens, self.needs.head != "token_logits").to(self.device)
        two, three = (self._peaks(n, batch, recompute) for n in (2, 3))
        layers = self.config.get_text_config().num_hidden_layers
        more = max(0, layers * (2 if self.needs.critic else 1) - 3)
        deep = max(b + more * max(0.0, b - a) for a, b in zip(two, three, strict=True))
        return deep * max(1.0, tokens / len(batch))

    def _peaks(self, layers: int, batch: PackedBatch, recompute: bool) -> tuple[float, float]:
        """The peak of one pass through a model of so many layers, without its layers' gradients: up
        to the first layer's gradient, and with the embedding's. The embedding takes as much in a
        deep model, so that it can be the peak of a shallow one only, unless it has a part for each
        layer.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            runner = self._runner(layers, recompute)
            model, up_to_layers = runner.model, 0.0
            tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}

            def run(peak: Callable[[], float]) -> None:
                def arrived(parameter: Tensor) -> None:
                    nonlocal up_to_layers
                    parameter.grad = None
                    if parameter not in tables:
                        up_to_layers = peak()

                learned = [p for p in model.parameters() if p.requires_grad]
                hooks = [p.register_post_accumulate_grad_hook(arrived) for p in learned]
                score: Any = getattr(runner, self.needs.head)
                out = score(batch)
                (out.logprobs if self.needs.head == "logprobs" else out).sum().backward()
                for hook in hooks:
                    hook.remove()

            if self.device.type == "cuda":
                run(lambda: 0.0)  # what libraries allocate once
            with kernels_left_out(), peak_memory(self.device) as peak:
                run(peak)
                return up_to_layers, peak()

    def _runner(self, layers: int, recompute: bool) -> ModelRunner:
        config, kind = _cut_to(self.config, layers), self.needs.head
        with NoDraws():
            with torch.device(self.device):
                model = self._model(config)
            if kind == "logprobs":
                model.set_attn_implementation(ATTENTION)
                if self.lora:
                    add_adapter(model, self.lora)
            model.eval()
            undescribed = OF_TOKENS if kind == "token_logits" else None
            again = recompute and kind == "logprobs"
            # The check computes with the weights, which nothing has written.
            runner = ModelRunner(model, recompute=again, undescribed=undescribed, checked=False)
        model.train(self.needs.dropout)
        return runner

    def _model(self, config: PretrainedConfig) -> PreTrainedModel:
        kind = self.needs.head
        if kind == "logprobs" and self.policy and type(config) is self.policy.config_class:
            return self.policy._from_config(config, dtype=self.dtype)
        return _CLASSES[kind].from_config(config, dtype=self.dtype)


def _cut_to(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a model with so many layers, the first ones. Each has keys and values of its
    own, where a model's last layers take those of earlier ones: that needs more memory.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, (value * layers)[:layers])
    if getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = 0
        if getattr(text, "use_double_wide_mlp", False):  # in those last layers alone
            text.intermediate_size *= 2
    text.num_hidden_layers = layers
    cut.num_labels = 1
    return cut


def _batch(tree: Tree, tokens: int, spread: bool) -> PackedBatch:
    """So many tokens, unless one row is longer: whole trees, and what is left over. With `spread`
    the completions have between half of their length and all of it, as attention may pad them.
    """
    groups: list[tuple[list[int], list[tuple[list[int], list[int]]]]] = []
    left, nth = tokens, 0
    while left > tree.prompt + 1 or not groups:
        left -= tree.prompt
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < tree.completions and (left > 1 or not (rows or groups)):
            share = 1 - (0.382 * nth % 1) / 2 if spread else 1.0
            length = max(2, round(share * tree.length))
            if nth:
                length = min(length, left)
            nth, left = nth + 1, left - length
            rows.append(([1] * length, [int(tree.prompt > 0), *[1] * (length - 1)]))
        groups.append(([1] * tree.prompt, rows))
    return pack_groups(groups)
