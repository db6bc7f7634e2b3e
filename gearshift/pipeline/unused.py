"""The keys that a recipe sets and that nothing reads, because of what it says elsewhere. This file
knows keys, and must not import what runs a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gearshift.runtime.config import Config
from gearshift.runtime.yaml_text import coerce
from gearshift.trainers.presets import PREFERENCE, algorithm_of, expand, takes_pairs_of_reward

Key = tuple[str, ...]


def unused_keys(
    recipe: Mapping[str, Any],
    stages: Sequence[str],
    policies: Sequence[str],
    sections: Mapping[str, type[Config]],
) -> Iterator[tuple[Key, str]]:
    """Each unused key of the recipe's tree, with the reason and the way out. `policies` are those
    of its `stages` that train the policy, `sections` the classes of `eval` and `environment`.
    """
    name = algorithm_of(recipe)
    if name in PREFERENCE:
        why = f"algorithm={name} takes the place of rl; leave it out, or choose an algorithm of rl."
        yield from ((("rl", key), why) for key in _set(recipe.get("rl")))
    if name in PREFERENCE and takes_pairs_of_reward(recipe):
        why = (
            f"algorithm={name} takes the pairs of reward, and trains no reward model; leave it out."
        )
        keys = [key for key in _set(recipe.get("reward")) if key not in ("data", "heldout")]
        yield from ((("reward", key), why) for key in keys)
    tree = expand(recipe)
    made = [stage for stage in stages if tree.get(stage) is not None]
    if tree.get("task") is None:
        why = "the recipe has no task; set task.name, or leave it out."
        for section, cls in sections.items():
            yield from (((section, key), why) for key in _changed(cls, tree.get(section)))
    elif "rl" not in made and "perplexity" in _changed(sections["eval"], tree.get("eval")):
        yield ("eval", "perplexity"), "the recipe has no section rl; leave it out."
    if made and not set(made) & set(policies) and _set(tree.get("model")).get("lora"):
        why = "no stage trains the policy; leave it out, or add one of " + ", ".join(policies) + "."
        yield ("model", "lora"), why


def _set(section: Any) -> Mapping[str, Any]:
    """The keys that a section, written or made, was given."""
    if isinstance(section, Config):
        return {key: getattr(section, key) for key in section.model_fields_set}
    return section if isinstance(section, Mapping) else {}


def _changed(cls: type[Config], section: Any) -> list[str]:
    """The keys of a section that have another value than their default."""
    fields = cls.model_fields
    given = {key: value for key, value in _set(section).items() if key in fields}
    return [k for k, v in given.items() if coerce(v, fields[k].annotation) != fields[k].default]
