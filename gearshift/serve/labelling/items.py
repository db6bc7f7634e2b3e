"""Items that people are asked, out of rows: pairs and single answers that exist, and the episodes
of a run. It knows no HTTP and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gearshift.data.formats import PreferenceExample, PromptExample, to_prompt, to_unpaired
from gearshift.data.labels import Item, item_id
from gearshift.types import Message

Answer = str | Message
Source = dict[str, Any]


def make_item(
    prompt: list[Message],
    answers: list[Answer],
    sources: list[Source],
    options: dict[str, Any] | None = None,
    better: int | None = None,
) -> Item:
    """An item, named by its content. The order of two answers is by chance, so that the number of
    an answer does not show where it comes from. `better`: the answer that is known to be better.
    """
    name = item_id(prompt, answers, options)
    if len(answers) == 2 and int(name, 16) % 2:
        answers, sources = answers[::-1], sources[::-1]
        better = None if better is None else 1 - better
    return Item(name, prompt, answers, options or {}, sources, better)


def item_of_row(row: Mapping[str, Any], known: bool = False) -> Item:
    """The item of a row with two answers (`chosen`, `rejected`), or with one (`completion`). With
    `known`, the chosen answer is right. Raises `DataError`.
    """
    # An answer without a judgement is read like one that has it; the judgement is not used.
    example = to_unpaired({"label": True, **row} if "completion" in row else row)
    place = _file_name(example.where)
    if isinstance(example, PreferenceExample):
        answers = [example.chosen, example.rejected]
        sources = [{"row": place, "was": "chosen"}, {"row": place, "was": "rejected"}]
        return make_item(example.prompt, answers, sources, example.options, 0 if known else None)
    return make_item(example.prompt, [example.completion], [{"row": place}], example.options)


def has_answers(row: Mapping[str, Any]) -> bool:
    """Whether the row has answers that can be compared or judged."""
    return {"chosen", "rejected"} <= set(row) or {"prompt", "completion"} <= set(row)


def prompts_of(rows: Iterable[Mapping[str, Any]], system: str | None) -> Iterator[PromptExample]:
    """The prompts of rows. A system message, if given, begins those that have none. Raises
    `DataError`.
    """
    for row in rows:
        example = to_prompt(row)
        if system and example.prompt[0]["role"] != "system":
            example.prompt.insert(0, {"role": "system", "content": system})
        yield example


def rollout_items(steps: Iterable[Mapping[str, Any]], run: str) -> Iterator[Item]:
    """Pairs out of a run's `rollouts.jsonl`: of each group of a step, the first two episodes with
    the same conversation and different last answers.
    """
    for step in steps:
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for episode in step.get("episodes", []):
            groups.setdefault(episode.get("group_id"), []).append(episode)
        for group in groups.values():
            yield from _pair_of(group, step.get("step"), run)


def _pair_of(group: list[Mapping[str, Any]], step: Any, run: str) -> Iterator[Item]:
    said = [e["messages"] for e in group if len(e.get("messages") or []) > 1]
    said = [messages for messages in said if messages[-1].get("role") == "assistant"]
    for other in said[1:]:
        if other[:-1] == said[0][:-1] and other[-1] != said[0][-1]:
            answers = [_answer(said[0][-1]), _answer(other[-1])]
            yield make_item(said[0][:-1], answers, [{"model": run, "step": step}] * 2)
            return


def _answer(message: Message) -> Answer:
    text = message.get("content")
    return text if isinstance(text, str) and set(message) == {"role", "content"} else message


def _file_name(where: str) -> str:
    """A row's place without the folders of its file: labels leave this machine."""
    return where.rpartition("/")[2]
