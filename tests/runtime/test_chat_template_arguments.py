"""What renderings are given besides: a date that stays, and arguments that the template reads."""

from datetime import date, datetime
from pathlib import Path

import pytest

from gearshift.data.chat import end_token_ids, render_prompt, render_supervised, render_turn
from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig, load_tokenizer
from gearshift.pipeline.recipe import Recipe, record_recipe, with_date
from gearshift.pipeline.run import Run
from gearshift.runtime.chat_template_arguments import bind_arguments
from gearshift.runtime.config import load
from tests.data.shapes import DATED, THINKING, shaped

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
DAY = date(2024, 7, 6)


def test_the_date_is_the_bound_one_in_every_rendering() -> None:
    tokenizer = shaped(DATED, "<s>", "<|eot|>")
    bind_arguments(tokenizer, {}, DAY)
    ids, mask = render_supervised(tokenizer, CHAT)
    assert "Today: 06 Jul 2024" in tokenizer.decode(ids) and sum(mask) == 3
    assert "06 Jul 2024" in tokenizer.decode(render_prompt(tokenizer, CHAT[:1]))
    assert "Today" not in tokenizer.decode(render_turn(tokenizer, CHAT[:1]))
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}
    bind_arguments(tokenizer, {"date_string": "soon"}, DAY)
    assert "Today: soon" in tokenizer.decode(render_prompt(tokenizer, CHAT[:1]))


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%-d %B %y (%A, %j)", "%d%%, %H:%M", "%F"])
def test_every_form_of_a_date(form: str) -> None:
    template = f"\n{{{{ strftime_now('{form}') }}}}{{{{ messages[0].content }}}}"
    tokenizer = shaped(template, "<s>", "</s>")
    bind_arguments(tokenizer, {}, DAY)
    right = datetime(DAY.year, DAY.month, DAY.day).strftime(form)
    assert tokenizer.decode(render_prompt(tokenizer, CHAT[:1])) == f"\n{right}hi"


def test_arguments_of_the_recipe() -> None:
    tokenizer = shaped(THINKING, "<s>", "<|im_end|>")
    bind_arguments(tokenizer, {"enable_thinking": False}, None)
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(render_prompt(tokenizer, CHAT[:1])).endswith(closed)
    assert tokenizer.decode(render_turn(tokenizer, CHAT[:1])).endswith(closed)
    ids, mask = render_supervised(tokenizer, CHAT)
    assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == "yo<|im_end|>"
    with pytest.raises(ConfigError, match="does not read `enable_thinkin`"):
        bind_arguments(tokenizer, {"enable_thinkin": False}, None)


def test_a_folders_tokenizer_has_them_and_a_reward_models_has_not(tmp_path: Path) -> None:
    shaped(THINKING, "<s>", "<|im_end|>").save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), chat_template_kwargs={"enable_thinking": False})
    policy, other = load_tokenizer(config), load_tokenizer(config, of_policy=False)
    prompts = [t.decode(render_prompt(t, CHAT[:1])) for t in (policy, other)]
    assert [prompt.endswith("</think>\n\n") for prompt in prompts] == [True, False]
    with pytest.raises(ConfigError, match="does not read `other`"):
        load_tokenizer(config.model_copy(update={"chat_template_kwargs": {"other": 1}}))


def test_a_run_keeps_the_day_on_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(Recipe, None, [f"run.dir={tmp_path}", "model.name=tiny"])
    monkeypatch.setattr("gearshift.pipeline.recipe.today", lambda: DAY)
    run = Run(recipe)
    assert run.recipe.model.date == DAY
    record_recipe(tmp_path, run.recipe)
    monkeypatch.setattr("gearshift.pipeline.recipe.today", lambda: date(2024, 7, 7))
    assert Run(recipe).recipe == run.recipe == load(Recipe, tmp_path / "recipe.yaml")
    assert with_date(recipe, tmp_path / "other").model.date == date(2024, 7, 7)
    own = load(Recipe, None, ["model.date=2020-01-01"])
    assert with_date(own, tmp_path).model.date == date(2020, 1, 1)
