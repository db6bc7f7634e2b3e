"""Prompts are compared by what they ask, whatever their form."""

from __future__ import annotations

from typing import Any

import pytest

from gearshift.data.overlap import near_duplicates, prompt_keys, prompt_text, row_prompts


def user(text: str, system: str | None = None) -> list[Any]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def test_equal_questions_have_equal_keys() -> None:
    said = ["What is this?", "what  is\nthis?", "What is this? ", "\uff37hat is this?"]
    assert len({prompt_text(user(text)) for text in said}) == 1
    assert prompt_text(user("What is this?")) != prompt_text(user("What is that?"))


def test_a_system_message_counts_only_where_it_is_all_that_differs() -> None:
    keys = prompt_keys([user("a", "Be brief."), user("a"), user("b", "Be long.")])
    assert keys[0] == keys[1] != keys[2]
    assert len(set(prompt_keys([user("Go.", "Play chess."), user("Go.", "Play cards.")]))) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "answer": "4"}, ["q"]),
        ({"prompt": user("q"), "chosen": "a", "rejected": "b"}, ["q"]),
        ({"prompt": "q", "completion": "a", "label": True}, ["q"]),
        ({"instruction": "q", "input": "", "output": "a"}, ["q"]),
        ({"text": "q"}, []),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]},
            ["q", "r"],
        ),
        ({"chosen": [*user("q"), {"role": "assistant", "content": "a"}],
          "rejected": [*user("q"), {"role": "assistant", "content": "b"}]}, ["q"]),
        ({"nothing": 1}, []),
    ],
)  # fmt: skip
def test_what_a_row_asks(row: dict[str, Any], said: list[str]) -> None:
    assert [prompt[-1]["content"] for prompt in row_prompts(row)] == said


def test_near_is_not_equal_and_has_the_same_numbers() -> None:
    others = [
        "how do i bake bread with rye flour at home?",
        "a train leaves at 7 from lyon to paris",
    ]
    found = near_duplicates(
        [
            "how do i bake a bread with rye flour at home",
            others[0],
            "a train leaves at 8 from lyon to paris",
            "why is the sky blue on a clear day?",
        ],
        others,
    )
    assert list(found) == [(0, 0)]


def test_near_is_cheap_where_thousands_are_alike() -> None:
    texts = [f"please translate this sentence number {'x' * (i % 7)} for me" for i in range(3000)]
    assert len(list(near_duplicates(texts, texts))) == 3000
