"""A wrong recipe is one line that names the key and the way out; a right one round-trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, model_validator

from gearshift.errors import ConfigError
from gearshift.runtime.config import (
    Config,
    Neutral,
    PathText,
    differences,
    dump,
    identity,
    load,
)
from gearshift.runtime.keys import describe_keys


class Optimizer(Config):
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning
    rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | Literal["auto"] = "auto"
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def ordered(self) -> Optimizer:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


class Reward(Config):
    name: str
    weight: float = 1.0


class Game(Config):
    name: Literal["game"] = "game"
    turns: int = 3


class Talk(Config):
    name: Literal["talk"] = "talk"
    language: str = "en"


class Recipe(Config):
    model: str
    task: Game | Talk | None = Field(None, discriminator="name")
    optimizer: Optimizer = Optimizer()
    rewards: list[Reward] = Field(default_factory=list)
    named: dict[str, Reward] = Field(default_factory=dict)
    second: Optimizer | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = Field(default=8, ge=1)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


BAD = [
    ("model: m\noptimzer: {lr: 1}", [], ["unknown key `optimzer`", "did you mean `optimizer`"]),
    ("model: m\noptimizer: {lrr: 1}", [], ["`optimizer.lrr`", "did you mean `optimizer.lr`"]),
    ("model: m\nlr: 1", [], ["unknown key `lr`", "did you mean `optimizer.lr`"]),
    ("model: m\nqqq: 1", [], ["`qqq`", "the keys there are model, task, optimizer, rewards"]),
    ("model: m\nrewards: [{name: a, wieght: 2}]", [], ["`rewards.0.wieght`", "`rewards.0.weight`"]),
    ("model: m\nnamed: {x: {name: a, wait: 2}}", [], ["`named.x.wait`", "`named.x.weight`"]),
    ("model: m\ntask: {name: gam}", [], ['`task.name` is "gam"; did you mean game?']),
    ("model: m\ntask: {turns: 2}", [], ["`task.name` is missing; there are game, talk."]),
    ("model: m\ntask: {name: game, turns: x}", [], ["`task.turns` is", "integer"]),
    ("model: m\ntask: {name: game, turn: 2}", [], ["`task.turn`", "did you mean `task.turns`"]),
    ("model: m\ntask: {name: game, languag: de}", [], ["the keys there are name, turns."]),
    ("model: m\ntask: {name: game, language: de}", [], ["the keys there are name, turns."]),
    ("model: m\nnamed: {x.y: {name: a, wait: 2}}", [], ["wait", "weight"]),
    ("model: m\nlanguage: de", [], ["`language`", "did you mean `task.language`"]),
    ("model: m\nsecond: {clipp: 2}", [], ["`second.clipp`", "did you mean `second.clip`"]),
    ("model: m\nrewards: [{weight: 2}]", [], ["`rewards.0.name` is missing"]),
    ("steps: 3", [], ["`model` is missing"]),
    ("model: m\nsteps: many", [], ['`steps` is "many"', "a valid integer"]),
    ("model: m\nsteps: 1.5", [], ["`steps` is 1.5", "a valid integer"]),
    ("model: m\nsteps: 0", [], ["`steps` is 0", "greater than or equal to 1"]),
    ("model: m\nschedule: liner", [], ['`schedule` is "liner"', "'linear' or 'cosine'"]),
    ("model: m\noptimizer: 3", [], ["`optimizer` is 3", "a section with keys of its own"]),
    ("model: m\noptimizer: {clip: x}", [], ["`optimizer.clip`", "a valid number or 'auto'."]),
    ("model: m\noptimizer: {betas: [1]}", [], ["`optimizer.betas.1` is missing"]),
    ("model: m\noptimizer: {low: 3}", [], ["`optimizer`: low must not be above high"]),
    ("model: m\noptimizer: {lr: 0}", [], ["`optimizer.lr` is 0", "greater than 0"]),
    ("model: [3]\nsteps: 0\nrewards: 1", [], ["`model` is [3]", "(and 2 more)"]),
    ("model: m\nmodel: n", [], ["line 2", "the key `model` is given twice"]),
    ("model: m\noptimizer:\n  lr: 1\n  lr: 2", [], ["line 4", "`lr` is given twice"]),
    ("model: [m\nsteps: 1", [], ["not valid YAML", "line 2"]),
    ("model: !!python/object:os.system m", [], ["not valid YAML", "line 1"]),
    ("- model", [], ["`key: value`"]),
    ("model: m", ["steps"], ["override `steps`", "key.sub=value"]),
    ("model: m", ["=3"], ["override `=3`", "key.sub=value"]),
    ("model: m", ["steps=[1"], ["override `steps=[1`", "not valid YAML", "quote it"]),
    ("model: m", ["model.x=3"], ['`model` is "m"', "contains no keys"]),
    ("model: m\nrewards: [{name: a}]", ["rewards.1.name=b"], ["`rewards` has no entry `1`"]),
    ("model: m\nrewards: [{name: a}]", ["rewards.name=b"], ["`rewards` has no entry `name`"]),
    ("model: m", ["optimizer.lrr=1"], ["`optimizer.lrr`", "did you mean `optimizer.lr`"]),
]


@pytest.mark.parametrize(("text", "overrides", "said"), BAD)
def test_bad_config_is_one_clear_line(
    tmp_path: Path, text: str, overrides: list[str], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Recipe, recipe(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    recipe(tmp_path, "model: m")
    with pytest.raises(ConfigError, match=r"did you mean .*recipe\.yaml\?"):
        load(Recipe, tmp_path / "recipes.yml", [])
    with pytest.raises(ConfigError, match="check the path"):
        load(Recipe, tmp_path / "nowhere" / "recipe.yaml", [])


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(Recipe, path, [])


def test_an_override_of_the_kind_begins_the_section_anew(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model: m\ntask: {name: game, turns: 5}")
    assert load(Recipe, path, ["task.language=de", "task.name=talk"]).task == Talk(language="de")
    assert load(Recipe, path, ["task.name=game"]).task == Game(turns=5)
    with pytest.raises(ConfigError, match=r"`task.turns`; talk has no turns, game has; the keys"):
        load(Recipe, path, ["task.name=talk", "task.turns=2"])


def test_overrides_win_over_the_file_and_reach_into_lists(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model: m\noptimizer:\nrewards:\n- name: a\n- name: b\n")
    given = ["optimizer.lr=1e-4", "rewards.1.weight=0.5", "second.low=1", "model=x=y", "steps=9"]
    loaded = load(Recipe, path, given)
    assert loaded.optimizer.lr == 1e-4
    assert [r.weight for r in loaded.rewards] == [1.0, 0.5]
    assert loaded.second == Optimizer(low=1)
    assert (loaded.model, loaded.steps) == ("x=y", 9)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e-5", ".00001", "1_0e-6"])
def test_exponents_are_numbers(text: str) -> None:
    assert load(Optimizer, None, [f"lr={text}", f"clip={text}"]) == Optimizer(lr=1e-5, clip=1e-5)


@pytest.mark.parametrize("text", ["e5", "1e", "12e-x", "'1e-5'"])
def test_words_with_an_e_stay_words(text: str) -> None:
    assert load(Reward, None, [f"name={text}"]).name == text.strip("'")


WHOLE = [
    "runs/take #2", "a: b", "*x", "&x", "!x", "%x", "@x", "`x", "- a", "? a", "> a", "|", "--- a",
    "# all", "<<", "=", "007", "010", "1_000", "1e3", "1:30", "0x10", ".inf", "2026-01-01",
    "2026-13-45", "yes", "no", "on", "off", "true", "a\nb", "a, b", "x]", "C:\\new",
]  # fmt: skip


@pytest.mark.parametrize("text", WHOLE)
def test_an_override_of_a_text_keeps_every_letter(text: str, tmp_path: Path) -> None:
    loaded = load(Recipe, None, [f"model={text}", "rewards=[{name: 1.10}, {name: no}]"])
    assert loaded.model == text
    assert [reward.name for reward in loaded.rewards] == ["1.10", "no"]
    assert load(Recipe, recipe(tmp_path, dump(loaded))) == loaded


@pytest.mark.parametrize("text", ["[a, b]", "{a: 1}", "~", "null", "", "'tis", "[a", "'a' b"])
def test_what_is_no_text_is_refused_for_a_text(text: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        load(Recipe, None, [f"model={text}"])


def test_quotes_and_brackets_are_yaml() -> None:
    for given, meant in (('"a #2"', "a #2"), ("'it''s'", "it's"), ("'[a]'", "[a]")):
        assert load(Recipe, None, [f"model={given}"]).model == meant
    loaded = load(Recipe, None, ["model=m", "optimizer.betas=[0.5, 1e-1]", "second={low: 1}"])
    assert loaded.optimizer.betas == (0.5, 0.1) and loaded.second == Optimizer(low=1)


@pytest.mark.parametrize("text", ["007", "1e3", "1.10", "2026-01-01", "no", "1_000", "0o17", "a#b"])
def test_a_text_in_a_file_is_as_it_is_written(text: str, tmp_path: Path) -> None:
    assert load(Recipe, recipe(tmp_path, f"model: {text}")).model == text
    named = load(Recipe, recipe(tmp_path, f"model: m\nnamed: {{{text}: {{name: {text}}}}}"))
    assert named.named == {text: Reward(name=text)}


@pytest.mark.parametrize(
    ("text", "number"),
    [("010", 10), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("1e3", 1000), ("1.0", 1)],
)
def test_numbers_are_of_one_reading(text: str, number: int, tmp_path: Path) -> None:
    assert load(Recipe, None, ["model=m", f"steps={text}"]).steps == number
    assert load(Recipe, recipe(tmp_path, f"model: m\nsteps: {text}")).steps == number


@pytest.mark.parametrize("text", ["1:30", "yes", "true", "3 # three", "2026-01-01", ".inf", "+"])
def test_what_is_no_number_is_refused_for_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="`steps` is"):
        load(Recipe, None, ["model=m", f"steps={text}"])


@pytest.mark.parametrize("text", [".inf", "inf", "nan", ".nan", "1e999"])
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`lr` is .* finite"):
        load(Optimizer, None, [f"lr={text}"])


class Anything(Config):
    kwargs: dict[str, Any] = Field(default_factory=dict)


def test_where_any_type_goes_a_word_means_what_yaml_says(tmp_path: Path) -> None:
    meant = {"slip": False, "n": 10, "x": 1000.0, "day": "2026-01-01", "l": [True, {"y": None}]}
    text = "kwargs: {slip: no, n: 010, x: 1e3, day: 2026-01-01, l: [on, {y: ~}]}"
    loaded = load(Anything, recipe(tmp_path, text))
    assert loaded.kwargs == meant
    words = Anything(kwargs={"a": "1e-5", "b": "no", "c": "0o17", "d": "1:30", "e": "=", "f": "~"})
    assert load(Anything, recipe(tmp_path, dump(words))) == words


@pytest.mark.parametrize(
    "text",
    [
        "model: m\n---\nmodel: n", "model:\n\tx", "model: !x m", "model: !!int x", "model: \x01",
        "model: &a [*a]", "second: &s {low: *s}", "? [a]\n: b", "model: m\n" + "[" * 3000,
        "model: *nowhere", "model: <<",
    ],
)  # fmt: skip
def test_yaml_that_is_no_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as caught:
        load(Recipe, recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_sections_may_be_merged(tmp_path: Path) -> None:
    text = "model: m\noptimizer: &o {lr: 1e-3, low: 0}\nsecond: {<<: *o, lr: 1e-4}"
    assert load(Recipe, recipe(tmp_path, text)).second == Optimizer(lr=1e-4)


class Place(Config):
    path: PathText = "runs"
    model: PathText | None = None
    every: Neutral[int] = Field(5, ge=0)
    """Between two."""


class Whole(Config):
    places: tuple[Place, ...] = ()
    steps: int = 3


def test_home_is_found_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    loaded = load(Whole, None, ["places=[{path: ~/x, model: ~/y}, {path: a~b}]"])
    assert [p.path for p in loaded.places] == ["/home/a/x", "a~b"]
    assert loaded.places[0].model == "/home/a/y"
    for text in ("''", '"a\\0b"'):
        with pytest.raises(ConfigError, match=r"`path`: a path needs at least one character"):
            load(Place, None, [f"path={text}"])
    assert "every: int = 5  - Between two." in describe_keys(Place)


def test_neutral_keys_are_no_part_of_the_identity() -> None:
    before = Whole(places=(Place(), Place(path="b")))
    after = Whole(places=(Place(every=9), Place(path="c", every=9)), steps=4)
    assert differences(identity(before), identity(after)) == [
        '`places.1.path` was "b" and is "c"', "`steps` was 3 and is 4",
    ]  # fmt: skip
    assert "every" not in str(identity(before))
    [line] = differences(identity(before), identity(Whole()))
    assert line.startswith("`places` was [") and line.endswith("and is []")


def test_dump_loads_back(tmp_path: Path) -> None:
    config = load(Recipe, None, ["model='ä: 1e-5'", "optimizer.lr=3e-7", "rewards=[{name: a}]"])
    assert load(Recipe, recipe(tmp_path, dump(config)), []) == config


def test_describe_has_a_line_for_each_key() -> None:
    lines = describe_keys(Recipe)
    assert "model: str" in lines
    assert "optimizer.lr: float = 1e-05  - Peak learning rate." in lines
    assert "optimizer.betas: tuple[float, float] = [0.9, 0.95]" in lines
    assert "rewards.0.weight: float = 1.0" in lines
    assert "named.<name>.name: str" in lines
    assert "second: Optimizer | null = null" in lines
    assert "task[game].turns: int = 3" in lines and 'task[talk].language: str = "en"' in lines
    assert "schedule: 'linear' | 'cosine' = \"linear\"" in lines


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Optimizer().__setattr__("lr", 1.0)


def test_an_address_with_a_secret_is_refused_wherever_it_stands() -> None:
    for override, key in (
        ("model=https://me:S@h/", "model"),
        ("rewards=[{name: 'http://h/?token=S'}]", "rewards.0.name"),
        ("named={a: {name: 'judge:http://S@h/v1'}}", "named.a.name"),
    ):
        with pytest.raises(ConfigError, match=f"`{key}`: .*an address") as refused:
            load(Recipe, None, ["model=tiny", override])
        assert "S@" not in str(refused.value) and "=S" not in str(refused.value)
    with pytest.raises(ValueError) as wrong:
        Reward(name="http://h/?token=S")
    assert "=S" not in str(wrong.value)  # which would show what it was given
    kept = load(Recipe, None, ["model=http://h/${KEY}?a=${KEY}"])
    assert kept.model == "http://h/${KEY}?a=${KEY}"


def test_the_keys_of_one_kind_of_section_are_found_however_it_is_written() -> None:
    whole = describe_keys(Recipe, "task[talk]")
    assert whole and whole == describe_keys(Recipe, "task.talk")
    assert set(whole) < set(describe_keys(Recipe, "task"))
    assert not describe_keys(Recipe, "task.tell")
