"""A second copy of a model, whose weights DeepSpeed's ZeRO-3 splits over the ranks: what is trained
under `scale.deepspeed.stage: 3`. As beside FSDP2's copy, the whole model generates, is scored
without gradients, and is saved. This file must not import the runner.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gearshift.models.sharded import unit_paths
from gearshift.runtime.deepspeed_config import require_deepspeed
from gearshift.runtime.distributed import world


class ZeroModel:
    """The copy of a whole model that an engine of DeepSpeed splits. DeepSpeed gathers a decoder
    layer around its forward and backward pass, and the rest (embedding, last norm, head) around the
    whole pass.
    """

    def __init__(self, whole: PreTrainedModel, layers: list[nn.Module] | None) -> None:
        """`layers` are the decoder layers; None finds Hugging Face's own. The copy is whole until
        its optimizer is made.

        Raises `ModelError` for a model whose weights have several precisions.
        """
        library: Any = require_deepspeed()
        self.whole = whole
        *paths, _ = unit_paths(whole, layers, "deepspeed.stage=3")
        self.model: PreTrainedModel = copy.deepcopy(whole)
        units = [self.model.get_submodule(path) for path in paths]
        self._parts = [list(unit.parameters()) for unit in units]
        """The parameters that are gathered at once: each decoder layer's, then the rest."""
        inside = {id(p) for part in self._parts for p in part}
        self._parts.append([p for p in self.model.parameters() if id(p) not in inside])
        passes = [_Pass() for _ in units]
        self.root = _Pass(self.model, *passes)
        """The module that an engine of DeepSpeed wraps."""
        for unit, part in zip([*passes, self.root], self._parts, strict=True):
            for p in part:  # described layers read weights without a call of their modules
                library.zero.register_external_parameter(unit, p)
        if layers is None:  # an expert that a rank sends no token to has a gradient of zeros
            for unit in units:
                library.utils.set_z3_leaf_module(unit, True)
        for unit, around in zip(units, passes, strict=True):
            vars(unit)["run"] = around
        vars(self.model)["run"] = self.root

    def write_whole(self) -> None:
        """Write the present weights into the whole model, one layer after the other. Its parameters
        stay where they are.
        """
        world().meet(self._write_whole, "the weights of layers")

    @torch.no_grad()
    def _write_whole(self) -> None:
        pairs = zip(self.model.parameters(), self.whole.parameters(), strict=True)
        target = {id(p): q for p, q in pairs}
        for part in self._parts:
            with require_deepspeed().zero.GatheredParameters(part):
                for p in part:
                    target[id(p)].copy_(p)

    def reset(self) -> None:
        """Nothing: after an error in a pass, the ranks end."""


class _Pass(nn.Module):
    """Work as a forward pass, around which DeepSpeed gathers the parameters that it has been given
    for this module.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleList(modules)

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)
