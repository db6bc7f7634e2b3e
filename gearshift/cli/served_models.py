"""The models that a server offers: which they are, what they take in memory, and their loading.
Policies whose adapters stand on one base share its weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import echo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gearshift.pipeline.recipe import Recipe
    from gearshift.serve.metrics import Metrics
    from gearshift.serve.policies import Policies

GIB = 2**30


class Named(NamedTuple):
    """A model to serve: its name for clients, its folder or its name in a hub, its run's recipe."""

    name: str
    source: str
    recipe: Recipe | None


def models_of(run: str, against: list[str]) -> list[Named]:
    """The models to serve; the first one is called `policy`. Raises `ConfigError`."""
    from gearshift.pipeline.policy import find_policy

    source, recipe = find_policy(run)
    found = [Named("policy", source, recipe)]
    for word in against:
        stage = Path(run).expanduser() / word
        if word == "base" and recipe:
            one = Named("base", recipe.model.name, recipe)
        elif recipe and (stage / "config.json").exists():
            one = Named(word, str(stage), recipe)
        else:
            one = Named(Path(word).expanduser().resolve().name, *find_policy(word))
        if one.name in {other.name for other in found}:
            raise ConfigError(
                f"Two models would be called {one.name}; rename the folder {one.source}."
            )
        found.append(one)
    return found


class _Place(NamedTuple):
    """Where a policy's weights are."""

    source: str
    """Its own folder or name; that of the base model that others have too, if it is shared."""
    adapter: Path | None = None
    """What is added to a shared base model at each call."""


def _places(named: list[Named]) -> list[_Place]:
    """Where the weights of each are. An adapter stays apart from its base model where another
    policy has the same base; otherwise it is added to the base's weights, which is faster.
    """
    from gearshift.models.shared_base import separable

    apart = [separable(each.source) for each in named]
    bases = Counter(
        _resolved(found[1] if found else each.source)
        for each, found in zip(named, apart, strict=True)
    )
    return [
        _Place(_resolved(found[1]), found[0])
        if found and bases[_resolved(found[1])] > 1
        else _Place(_resolved(each.source))
        for each, found in zip(named, apart, strict=True)
    ]


def _resolved(source: str) -> str:
    """One text for each folder; a name stays as it is."""
    from gearshift.models.embedded import source_of

    place = Path(source_of(source)).expanduser()
    return str(place.resolve()) if place.is_dir() else source


def print_memory(named: list[Named]) -> None:
    """Print how much memory the weights take, before they do. Raises `ConfigError` if they cannot
    fit.
    """
    from gearshift.models.load import ModelConfig, resolve_device
    from gearshift.runtime.free_memory import free_bytes

    config = named[0].recipe.model if named[0].recipe else ModelConfig()
    free, total = free_bytes(resolve_device(config.device)), 0.0
    there: set[str] = set()
    for each, place in zip(named, _places(named), strict=True):
        files = [] if place.source in there else _loaded(place.source)
        there.add(place.source)
        files += _weights(str(place.adapter)) if place.adapter else []
        size = sum(path.stat().st_size for path in files)
        total += size
        line = f"{each.name}: {each.source}, {size / GIB:.2f} GiB of weights"
        shares = f", beside those of {place.source}" if place.adapter else ""
        echo(line + shares, file=sys.stderr)
    if total > free:
        raise ConfigError(
            f"The weights take {total / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; "
            "name fewer models with --against."
        )
    echo(f"memory: {total / GIB:.2f} of {free / GIB:.2f} GiB that are free", file=sys.stderr)


def load_all(
    named: list[Named], seed: int, policies: Policies, metrics: Metrics, stack: ExitStack
) -> None:
    """Load the models, start their engines, and serve them; `stack` ends the engines."""
    from gearshift.cli.talk import system_of
    from gearshift.engine import Engine
    from gearshift.engine.service import EngineService
    from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
    from gearshift.models.shared_base import copy_on_base, with_adapter
    from gearshift.serve.policies import Policy

    places = _places(named)
    bases: dict[str, PreTrainedModel] = {}
    for each, place in zip(named, places, strict=True):
        config = each.recipe.model if each.recipe else ModelConfig()
        if place.source not in bases:
            bases[place.source] = load_policy(config, place.source)
        model = bases[place.source]
        if place.adapter:
            model = with_adapter(copy_on_base(model), place.adapter)
        elif places.count(place) > 1:
            model = copy_on_base(model)  # the same model under two names
        tokenizer = load_tokenizer(config, each.source)
        engine = Engine(model, tokenizer, seed=seed)
        service = stack.enter_context(EngineService(engine))
        digest, system = _digest(each.source), system_of(each.recipe)
        policy = Policy(each.name, service, tokenizer, system, engine.end_tokens, digest)
        policies.add(policy)
        metrics.serve(policy)


def _loaded(source: str) -> list[Path]:
    """The files of the weights that a policy takes in memory. An adapter is added to its base
    model's weights when it is loaded, so each adapter takes as much as its base.
    """
    from gearshift.models.adapter_files import adapter_folder, base_of
    from gearshift.models.embedded import source_of

    folder = Path(source_of(source)).expanduser()
    while folder.is_dir() and (adapter := adapter_folder(folder)):
        folder = Path(source_of(base_of(adapter)))
    return _weights(str(folder))


def _weights(source: str) -> list[Path]:
    """The files of the weights; none for a name that is no folder."""
    folder = Path(source).expanduser()
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def _digest(source: str) -> str:
    """8 hexadecimal digits that differ for other weights."""
    from gearshift.runtime.digests import file_digest

    known = [file_digest(path) for path in _weights(source)] or [source]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]
