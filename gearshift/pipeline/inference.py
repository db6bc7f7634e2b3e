"""Use a model from Python: open an engine, write answers, measure a policy. Nothing is trained."""

from __future__ import annotations

import difflib
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gearshift.data import load_rows
from gearshift.data.chat import render_prompt
from gearshift.data.messages import read_messages, show
from gearshift.data.text import decode
from gearshift.engine import Engine
from gearshift.errors import ConfigError, DataError
from gearshift.models.load import ModelConfig
from gearshift.pipeline.arguments import NO_ENVIRONMENT, Arguments, Data
from gearshift.pipeline.heldout import measure, open_engine
from gearshift.pipeline.policy import find_policy
from gearshift.pipeline.task_data import TaskData
from gearshift.rewards.models import ModelReward
from gearshift.rollouts.evaluate import Evaluation, Split
from gearshift.runtime.config import Config
from gearshift.runtime.terminal import counted, quiet
from gearshift.runtime.user_functions import given_functions
from gearshift.tasks.rows import RowsConfig, prompt_row, write_rows
from gearshift.tasks.task import Task
from gearshift.trainers.callbacks import Callbacks
from gearshift.types import Message, SamplingParams

Model = str | os.PathLike[str] | ModelConfig | Mapping[str, Any]
"""A name, a folder, what a training function returned, or a recipe's section `model`."""
Prompt = str | Sequence[Message]
"""The user's message, or a conversation."""


def load(model: Model, *, seed: int = 0, **config: Any) -> Engine:
    """The engine around a model: a name, a folder, or the newest policy of a run's folder.

    `config` holds keys of the recipe's section `engine`, such as `max_num_seqs=8`, and of `model`,
    such as `dtype="float32"`.
    """
    arguments = Arguments("load", "engine")
    name = _put_model(arguments, model)
    arguments.put("run.seed", seed)
    arguments.add(config)
    recipe, _ = arguments.recipe(os.devnull, Callbacks())
    return open_engine(recipe, name)


def generate(
    model: Model | Engine,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    system: str | None = None,
    **sampling: Any,
) -> list[str]:
    """The model's answer to each prompt, as text.

    `params`, or its fields as keywords (`temperature=0.7`, `max_new_tokens=64`), say how to sample;
    greedy is `temperature=0`. A prompt is a text or a list of messages; `system` stands before it.
    """
    params = _sampling(params, sampling)
    if params.n != 1:
        raise ConfigError("generate writes one answer to each prompt; for n, use Engine.generate.")
    chats = [_chat(prompt, system) for prompt in _each(prompts)]
    engine = model if isinstance(model, Engine) else load(model)
    ids = [render_prompt(engine.tokenizer, chat) for chat in chats]
    with engine.generating():
        groups = engine.generate(ids, params)
    return [
        decode(engine.tokenizer, group[0].token_ids, skip_special_tokens=True) for group in groups
    ]


def score(
    model: Model, prompts: Sequence[Prompt], completions: Sequence[str], **config: Any
) -> list[float | None]:
    """What a reward model says of each completion of each prompt; None for one that is too long.

    `config` holds keys of the recipe's section `model`, such as `device="cpu"`.
    """
    arguments = Arguments("score", "model")
    name = _put_model(arguments, model)
    arguments.add(config)
    recipe, _ = arguments.recipe(os.devnull, Callbacks())
    chats = [_chat(prompt, None) for prompt in _each(prompts)]
    answers = [completions] if isinstance(completions, str) else [*completions]
    if len(chats) != len(answers):
        raise ConfigError(
            f"The call gives {counted(len(chats), 'prompt')} for "
            f"{counted(len(answers), 'completion')}; give one each."
        )
    scores = ModelReward(recipe.model, Path(name or recipe.model.name))(chats, answers)
    return [None if value is None or math.isnan(value) else value for value in scores]


def evaluate(
    model: Model | Engine,
    prompts: Data | None = None,
    reward: Any = None,
    *,
    environment: Any = None,
    task: str | Mapping[str, Any] | Config | Task | None = None,
    split: Split = "validation",
    metric: str | None = None,
    seed: int = 0,
    verbose: bool = True,
    **config: Any,
) -> Evaluation:
    """Measure a policy greedily: every prompt once, or the held-out episodes of an environment or a
    task; the figure with its 95% interval, and every answer.

    `metric` is `reward`, `success`, or a metric of the environment. `config` holds keys of the
    recipe's section `eval`, such as `limit=100` and `max_new_tokens=64`, and of its others.
    """
    if sum(given is not None for given in (prompts, environment, task)) != 1:
        raise ConfigError("evaluate takes prompts, an environment or a task; give one of them.")
    if split not in (splits := typing.get_args(Split)):
        raise ConfigError(f"There is no split {split!r}; there are {', '.join(splits)}.")
    if prompts is None and reward is not None:
        raise ConfigError(
            "evaluate measures an environment or a task by its own reward; leave `reward` out."
        )
    arguments = Arguments("evaluate", "eval")
    name = None if isinstance(model, Engine) else _put_model(arguments, model)
    arguments.put("run.seed", seed)
    if prompts is not None:
        names = arguments.rewards(reward)
        if len(names) != 1:
            raise ConfigError("evaluate takes prompts with one reward: a function or its name.")
        rows, named = arguments.rows(prompts, "prompts", "prompt", "prompt"), names[0]
        alone = named.startswith(NO_ENVIRONMENT)
        own = {"name": "data", "train": rows, "reward": None if alone else named}
        arguments.put("task", own)
        if alone:
            arguments.put("rl.rewards", [{"source": named}])
    elif environment is not None:
        arguments.put("task", {"name": "gym", "id": arguments.named(environment)})
    else:
        assert task is not None
        arguments.task(task)
    arguments.add(config)
    with TemporaryDirectory() as folder, quiet(not verbose):
        recipe, given = arguments.recipe(folder, Callbacks())
        with given_functions(given.functions):
            given.write(Path(folder), begun=False)
            engine = model if isinstance(model, Engine) else open_engine(recipe, name)
            data = TaskData(recipe, Path(folder) / "data")
            if isinstance(data.config, RowsConfig):
                _write_all(data.config, data.folder, split)
            else:
                data.prepare()
            left = data.unseen(split, None)
            shown = "engine" if isinstance(model, Engine) else name or recipe.model.name
            return measure(data, engine, shown, split, left, metric)


def _write_all(config: RowsConfig, folder: Path, split: Split) -> None:
    """Write every row of the task as the split: nothing is trained on, so nothing is held out."""
    rows = [row for source in config.train for row in load_rows(source.path, source.split)]
    folder.mkdir()
    write_rows(folder, {split: [prompt_row(row, config.system) for row in rows]})


def _put_model(arguments: Arguments, model: Model) -> str | None:
    """Write the section `model`: the caller's, or that of the run that the model is of. The name of
    the policy to load.
    """
    if not isinstance(model, str | os.PathLike):
        arguments.model(model)
        return None
    name, made = find_policy(os.fspath(model))
    if made is None:
        arguments.put("model", {"name": name})
        return None
    arguments.put("model", made.model)
    return name


def _sampling(params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
    if not isinstance(params, SamplingParams | None):
        raise ConfigError(f"params is {show(params)}; it must be SamplingParams.")
    if unknown := fields.keys() - SamplingParams.__dataclass_fields__.keys():
        name, known = min(unknown), [*SamplingParams.__dataclass_fields__]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise ConfigError(f"Sampling has no `{name}`; {hint}")
    return replace(params or SamplingParams(), **fields)


def _each(prompts: Any) -> list[Any]:
    """Prompts as a list; one text, or one conversation, is one prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        return [prompts]
    given = [*prompts]
    one = bool(given) and all(isinstance(item, Mapping) and "content" in item for item in given)
    return [given] if one else given


def _chat(prompt: Any, system: str | None) -> list[Message]:
    if not isinstance(prompt, str | list | tuple):
        raise DataError(
            f"A prompt is {show(prompt)}; it must be a text or a list of messages with `role` and "
            "`content`."
        )
    words = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else None
    messages = words or read_messages([*prompt], "prompt")
    return [{"role": "system", "content": system}, *messages] if system else messages
