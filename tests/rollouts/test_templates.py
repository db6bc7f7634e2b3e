"""Episodes under chat templates of every kind, with what a row gives the template."""

from pathlib import Path

import pytest

from gearshift.engine import Engine
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.tasks.rows import RowsEnvironment, write_rows
from gearshift.types import SamplingParams
from tests.gyms import TwoTurns
from tests.zoo import random_model

OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{{ tools|tojson }}{{ style }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
)


def engine(template: str) -> Engine:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Engine(random_model("llama"), tokenizer)


@pytest.mark.parametrize("template", [OPENED, "{{ raise_exception('never') }}"])
def test_an_engine_is_made_and_ends_with_eos(template: str) -> None:
    made = engine(template)
    assert made.end_tokens == {made.tokenizer.eos_token_id}


def test_each_turn_begins_in_the_reasoning_that_the_prompt_opens() -> None:
    made = engine(OPENED)
    collector = Collector(TwoTurns, made.tokenizer, made.loop)
    with made.generating():
        episodes = collector.collect(
            [EpisodeSpec(0, seed=0)], SamplingParams(n=4, max_new_tokens=8)
        )
    opening = "<|im_start|>assistant\n<think>\n"
    for episode in episodes:
        firsts = [i for i, m in enumerate(episode.loss_mask) if m and not episode.loss_mask[i - 1]]
        assert firsts
        for i in firsts:
            assert made.tokenizer.decode(episode.token_ids[:i]).endswith(opening)


def test_a_rows_tools_and_arguments_reach_the_template(tmp_path: Path) -> None:
    made = engine(WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks."}}]
    row = {"prompt": "hi", "tools": tools, "chat_template_kwargs": {"style": "plain"}}
    path = write_rows(tmp_path, {"train": [row]})["train"]
    collector = Collector(
        lambda: RowsEnvironment(path, lambda completions, **_: [1.0] * len(completions)),
        made.tokenizer,
        made.loop,
    )
    with made.generating():
        [episode] = collector.collect([EpisodeSpec(0, 0, 0)], SamplingParams(max_new_tokens=2))
    asked = made.tokenizer.decode(episode.token_ids[: episode.prompt_length])
    assert "Looks." in asked and asked.endswith("plainhi<|im_end|>")
