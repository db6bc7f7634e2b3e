"""Detects changes of the weights, and copies new weights into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.models.adapters import adapted_layers, switched
from gearshift.models.load import ModelConfig, load_policy


class WeightsWatch:
    """Compares a model's parameters with their earlier state."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._adapted: list[nn.Module] = []
        self._captured: tuple[list[int], list[object]] = [], []
        self._state: tuple[object, ...] = ()
        self.moved()
        self.accept()

    @property
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """The device and the precision of the weights."""
        return next(self._model.parameters()).device, self._model.dtype

    def moved(self) -> bool:
        """Whether any parameter has another address than at the last call, or an adapter was
        switched, scaled or merged. Captured steps read the parameters by address, and repeat what
        adapters there were.
        """
        before = self._captured
        self._parameters = list(self._model.parameters())
        self._adapted = [layer for _, layer in adapted_layers(self._model)]
        addresses = [p.data_ptr() for p in self._parameters]
        self._captured = addresses, [*map(switched, self._adapted)]
        return self._captured != before

    def written(self) -> bool:
        """Whether the weights differ from those of the last `accept`: after every in-place write to
        a parameter (but through `.data`), and after an adapter is switched, scaled or merged.
        """
        return self._written_state() != self._state

    def accept(self) -> None:
        """Record the present state of the weights as known."""
        self._state = self._written_state()

    def _written_state(self) -> tuple[object, ...]:
        written = sum(p._version for p in self._parameters)
        return written, *map(switched, self._adapted)


def require_whole(model: PreTrainedModel) -> None:
    """Raises `ModelError` if a parameter is split over processes, as FSDP and ZeRO-3 do."""
    for name, parameter in model.named_parameters():
        # A DTensor's mesh, FSDP1's flat parameters, and what ZeRO-3 leaves of a parameter.
        split = hasattr(parameter, "device_mesh") or hasattr(parameter, "_is_flat_param")
        if split or not parameter.numel():
            raise ModelError(
                f"`{name}` is split over processes, as FSDP and DeepSpeed do, and an engine needs "
                "whole weights in one process; give it a model that is not wrapped."
            )


@torch.no_grad()
def copy_weights(model: PreTrainedModel, weights: Path | Mapping[str, Tensor]) -> None:
    """Write the weights of a saved model's folder, or tensors by parameters' names, into the model.

    Raises `ModelError` if they are not all of the model's, each with its shape; nothing is written
    then.
    """
    if isinstance(weights, Path):
        dtype = str(model.dtype).removeprefix("torch.")
        config = ModelConfig.model_validate({"name": str(weights), "dtype": dtype, "device": "cpu"})
        weights = dict(load_policy(config).named_parameters())
    own = dict(model.named_parameters())
    for name in sorted(own.keys() ^ weights.keys()):
        which = "lack" if name in own else "have"
        raise ModelError(f"The new weights {which} `{name}`; give those of this very model.")
    for name, parameter in own.items():
        if weights[name].shape != parameter.shape:
            raise ModelError(
                f"The new weights have `{name}` of shape {tuple(weights[name].shape)}, and the "
                f"model of {tuple(parameter.shape)}; give those of this very model."
            )
    for name, parameter in own.items():
        parameter.copy_(weights[name])
