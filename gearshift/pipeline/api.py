"""The functions of `import gearshift`: train, evaluate and load models from a Python program.

Each makes the recipe that says the same, and runs it as the command line does; so a run may go on
from either. Keyword arguments are the recipe's keys: see `Arguments.add`.
"""

from __future__ import annotations

import os
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig
from gearshift.pipeline.arguments import NO_ENVIRONMENT, Arguments, Data, Default, plain
from gearshift.pipeline.recipe import STAGES, Recipe
from gearshift.pipeline.records import format_record
from gearshift.pipeline.result import RunResult
from gearshift.pipeline.run import Run
from gearshift.pipeline.shipped import find_recipe
from gearshift.pipeline.summary import Summary
from gearshift.rewards.composite import ENVIRONMENT
from gearshift.runtime.allocator import freed_memory_kept
from gearshift.runtime.config import Config, read_mapping
from gearshift.runtime.exit_errors import rank_of_process
from gearshift.runtime.metrics import read_metrics
from gearshift.runtime.terminal import counted, echo, quiet
from gearshift.tasks.task import Task
from gearshift.trainers.callbacks import Callbacks
from gearshift.trainers.presets import PREFERENCE, RLAlgorithm

Model = str | Path | RunResult | ModelConfig | Mapping[str, Any]
"""A name, a folder, what a training function returned, or a recipe's section `model`."""
Reward = str | Path | RunResult | Callable[..., Any]
"""A function with TRL's signature; its name as in a recipe (`file.py:f`, `module:f`, `http://...`,
`judge:URL`, `model:FOLDER`); or a reward model, as a folder or as what made it returned."""
Environment = str | Callable[[], TextEnvironment]
"""A class or a function that makes a `TextEnvironment`; or its name: `module:Class`, an id that
Gymnasium knows."""
_DEFAULT, _PREFERENCE_DEFAULT = Default("grpo"), Default("dpo")
OnStep = Callable[[int, dict[str, Any]], object]
OnRollout = Callable[[int, list[dict[str, Any]]], object]
OnCheckpoint = Callable[[int, Path], object]


def train_sft(
    model: Model,
    data: Data,
    *,
    output: str | Path | None = None,
    seed: int | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Fine-tune a model on examples: `text`, `messages`, `prompt`/`completion` rows, or texts.

    `config` holds keys of the recipe's section `sft`, such as `epochs=1`, and of its others, such
    as `dtype="float32"` or `engine={"max_length": 512}`.
    """
    arguments = Arguments("sft", "sft")
    _start(arguments, model, seed)
    arguments.data("sft.data", data, "data")
    return _run(arguments, config, output, Callbacks(on_step, None, on_checkpoint), verbose)


def train_reward_model(
    model: Model,
    data: Data,
    *,
    heldout: Data | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Train a reward model on pairs: rows with `chosen` and `rejected`, and `prompt` if they share
    one. The share of `heldout` pairs that it gets right is the result's `accuracy`.

    `config` holds keys of the recipe's section `reward`, and of its others.
    """
    arguments = Arguments("reward", "reward")
    _start(arguments, model, seed)
    _pairs(arguments, "reward", data, heldout)
    return _run(arguments, config, output, Callbacks(on_step, None, on_checkpoint), verbose)


def train_process_reward_model(
    model: Model,
    data: Data,
    *,
    heldout: Data | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Train a reward model of steps: rows with `prompt`, `completions` (the steps) and `labels`.

    `config` holds keys of the recipe's section `process`, and of its others.
    """
    arguments = Arguments("process", "process")
    _start(arguments, model, seed)
    _pairs(arguments, "process", data, heldout)
    return _run(arguments, config, output, Callbacks(on_step, None, on_checkpoint), verbose)


def train_dpo(
    model: Model,
    data: Data,
    *,
    algorithm: str = _PREFERENCE_DEFAULT,
    heldout: Data | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Learn from judged answers without rollouts: `chosen`/`rejected` rows, or rows with `label`.

    `algorithm` is `dpo`, `cdpo`, `ipo`, `kto`, `orpo` or `simpo`. `config` holds keys of the
    recipe's section `preference`, and of its others.
    """
    _known(algorithm, PREFERENCE, "train_dpo")
    arguments = Arguments(algorithm, "preference")
    _start(arguments, model, seed)
    arguments.put("algorithm", algorithm)
    _pairs(arguments, "preference", data, heldout)
    return _run(arguments, config, output, Callbacks(on_step, None, on_checkpoint), verbose)


def train_rl(
    model: Model,
    prompts: Data | None = None,
    reward: Reward | Sequence[Reward] | None = None,
    algorithm: str | None = _DEFAULT,
    *,
    environment: Environment | None = None,
    task: str | Mapping[str, Any] | Config | Task | None = None,
    reward_weights: Sequence[float] | None = None,
    validation: Data | float | None = None,
    test: Data | float | None = None,
    output: str | Path | None = None,
    seed: int | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_rollout: OnRollout | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Train a model by reinforcement learning, and measure it on held-out prompts before and after.

    What it learns from is one of: `prompts` and a `reward`; an `environment`; a `task` by name, or
    as a recipe's section `task`. The last two have a reward of their own, and rewards are added to
    it. Of several rewards for prompts the first is also what held-out answers are measured by,
    unless it is a reward model or a judge: then all of them are.
    `validation` and `test` are rows, or shares of the prompts. `config` holds keys of the recipe's
    section `rl`, such as `steps=20`, and of its others.
    """
    if algorithm is not None:
        _known(algorithm, typing.get_args(RLAlgorithm), "train_rl")
    arguments = Arguments(algorithm or "rl", "rl")
    _start(arguments, model, seed)
    if algorithm is not None:
        arguments.put("algorithm", algorithm)
    if sum(given is not None for given in (prompts, environment, task)) != 1:
        raise ConfigError("train_rl takes prompts, an environment or a task; give one of them.")
    names = arguments.rewards(reward)
    if prompts is not None:
        if not names:
            raise ConfigError("train_rl takes prompts with a reward; give a function or its name.")
        sources = arguments.rows(prompts, "prompts", "prompt", "prompt")
        own = names.pop(0) if not names[0].startswith(NO_ENVIRONMENT) else None
        arguments.put("task", {"name": "data", "train": sources, "reward": own})
        if own:
            names = [ENVIRONMENT, *names]
    elif environment is not None:
        arguments.put("task", {"name": "gym", "id": arguments.named(environment)})
        names = [ENVIRONMENT, *names]
    else:
        assert task is not None
        arguments.task(task)
        names = [ENVIRONMENT, *names]
    for split, rows in (("validation", validation), ("test", test)):
        if rows is not None:
            arguments.put(f"task.{split}", _heldout_rows(arguments, rows, split))
    if names != [ENVIRONMENT] or reward_weights is not None:
        _put_rewards(arguments, names, reward_weights)
    callbacks = Callbacks(on_step, on_rollout, on_checkpoint)
    return _run(arguments, config, output, callbacks, verbose)


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    output: str | Path | None = None,
    verbose: bool = True,
    on_step: OnStep | None = None,
    on_rollout: OnRollout | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    **config: Any,
) -> RunResult:
    """Run all stages of a recipe: a YAML file, the name of one that ships with it, or a dict.

    `config` holds keys of the recipe over what it says itself, such as `rl={"steps": 20}`.
    """
    arguments = Arguments("run", None)
    if not isinstance(recipe, str | Path | Mapping | Recipe):
        raise ConfigError(f"The recipe is {recipe!r:.80}; give a file, a name or a dict.")
    named = isinstance(recipe, str | Path)
    tree = read_mapping(find_recipe(str(recipe))) if named else plain(recipe)
    for key, value in tree.items():
        arguments.put(key, value)
    callbacks = Callbacks(on_step, on_rollout, on_checkpoint)
    return _run(arguments, config, output, callbacks, verbose)


def _known(algorithm: object, known: Iterable[str], function: str) -> None:
    if algorithm not in (names := [*known]):
        raise ConfigError(f"{function} has no algorithm {algorithm!r}; it has {', '.join(names)}.")


def _start(arguments: Arguments, model: Model, seed: int | None) -> None:
    arguments.model(model)
    if seed is not None:
        arguments.put("run.seed", seed)


def _pairs(arguments: Arguments, section: str, data: Data, heldout: Data | None) -> None:
    arguments.data(f"{section}.data", data, "data")
    if heldout is not None:
        arguments.data(f"{section}.heldout", heldout, "heldout")


def _put_rewards(
    arguments: Arguments, names: Sequence[str], weights: Sequence[float] | None
) -> None:
    """Write the list of rewards, each with its weight."""
    weights = [1.0] * len(names) if weights is None else weights
    if not isinstance(weights, Iterable):
        raise ConfigError(f"reward_weights is {weights!r}; give a list, a weight for each reward.")
    weights = [*weights]
    if len(weights) != len(names):
        raise ConfigError(
            f"reward_weights has {counted(len(weights), 'weight')} for "
            f"{counted(len(names), 'reward')}; give one each."
        )
    pairs = zip(names, weights, strict=True)
    arguments.put("rl.rewards", [{"source": name, "weight": weight} for name, weight in pairs])


def _heldout_rows(arguments: Arguments, rows: Data | float, split: str) -> float | str:
    """What a recipe has as `task.validation` or `task.test`: a share, a number or a file."""
    if isinstance(rows, int | float):
        return rows
    sources = arguments.rows(rows, split, "prompt", "prompt")
    if len(sources) != 1:
        raise ConfigError(f"{split} names {len(sources)} files; give one, or the rows themselves.")
    return str(sources[0]["path"])


def _run(
    arguments: Arguments,
    config: Mapping[str, Any],
    output: str | Path | None,
    callbacks: Callbacks,
    verbose: bool,
) -> RunResult:
    folder = {"run": {"dir": os.fspath(output)}} if isinstance(output, str | os.PathLike) else {}
    if arguments.section:  # a config must not contradict what the call says; `run` overrides
        for key, value in folder.items():
            arguments.put(key, value)
        folder = arguments.tree
    arguments.add(config, folder)
    own = (arguments.tree.get(arguments.section or "") or {}).get("algorithm")
    if isinstance(default := arguments.tree.get("algorithm"), Default):
        arguments.put("algorithm", own or str(default))
    recipe, given = arguments.recipe(output, callbacks)
    stages = [name for name in STAGES if getattr(recipe, name) is not None]
    if not stages:
        raise ConfigError(f"The recipe has no stage; give it one of {', '.join(STAGES)}.")
    began = time.perf_counter()
    # Of several ranks the main one alone prints.
    with quiet(not verbose or rank_of_process() > 0), freed_memory_kept():
        summary = Run(recipe, given=given).execute()
        result = _result(Path(recipe.run.dir), stages, summary)
        figures = [format_record(record) for record in [*result.heldout.values()][-1:]]
        if result.accuracy is not None:
            figures.append(f"accuracy {result.accuracy:.3f}")
        shown = "".join(f", {figure}" for figure in figures)
        seconds = time.perf_counter() - began
        steps = counted(len(result.metrics), "step")
        echo(f"{stages[-1]}: {steps}{shown}; {seconds:.1f} s; {result.model}")
    return result


def _result(folder: Path, stages: Sequence[str], summary: Summary) -> RunResult:
    last = folder / stages[-1]
    metrics = read_metrics(last / "metrics.jsonl")
    return RunResult(folder, last, metrics, summary["heldout_detail"], summary)
