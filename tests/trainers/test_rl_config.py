"""The section `rl`: a method has the keys that it reads and no others, presets stand under what is
said, and another kind of section begins anew.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import dump, load, validated
from gearshift.trainers import presets
from gearshift.trainers.preference import PreferenceConfig
from gearshift.trainers.rl.config import KLConfig, RLConfig, RolloutConfig
from gearshift.trainers.rl.methods import CriticConfig, GSPOLoss, PPOClipLoss

REFUSED = [
    (["algorithm=grpo", "rl.advantage.lam=0.9"], "`rl.advantage.lam`; grpo has no lam, gae has;"),
    (["algorithm=rloo", "rl.loss.clip_high=0.3"], "`rl.loss.clip_high`; reinforce has no clip_hi"),
    (["algorithm=gspo", "rl.loss.dual_clip=3"], "gspo has no dual_clip, ppo_clip has;"),
    (["rl.value.init_from=reward"], "head has no init_from, critic has;"),
    (["algorithm=grpo", "rl.value.kind=critic"], "`rl.value`: the advantage grpo uses no values;"),
    (["algorithm=ppo", "rl.advantage.name=rloo", "rl.value.warmup=2"], "`rl.value`: the advantage"),
    (["algorithm=grpo", "rl.rollout.group_size=1"], "`rl.advantage`: grpo compares completions"),
    (["rl.rollout={group_size: 1, replace_zero_std: 1}"], "`rl.rollout.replace_zero_std`: rewards"),
    (["rl.kl.ratio=true"], "`rl.kl.ratio`: it multiplies a KL in the loss;"),
    (["rl.kl={beta: 0, target: 6}"], "`rl.kl.target`: beta is 0"),
    (["algorithm=grpo", "rl.kl={beta: 0, ratio: true}"], "`rl.kl.ratio`: beta is 0"),
    (["rl.kl={beta: 0, reference: teacher}"], "`rl.kl.reference`: beta is 0"),
    (["rl.kl.horizon=100"], "`rl.kl.horizon`: only a target adapts beta;"),
    (["rl.importance.cap=3"], "`rl.importance.mode` is missing"),
    (["rl.sft_mix.weight=0.1"], "rl.sft_mix.data.sources is empty"),
    (["algorithm=grpo", "rl.algorithm=rloo"], "algorithm is grpo and rl.algorithm is rloo"),
    (["algorithm=dpo", "rl.steps=3"], "`rl.steps` is set and not used, because algorithm=dpo t"),
    (["preference.algorithm=ipo", "rl.steps=3"], "`rl.steps` is set and not used"),
    (["algorithm=dpo", "reward.center=1"], "`reward.center` is set and not used"),
    (["rl.steps=3", "eval.limit=4"], "`eval.limit` is set and not used, because the recipe has no"),
    (["sft.epochs=1", "environment.processes=2"], "`environment.processes` is set and not used"),
    (["task.name=sentiment", "eval.perplexity=true"], "`eval.perplexity` is set and not used"),
    (["reward.epochs=1", "model.lora.rank=2"], "`model.lora` is set and not used, because no s"),
    (["preference={loss: ipo, margin: 1}"], "`preference.margin`: loss=ipo does not read it;"),
    (["algorithm=orpo", "preference.reference=each_step"], "`preference.reference`: loss=orpo"),
    (["reward.heldout.sources=[{path: a, weight: 2}]"], "`reward.heldout`: held-out sources are"),
    (["rl.rewards=[{source: 'model:a', ensemble: min}]"], "ensemble is for several reward models"),
    (["sft.optimizer={schedule: constant, warmup: 3}"], "`sft.optimizer.warmup`: schedule=const"),
    (["rl={steps: 3, value: {warmup: 4}}"], "`rl.value`: warmup=4 is more than steps=3, so the"),
    (["rl.advantage=grpo"], "it should be a section with keys of its own, such as {name: grpo}."),
    (["rl.value=both"], "it should be a section with keys of its own, such as {kind: head}."),
    (["rl.advantage.name=null"], "`rl.advantage.name` is null;"),
    (["rl.rewards={source: model}"], '`rl.rewards` is {"source": "model"}; it should be a list.'),
    (["rl.loss.name=gpso"], '`rl.loss.name` is "gpso"; did you mean gspo?'),
]  # fmt: skip
MEANT = [
    ("rl.lam", "`rl.advantage.lam`"), ("rl.prompts", "`rl.rollout.prompts`"),
    ("rl.max_new_tokens", "`rl.rollout.max_new_tokens`"), ("rl.whiten", "`rl.advantage.whiten`"),
    ("rl.optimizer.lr", "`rl.value.optimizer` or `rl.update.optimizer`"),
    ("rl.value_optimizer.lr", "`rl.value.optimizer`"), ("rl.value_clip", "`rl.value.clip`"),
    ("rl.episode_timeout", "`rl.rollout.timeout` or `rl.rewards.0.timeout`"),
    ("rl.missing_end_penalty", "`rl.shaping.missing_eos_penalty`"), ("rl.stepz", "`rl.steps`"),
    ("rl.max_tokens", "`rl.rollout.max_new_tokens` or `rl.update.micro_batch_tokens`"),
    ("sft.max_tokens", "`sft.micro_batch_tokens`"), ("rl.grup_size", "`rl.rollout.group_size`"),
    ("rl.truncated", "`rl.shaping.mask_truncated_completions`"), ("rl.ema", "`rl.update.ema`"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda v: " ".join(v)[:60])
def test_what_is_set_and_not_used_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(Recipe, None, words)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_override_may_choose_what_puts_a_section_of_the_file_out_of_use(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "task: {name: sentiment}\nreward: {epochs: 2, data: {sources: [{path: a}]}}\n"
        "rl: {steps: 3}\neval: {limit: 4, perplexity: true}\n"
    )
    recipe = load(Recipe, file, ["algorithm=dpo"])
    assert recipe.rl is recipe.reward is None and recipe.preference
    assert recipe.preference.data.sources[0].path == "a"
    assert (recipe.eval.limit, recipe.eval.perplexity) == (4, False)
    assert load(Recipe, file, ["algorithm=grpo"]).rl == RLConfig(algorithm="grpo", steps=3)
    with pytest.raises(ConfigError, match=r"`rl.rollout` is set and not used"):
        load(Recipe, file, ["algorithm=dpo", "rl.rollout.prompts=2"])
    file.write_text("algorithm: dpo\nrl: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"`rl.steps` is set and not used"):
        load(Recipe, file)
    (tmp_path / "whole.yaml").write_text(dump(recipe))
    assert load(Recipe, tmp_path / "whole.yaml") == recipe


@pytest.mark.parametrize(("key", "meant"), MEANT)
def test_an_unknown_key_is_told_where_it_belongs(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(Recipe, None, [f"{key}=1"])
    assert f"did you mean {meant}?" in str(refused.value)


@pytest.mark.parametrize("name", presets.RL)
def test_a_preset_is_the_same_from_python_and_in_a_recipe(name: Any) -> None:
    recipe = Recipe.model_validate({"algorithm": name})
    assert RLConfig(algorithm=name) == recipe.rl
    assert RLConfig.model_validate({"algorithm": name}) == recipe.rl
    assert Recipe.model_validate({"rl": {"algorithm": name}}) == recipe


@pytest.mark.parametrize("name", presets.PREFERENCE)
def test_a_preset_of_preferences_too(name: Any) -> None:
    recipe = Recipe.model_validate({"algorithm": name})
    assert PreferenceConfig(algorithm=name) == recipe.preference
    assert Recipe.model_validate({"preference": {"algorithm": name}}) == recipe
    assert PreferenceConfig(algorithm=name, beta=0.7).beta == 0.7
    with pytest.raises(ValidationError, match=f"and preference.algorithm is {name}; name one"):
        other = "kto" if name == "dpo" else "dpo"
        Recipe.model_validate({"algorithm": other, "preference": {"algorithm": name}})


def test_what_is_said_stands_over_the_preset() -> None:
    config = RLConfig(algorithm="ppo", loss={"clip_high": 0.3}, value={"init_from": "reward"})
    assert config.loss == PPOClipLoss(clip_high=0.3) and config.shaping.clip == 5.0
    assert isinstance(config.value, CriticConfig) and config.value.optimizer.lr == 5e-6
    other = RLConfig(algorithm="grpo", loss=GSPOLoss())
    assert other.loss == GSPOLoss(), "a section of another kind has nothing of the preset's"
    with pytest.raises(ValidationError, match="uses no values"):
        RLConfig(algorithm="grpo", value=CriticConfig())
    assert RLConfig(algorithm="ppo", advantage={"name": "rloo"}).value is None


def test_a_section_made_in_python_stands_over_the_preset_by_what_it_sets() -> None:
    made = RLConfig(
        algorithm="dapo",
        rollout=RolloutConfig(prompts=2),
        loss=PPOClipLoss(dual_clip=3.0),
    )
    written = {"rollout": {"prompts": 2}, "loss": {"dual_clip": 3.0}}
    assert made == RLConfig.model_validate({"algorithm": "dapo", **written})
    assert made.rollout.replace_zero_std == 2 and made.loss.clip_high == 0.28
    grpo = RLConfig(algorithm="grpo", kl=KLConfig(beta=0.1))
    assert (grpo.kl.beta, grpo.kl.estimator, grpo.kl.where) == (0.1, "k3", "loss")
    ppo = RLConfig(algorithm="ppo", value=CriticConfig(init_from="reward"))
    assert ppo == RLConfig(algorithm="ppo", value={"init_from": "reward"})
    assert Recipe(rl=made) == Recipe(algorithm="dapo", rl=made)
    with pytest.raises(ValidationError, match="rl was made without it; give it to RLConfig too"):
        Recipe(algorithm="grpo", rl=RLConfig(steps=3))


def test_a_null_algorithm_of_the_section_is_none_of_its_own() -> None:
    assert load(Recipe, None, ["algorithm=ppo", "rl.algorithm=null"]).algorithm == "ppo"


def test_another_kind_on_the_command_line_begins_a_section_anew(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "algorithm: ppo\nrl:\n  advantage: {lam: 0.9}\n  loss: {clip_high: 0.3}\n"
        "  value: {init_from: reward, warmup: 2}\n  rollout: {prompts: 3}\n"
    )

    def rl(*words: str) -> RLConfig:
        config = load(Recipe, path, words).rl
        assert config is not None and config.rollout.prompts == 3
        return config

    assert rl("rl.advantage.gamma=0.5").advantage.parameters() == {"gamma": 0.5, "lam": 0.9}
    assert rl("rl.advantage.name=gae").advantage.parameters()["lam"] == 0.9, "it is that already"
    switched = rl("rl.advantage.name=rloo")
    assert switched.advantage.parameters() == {} and switched.value is None
    assert rl("rl.loss.clip_low=3e-4", "rl.loss.name=gspo").loss == GSPOLoss()
    other = rl("algorithm=grpo")
    assert (other.advantage.name, other.value) == ("grpo", None)
    assert other.loss == PPOClipLoss(aggregation="sequence_mean", clip_high=0.3)
    with pytest.raises(ConfigError, match="rloo has no lam"):
        rl("rl.advantage.name=rloo", "rl.advantage.lam=0.8")


NEEDED: dict[str, dict[str, Any]] = {
    "kl": {"estimator": "k2", "where": "loss", "target": 1.0},
    "sft_mix": {"data": {"sources": [{"path": "a.jsonl"}]}},
    "importance": {"mode": "token_mask"},
}
"""What a section must have, so that each of its keys may be set."""


@st.composite
def written(draw: st.DrawFn) -> dict[str, Any]:
    """A section `rl`: a preset, and any of the other keys, nested, with values near their own."""
    name = draw(st.sampled_from(sorted(presets.RL)))
    tree: dict[str, Any] = {"algorithm": name, "steps": draw(st.integers(1, 1000))}
    whole = RLConfig(algorithm=name)
    for section in ("rollout", "shaping", "advantage", "loss", "value", "kl", "update"):
        made = getattr(whole, section)
        keys = sorted(made.model_dump(exclude={"name", "kind"})) if made else []
        for key in draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []:
            value = getattr(made, key)
            if isinstance(value, float) and value:
                value *= draw(st.floats(0.5, 1.0))
            needed = NEEDED.get(section, {})
            tree.setdefault(section, dict(needed))[key] = needed.get(key, value)
    for section in draw(st.sets(st.sampled_from(["sft_mix", "importance"]))):
        tree[section] = NEEDED[section]
    return tree


@settings(max_examples=30)
@given(tree=written())
def test_a_config_is_the_same_after_it_was_written_and_read(tree: dict[str, Any]) -> None:
    try:
        recipe = Recipe.model_validate({"rl": tree})
    except ValidationError:
        assume(False)
    text = dump(recipe)
    again = validated(Recipe, yaml.safe_load(text))
    assert again == recipe and dump(again) == text
    assert recipe.rl is not None and RLConfig.model_validate(recipe.rl.model_dump()) == (
        recipe.rl.model_copy(update={"algorithm": None})
    )
