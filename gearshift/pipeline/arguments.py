"""How the arguments of a Python call become a recipe, and what the call hands in besides it.

A recipe file that says the same gives the same recipe, so that the run is the same. This file knows
recipes and rows, and must not import what runs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from gearshift.data.messages import show
from gearshift.data.sources import DataConfig, SourceConfig
from gearshift.errors import ConfigError, DataError
from gearshift.models.load import ModelConfig
from gearshift.pipeline.given import GIVEN, Given, as_jsonl
from gearshift.pipeline.recipe import Recipe, RunConfig, add_task
from gearshift.runtime.config import Config, identity, overridden, validated
from gearshift.runtime.keys import models_of
from gearshift.runtime.user_functions import GIVEN as GIVEN_NAME
from gearshift.runtime.user_functions import name_of
from gearshift.tasks.registry import get_task
from gearshift.tasks.task import Task
from gearshift.trainers.callbacks import Callbacks

Tree = dict[str, Any]
Data = str | Path | Config | Mapping[str, Any] | Iterable[Any]
"""A file or a data set's name; a `SourceConfig` or a `DataConfig`; or the rows themselves: dicts,
texts or lists of messages, such as a data set of the library `datasets`."""
NO_ENVIRONMENT = ("model:", "judge:")
"""What begins the name of a reward that scores whole batches, and so is no environment's own."""
_OF_TRL = {
    "bf16": '`dtype="bfloat16"`',
    "eval_dataset": "`heldout`; for train_rl `validation` and `test`",
    "learning_rate": '`optimizer={"lr": ...}`',
    "lr_scheduler_type": '`optimizer={"schedule": ...}`',
    "max_completion_length": "`max_new_tokens`",
    "max_steps": "`epochs`; for train_rl `steps`",
    "num_generations": "`group_size`",
    "num_train_epochs": "`epochs`",
    "output_dir": "`output`",
    "peft_config": '`lora={"rank": ...}`',
    "per_device_train_batch_size": "`batch_size`",
    "report_to": "`trackers`",
    "save_steps": "`save_every`",
}
"""Names of TRL's arguments, which no section has, and what they are here."""
_HERE = "<output>"
"""Stands for the run's folder until that is known."""


class Default(str):
    """The default of an argument, which gives way to the same key in a config."""


class Arguments:
    """A recipe that is being made from the arguments of a call."""

    def __init__(self, kind: str, section: str | None) -> None:
        """`kind` names the run where the caller does not; `section` is its stage."""
        self.kind, self.section = kind, section
        self.tree: Tree = {section: {}} if section else {}
        self.files: dict[str, str] = {}
        self.functions: dict[str, Callable[..., Any]] = {}

    def put(self, key: str, value: Any) -> None:
        """Write a key of the recipe, over what it has there."""
        _put(self.tree, key, value)

    def add(self, config: Mapping[str, Any], given: Tree | None = None) -> None:
        """Write the caller's keys. A key may leave out its section where that is the stage, a part
        of the stage, the task, the model or the run; `"a.b"` is the key `b` of the section `a`.

        Raises `ConfigError` for a name of TRL's, and for a key that has another value in `given`,
        the tree of the call's other arguments.
        """
        for key in config:
            if key in _OF_TRL:
                raise ConfigError(f"`{key}` is a name of TRL's; here it is {_OF_TRL[key]}.")
        before = self.tree.get("task")
        task = _over(before, plain(config["task"])) if "task" in config else before
        keys = {self._whole(key, task): value for key, value in config.items()}

        def write(tree: Tree) -> None:
            for key, value in keys.items():
                _put(tree, key, value)

        own: Tree = {}
        write(own)
        for key, one, other in _contradictions(given or {}, own):
            raise ConfigError(
                f"The call gives `{key}` twice, as {one:.60} and as {other:.60}; give it once."
            )
        self.tree = overridden(Recipe, self.tree, write)

    def rows(self, data: Data, name: str, text: str, messages: str) -> list[Tree]:
        """The sources that a recipe names for the data. Given rows go to the file `name` of the
        run; a row that is a text, or a list of messages, becomes the column of that name.
        """
        if isinstance(data, str | os.PathLike):
            return [{"path": os.fspath(data)}]
        if isinstance(data, SourceConfig):
            return [plain(data)]
        if isinstance(data, Mapping):
            first = next(map(str, data), "train")
            raise DataError(
                f'{name} is a mapping, and not rows; give a list, or one split: {name}["{first}"].'
            )
        items = _items(data, name)
        if items and all(map(_is_source, items)):
            return [one for item in items for one in self.rows(item, name, text, messages)]
        rows = []
        for number, item in enumerate(items, start=1):
            if not isinstance(item, str | list | tuple | Mapping):
                raise DataError(f"{name}, row {number} is {show(item)}; a row is a dict or a text.")
            column = text if isinstance(item, str) else messages
            rows.append(item if isinstance(item, Mapping) else {column: item})
        self.files[name] = as_jsonl(rows, name)
        return [{"path": f"{_HERE}/{GIVEN}/{name}.jsonl"}]

    def data(self, key: str, data: Data, name: str) -> None:
        """Write a section `data` of the recipe."""
        given = isinstance(data, DataConfig) or (isinstance(data, Mapping) and "sources" in data)
        self.put(key, data if given else {"sources": self.rows(data, name, "text", "messages")})

    def named(self, function: Any) -> str:
        """The name in the recipe of a reward or an environment."""
        if isinstance(function, str | os.PathLike):
            return os.fspath(function)
        if not callable(function):
            raise ConfigError(f"{show(function)} is neither a function nor the name of one.")
        name, count = name_of(function), 1
        while self.functions.get(name, function) is not function:
            count += 1
            name = f"{name_of(function)}_{count}"
        if name.startswith(GIVEN_NAME):
            self.functions[name] = function
        return name

    def rewards(self, reward: Any) -> list[str]:
        """The names in the recipe of one reward, or of several; a folder is a reward model's."""
        one = isinstance(reward, str) or not isinstance(reward, Sequence)
        return [
            f"model:{os.fspath(each)}" if isinstance(each, os.PathLike) else self.named(each)
            for each in ([reward] if one else reward)
            if each is not None
        ]

    def model(self, model: Any) -> None:
        """Write the section `model`: of a name, a folder, a section, or a result of training."""
        if not isinstance(model, str | os.PathLike | Mapping | ModelConfig):
            raise ConfigError(
                f"The model is {show(model)}; give its name or its folder, to which "
                "`save_pretrained` writes a model of transformers."
            )
        named = isinstance(model, str | os.PathLike)
        self.put("model", {"name": model} if named else model)

    def task(self, task: str | Mapping[str, Any] | Config | Task) -> None:
        """Write the section `task`: a name, a section, or a task of the caller's own."""
        if isinstance(task, Task):
            add_task(task)
        name = task.name if isinstance(task, Task) else task
        self.put("task", {"name": name} if isinstance(name, str) else name)

    def recipe(self, output: str | Path | None, callbacks: Callbacks) -> tuple[Recipe, Given]:
        """The recipe, and what comes with it. Raises `ConfigError` for a bad key, type or value.

        Without an `output` the folder is named by what the run is made from: the same call goes on
        in the same folder.
        """
        if not isinstance(output, str | os.PathLike | None):
            raise ConfigError(f"output is {show(output)}; give the path of a folder.")
        given = Given(self.files, self.functions, callbacks)
        if output is None and "dir" not in self.tree.get("run", {}):
            made = [identity(validated(Recipe, self.tree)), self.files, given.digests()]
            text = json.dumps(made, sort_keys=True)
            output = f"runs/{self.kind}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        if output is not None:
            self.put("run.dir", os.fspath(output))
        folder = os.path.expanduser(str(self.tree["run"]["dir"]))
        return validated(Recipe, _settled(self.tree, folder)), given

    def _whole(self, key: str, task: Any) -> str:
        first = key.partition(".")[0]
        if first in Recipe.model_fields:
            return key
        homes: dict[str | None, Iterable[str]] = {
            **(_homes(self.section) if self.section else {}),
            "task": _task_keys(task),
            "model": ModelConfig.model_fields,
            "run": RunConfig.model_fields,
        }
        home = next((home for home, keys in homes.items() if first in keys), self.section)
        return f"{home}.{key}" if home else key


def plain(value: Any) -> Any:
    """A value as a recipe file would have it; of a config, the keys that were set and its tag."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        tags = {name for name, f in fields.items() if len(_literals(f.annotation)) == 1}
        kept = [name for name in fields if name in value.model_fields_set | tags]
        return {name: plain(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def _put(tree: Tree, key: str, value: Any) -> None:
    """Write a key of the tree, and make the sections that it needs."""
    *path, last = key.split(".")
    node = tree
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = _over(node.get(last), plain(value))


def _contradictions(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """The keys that have two values, with these as texts; None and a default give way."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() & other.keys():
            yield from _contradictions(one[name], other[name], f"{key}.{name}" if key else name)
    elif one is not None and not isinstance(one, Default) and one != other:
        yield key, show(one), show(other)


def _over(before: Any, value: Any) -> Any:
    """`value` over what stood there; sections become one."""
    if isinstance(before, dict) and isinstance(value, dict):
        return {**before, **{key: _over(before.get(key), inner) for key, inner in value.items()}}
    return value


def _settled(value: Any, folder: str) -> Any:
    """The tree with the run's folder in its paths."""
    if isinstance(value, dict):
        return {key: _settled(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_settled(inner, folder) for inner in value]
    return value.replace(_HERE, folder, 1) if str(value).startswith(_HERE) else value


_FILES = (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".gz", ".zst")


def _is_source(item: Any) -> bool:
    """Whether an item of a list is no row, but a file or a data set: no row is one word that ends
    as the names of files end.
    """
    named = isinstance(item, str) and item.endswith(_FILES) and len(item.split()) == 1
    return named or isinstance(item, SourceConfig | os.PathLike)


def _items(data: Any, name: str) -> list[Any]:
    """What a list, a data set or a table of pandas or Arrow holds; a missing value is None."""
    if hasattr(data, "to_pylist"):
        data = data.to_pylist()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    if not isinstance(data, Iterable):
        raise DataError(f"{name} is {show(data)}; give rows, a file, or a data set's name.")
    return list(data)


def _homes(stage: str) -> dict[str | None, Iterable[str]]:
    """The keys of a stage, and those of its sections that have one kind."""
    [config] = models_of(Recipe.model_fields[stage].annotation)
    homes: dict[str | None, Iterable[str]] = {stage: config.model_fields}
    for name, field in config.model_fields.items():
        if isinstance(field.default, BaseModel) and not field.discriminator:
            homes[f"{stage}.{name}"] = type(field.default).model_fields
    return homes


def _task_keys(task: Any) -> list[str]:
    name = task.get("name") if isinstance(task, dict) else None
    return [*get_task(name).config.model_fields] if isinstance(name, str) else []
