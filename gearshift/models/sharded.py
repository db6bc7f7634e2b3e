"""A second copy of a model, whose weights FSDP2 splits over the ranks: what is trained under
`scale.strategy: fsdp`. The whole model, in the precision that it runs in, stays beside it: it
generates, is scored without gradients, and is saved. Where other processes generate, it gives its
weights away. This file must not import the runner.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from gearshift.errors import ConfigError, ModelError
from gearshift.models.exact import named
from gearshift.models.units import make_unit
from gearshift.runtime.distributed import Part, world
from gearshift.runtime.sharded_parameter import loaded_rows, own_rows, saved_rows


class ShardedModel:
    """The split copy of a whole model. Each decoder layer is a unit: FSDP2 gathers its weights
    around it. The rest (embedding, last norm, head) is the root unit, because a tied head must not
    be in two units.
    """

    def __init__(
        self, whole: PreTrainedModel, layers: list[nn.Module] | None, keep_whole: bool = True
    ) -> None:
        """`layers` are the decoder layers; None finds Hugging Face's own. If `keep_whole` is false,
        the whole model's parameters have no memory afterwards (device "meta").

        Each rank makes a unit's weights in fp32 and keeps its rows of them, one unit after the
        other. Raises `ModelError` for a model whose weights have several precisions, `ConfigError`
        for an older torch.
        """
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"scale.strategy=fsdp needs torch 2.13, and this is {torch.__version__}; take a "
                "newer one, or replicate."
            )
        paths = unit_paths(whole, layers, "strategy=fsdp")
        self.whole, self.device = whole, whole.device
        kind = next(whole.parameters()).dtype
        source: dict[int, str] = {}
        """By the id of a parameter of the copy: the name of the whole model's parameter."""
        empty: dict[int, Any] = {}
        for name, p in whole.named_parameters():
            meta = torch.empty_like(p, dtype=torch.float32, device="meta")
            empty[id(p)] = nn.Parameter(meta, requires_grad=p.requires_grad)
            source[id(empty[id(p)])] = name
        self.model: PreTrainedModel = copy.deepcopy(whole, empty)
        policy = MixedPrecisionPolicy(
            param_dtype=None if kind == torch.float32 else kind,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # No layer's output is written in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = _mesh(self.device)
        self._units: list[tuple[Any, dict[str, str]]] = []
        """Each unit, with the names of its parameters in it and in the whole model."""
        for path in paths:
            unit: Any = self.model.get_submodule(path)
            names = _fill(unit, whole, source)
            self._units.append((unit, names))
            if not keep_whole:
                _empty(whole, names.values())
            fully_shard(unit, mesh=mesh, mp_policy=policy)
            unit.set_gradient_divide_factor(1.0)  # a loss is already weighted over the whole batch
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_reduce_scatter_unused_params(True)  # an expert that a rank sends no token to
            make_unit(unit)
            register_fsdp_forward_method(unit, "run")

    def write_whole(self) -> None:
        """Write the present weights into the whole model, one unit after the other. Its parameters
        stay where they are. All ranks call it.
        """

        @torch.no_grad()
        def write() -> None:
            for name, weights in self._gathered():
                self.whole.get_parameter(name).copy_(weights)

        world().meet(write, "the weights of layers")

    def whole_state(self) -> dict[str, Tensor]:
        """The present state of the whole model, on the host of the main rank; empty on the others.
        All ranks call it. The name of a tied head is not in it.
        """
        state: dict[str, Tensor] = {}

        @torch.no_grad()
        def keep() -> None:
            if world().main:
                own = self.whole.state_dict().items()
                state.update({name: x.cpu() for name, x in own if not x.is_meta})
            for name, weights in self._gathered():
                if world().main:
                    like = self.whole.get_parameter(name).dtype
                    state[name] = weights.to("cpu", like, copy=True)

        world().meet(keep, "the weights of layers")
        return state

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and whole weights, which stay until the next one is asked for.
        Gradients must be off.
        """
        for unit, names in self._units:
            unit.unshard()
            own = dict(unit.named_parameters())
            for name, in_whole in names.items():
                yield in_whole, own[name]
            unit.reshard()

    def state_dict(self) -> dict[str, Tensor | Part]:
        """This rank's rows of the weights, in the whole model's precision, for a checkpoint."""
        kind = self.whole.dtype

        def own(x: Tensor) -> Tensor:  # a tied head is a copy: files cannot share memory
            return own_rows(x).to(kind if x.is_floating_point() else x.dtype, copy=True)

        return {name: saved_rows(x, own(x)) for name, x in self.model.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, of this model or of a whole one."""
        for name, x in self.model.state_dict().items():
            own_rows(x).copy_(loaded_rows(x, state[name]))

    def reset(self) -> None:
        """Forget a forward or backward pass that an error has cut."""
        root: Any = self.model
        root.reset_iter_state()


def unit_paths(whole: PreTrainedModel, layers: list[nn.Module] | None, chosen: str) -> list[str]:
    """The names of the modules around which weights are gathered: the decoder layers, then the
    model. `chosen` is the key that splits it. Raises `ModelError` for weights of several
    precisions.
    """
    kinds = {p.dtype for p in whole.parameters()}
    if len(kinds) > 1:
        listed = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ModelError(
            f"{named(whole)} has weights of several precisions ({listed}), which "
            f"scale.{chosen} cannot split; take replicate, or model.dtype=float32."
        )
    names = {id(module): name for name, module in whole.named_modules()}
    found = _decoder_layers(whole) if layers is None else layers
    return [*(names[id(layer)] for layer in found), ""]


def _fill(unit: nn.Module, whole: PreTrainedModel, source: dict[int, str]) -> dict[str, str]:
    """Give the unit's parameters that have no memory yet that of their source in fp32; returns
    their sources' names by their own.
    """
    made: dict[int, nn.Parameter] = {}
    found: dict[str, str] = {}
    for prefix, module in unit.named_modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta:
                continue
            if id(p) not in made:
                weights = whole.get_parameter(source[id(p)]).detach().to(torch.float32, copy=True)
                made[id(p)] = nn.Parameter(weights, requires_grad=p.requires_grad)
                found[f"{prefix}.{name}" if prefix else name] = source[id(p)]
            module._parameters[name] = made[id(p)]
    return found


def _empty(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Take the memory of these parameters away; their shapes and precision stay."""
    own = [model.get_parameter(name) for name in names]
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in own}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in empty:
                module._parameters[name] = empty[id(p)]


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that Hugging Face never splits, in the lists that they are in; without those that
    share a weight with another part.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    found = [layer for each in lists for layer in each if type(layer).__name__ in kinds]
    inside = {module for layer in found for module in layer.modules()}
    users = Counter(id(p) for layer in found for p in layer.parameters())
    for module in model.modules():
        if module not in inside:
            users.update(id(p) for p in module.parameters(recurse=False))
    return [layer for layer in found if all(users[id(p)] == 1 for p in layer.parameters())]


def _mesh(device: torch.device) -> DeviceMesh:
    """All ranks in one row; on several nodes a row for each: weights are split inside a node, and
    each node has them all (HSDP).
    """
    size, split = world().size, world().split
    if split < size:
        names = ("replicate", "shard")
        return init_device_mesh(device.type, (size // split, split), mesh_dim_names=names)
    return init_device_mesh(device.type, (size,))
