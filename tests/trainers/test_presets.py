"""Each preset expands to its keys, stands under what the recipe says, and learns the bandit."""

from pathlib import Path

import pytest

from gearshift.cli.main import main
from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import dump, load
from gearshift.trainers import presets
from tests.gyms import Bandit
from tests.trainers import bandit
from tests.trainers.rl_runs import trainer


@pytest.mark.parametrize("name", [n for n in presets.RL if n != "distill"])
def test_a_preset_learns_the_bandit(tmp_path: Path, name: str) -> None:
    _, earned = bandit.run(name, tmp_path)
    assert earned[0] < 0.3
    assert max(earned[-5:]) > 0.9, earned[::5]


def test_distillation_brings_the_policy_to_the_teacher(tmp_path: Path) -> None:
    teacher = bandit.teacher()
    it = trainer(
        bandit.preset_config("distill", steps=60, rollout={"prompts": 16}),
        tmp_path, environment=Bandit, reference=teacher,
    )  # fmt: skip

    def distance() -> float:
        own, wanted = (bandit.probabilities(it.engine, m) for m in (it.engine.model, teacher))
        return float((own * (own.log() - wanted.log())).sum())

    before = distance()
    it.train()
    assert distance() < 0.4 * before


def test_what_the_recipe_says_lies_over_the_preset() -> None:
    tree = {"algorithm": "grpo", "rl": {"steps": 3, "kl": {"beta": 0.5}}}
    recipe = Recipe.model_validate(tree)
    assert recipe.rl is not None
    assert (recipe.rl.advantage.name, recipe.rl.kl.beta) == ("grpo", 0.5)
    assert (recipe.rl.kl.estimator, recipe.rl.kl.where) == ("k3", "loss")
    assert recipe.rl.loss.aggregation == "sequence_mean"


def test_every_preset_is_a_valid_recipe_that_survives_being_written(tmp_path: Path) -> None:
    for name in (*presets.RL, *presets.PREFERENCE):
        recipe = Recipe.model_validate({"algorithm": name})
        (tmp_path / "recipe.yaml").write_text(dump(recipe))
        assert load(Recipe, tmp_path / "recipe.yaml") == recipe
        assert (recipe.rl is None) == (name in presets.PREFERENCE)


def test_dry_run_shows_what_a_preset_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
    main(["run", recipe, "algorithm=dapo", "--dry-run"])
    out = capsys.readouterr().out
    assert "algorithm: dapo" in out and "clip_high: 0.28" in out and "replace_zero_std: 2" in out


def test_a_stage_set_to_null_stays_out() -> None:
    assert Recipe.model_validate({"algorithm": "grpo", "rl": None}).rl is None


def test_one_word_makes_preferences_of_a_recipe_with_a_reward_model() -> None:
    pairs = {"data": {"sources": [{"path": "pairs.jsonl"}]}}
    recipe = Recipe.model_validate({"algorithm": "dpo", "reward": pairs})
    assert recipe.preference is not None and recipe.reward is None and recipe.rl is None
    assert recipe.preference.data.sources[0].path == "pairs.jsonl"
    own = {"data": {"sources": [{"path": "own.jsonl"}]}}
    kept = Recipe.model_validate({"algorithm": "dpo", "reward": pairs, "preference": own})
    assert kept.preference is not None and kept.reward is not None
    assert kept.preference.data.sources[0].path == "own.jsonl"


def test_an_unknown_algorithm_is_told() -> None:
    with pytest.raises(ConfigError, match="algorithm"):
        load(Recipe, None, ["algorithm=grop"])


def test_keys_that_contradict_each_other_are_told() -> None:
    for overrides, said in (
        (["algorithm=grpo", "rl.rollout.group_size=1"], "group_size must be 2"),
        (["algorithm=grpo", "rl.kl.estimator=k1"], "k1 has no gradient in the loss"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(Recipe, None, overrides)
