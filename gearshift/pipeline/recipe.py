"""A recipe: the sections of a whole run, each configured by the class beside its component; and the
record of it in the run's folder. This file must not import what runs a recipe.
"""

from __future__ import annotations

import datetime
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from gearshift.algorithms.advantages import NEEDS_GREEDY
from gearshift.engine import EngineConfig
from gearshift.errors import ConfigError, StorageError
from gearshift.models.load import ModelConfig
from gearshift.pipeline.given import GIVEN
from gearshift.pipeline.unused import unused_keys
from gearshift.rewards.composite import ENVIRONMENT
from gearshift.rollouts.vllm import GenerationConfig
from gearshift.runtime.config import (
    Config,
    Neutral,
    PathText,
    differences,
    dump,
    from_identity,
    identity,
    load,
)
from gearshift.runtime.digests import Digests, read_sealed, write_sealed
from gearshift.runtime.digests import first_change as changed_files
from gearshift.runtime.files import UNFINISHED, write_text, writing
from gearshift.runtime.folder_lock import FALLBACK_LOCK_FILE, LOCK_FILE
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.tasks.registry import TASKS, AnyTaskConfig, check_task, register
from gearshift.tasks.task import Task
from gearshift.trainers.needs import MemoryNeeds
from gearshift.trainers.preference import PreferenceConfig
from gearshift.trainers.presets import PREFERENCE, Algorithm, expand, kind_of
from gearshift.trainers.process_reward_model import ProcessRewardConfig
from gearshift.trainers.reward_model import RewardModelConfig
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.sft import SFTConfig
from gearshift.trainers.stage import StageConfig

StageName = Literal["sft", "preference", "reward", "process", "rl"]
STAGES: tuple[StageName, ...] = ("sft", "preference", "reward", "process", "rl")
POLICIES = ("sft", "preference", "rl")
"""Stages that train the policy."""
RECORD = "run.json"
"""The file with a run's recipe, and digests of the model that it starts from."""
SOURCES = "sources.json"
"""The file with digests of the user's files that a run reads, as they are when it begins."""


class RunConfig(Config):
    """The folder and the seed of a run."""

    dir: Neutral[PathText] = "runs/run"
    """The run's folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """The seed from which all random numbers of the run are drawn."""
    profile: Neutral[bool] = False
    """Record two steps of each stage in `profile.json` in its folder, a Chrome trace."""


class EnvironmentConfig(Config):
    """Where the task's environments run, in training and in evaluation."""

    processes: Neutral[int] = Field(default=0, ge=0)
    """How many environments run at the same time, each in its own process; a crash, or a hang that
    is killed, then costs one episode only. There are as many processes as one rollout has episodes.
    0 runs the environments in threads of this process."""


class EvalConfig(Config):
    """Held-out evaluation, on the validation rows, before the first stage and after each."""

    limit: int | None = Field(default=None, ge=1)
    """How many rows of a split are evaluated, counted from the first; null evaluates all."""
    max_new_tokens: int = Field(default=64, ge=1)
    """How many tokens the answer of one turn has, at most."""
    perplexity: bool = False
    """Whether RL ends by measuring the perplexity of each policy's held-out answers under the
    policy that RL began from, which shows whether they are still fluent.
    """


class Recipe(Config):
    """A whole run. A stage that is left out, or null, is not run."""

    run: RunConfig = RunConfig()
    """The run's folder and seed."""
    model: ModelConfig = ModelConfig()
    """The model to start from."""
    algorithm: Algorithm | None = None
    """A published method by name. It sets the keys of `rl`, or of `preference` for a method that
    learns from preferences; a key that the recipe sets itself keeps its value. With a method of
    `preference`, a recipe must not set keys of `rl`."""
    engine: EngineConfig = EngineConfig()
    """The hybrid engine."""
    generation: GenerationConfig = GenerationConfig()
    """What samples completions."""
    scale: ScaleConfig = ScaleConfig()
    """How the run uses several processes."""
    task: AnyTaskConfig | None = Field(default=None, discriminator="name")
    """The task: its environment and the data that it makes."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """Where the task's environments run."""
    sft: SFTConfig | None = None
    """Step 1: supervised fine-tuning."""
    preference: PreferenceConfig | None = None
    """Learning from judged completions (DPO and similar methods), in place of a reward model and
    RL.
    """
    reward: RewardModelConfig | None = None
    """Step 2: the reward model."""
    process: ProcessRewardConfig | None = None
    """A reward model of the steps of an answer."""
    rl: RLConfig | None = None
    """Step 3: reinforcement learning."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""

    @classmethod
    def filled(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree with its algorithm in the section that it is about, and with the correction
        for a sampler that is not the engine.
        """
        tree = expand(tree)
        rl, backend = tree.get("rl"), kind_of(tree.get("generation"), "backend")
        if isinstance(rl, dict) and backend not in (None, "engine") and "importance" not in rl:
            tree["rl"] = {**rl, "importance": {"mode": "token_truncate"}}
        return tree

    @classmethod
    def unused(cls, tree: dict[str, Any]) -> dict[tuple[str, ...], str]:
        """The keys of stages, `eval`, `environment` and `model` that nothing reads."""
        sections: dict[str, type[Config]] = {
            "eval": EvalConfig,
            "environment": EnvironmentConfig,
        }
        return dict(unused_keys(tree, STAGES, POLICIES, sections))

    @model_validator(mode="before")
    @classmethod
    def _has_a_task(cls, tree: Any) -> Any:
        check_task(tree.get("task") if isinstance(tree, dict) else None)
        return tree

    @model_validator(mode="after")
    def _names_one_algorithm(self) -> Self:
        name = "preference" if self.algorithm in PREFERENCE else "rl"
        section = self.preference if self.algorithm in PREFERENCE else self.rl
        if section and section.algorithm is None and self.algorithm:
            raise ValueError(
                f"algorithm is {self.algorithm}, and {name} was made without it; "
                f"give it to {type(section).__name__} too."
            )
        if section and section.algorithm != self.algorithm:
            raise ValueError(
                f"algorithm is {self.algorithm} and {name}.algorithm is {section.algorithm}; "
                "name one of them."
            )
        return self

    @model_validator(mode="after")
    def _optimizers_fit_the_strategy(self) -> Self:
        strategy = self.scale.strategy
        for name in STAGES if strategy != "replicate" else ():
            stage: StageConfig | None = getattr(self, name)
            if stage is None:
                continue
            needs = stage.memory_needs()
            key = stage.micro_batch_key.replace("micro_batch_tokens", "optimizer")
            critic = [("value.optimizer", needs.critic)] if needs.critic else []
            for at, optimizer in ((key, needs.optimizer), *critic):
                if optimizer.moments != "float32" or optimizer.offload != "never":
                    raise ValueError(
                        f"{name}.{at} asks for moments={optimizer.moments} and "
                        f"offload={optimizer.offload}, and scale.strategy={strategy} is built for "
                        "float32 and never; set these, or take replicate."
                    )
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.rl:
            return self
        own = sum(part.weight for part in self.rl.rewards if part.source == ENVIRONMENT)
        if own and getattr(self.task, "reward", ENVIRONMENT) is None:
            raise ValueError(
                "task.reward is null, and rl.rewards counts the environment's reward; name a "
                "reward, or take `environment` out of rl.rewards."
            )
        ahead = self.rl.rollout.ahead
        if ahead and (why := self._cannot_sample_ahead(self.rl)):
            raise ValueError(f"rl.rollout.ahead={ahead} {why}, or set rl.rollout.ahead=0.")
        if self.rl.sft_mix and not self.rl.sft_mix.data.sources:
            raise ValueError("rl.sft_mix.data.sources is empty; name one, or leave sft_mix out.")
        return self

    def memory_needs(self, stage: StageName) -> MemoryNeeds:
        """What the memory of a stage depends on. A policy that servers sample is kept whole by no
        rank, where FSDP2 splits it.
        """
        needs: MemoryNeeds = getattr(self, stage).memory_needs()
        if self.generation.backend == "engine":
            return needs
        split = self.scale.strategy == "fsdp" and stage in POLICIES
        return replace(needs, rollout=None, keep_whole=not split)

    def _cannot_sample_ahead(self, rl: RLConfig) -> str:
        """Why a step's episodes cannot be sampled while the step before it trains."""
        checks = (
            (
                self.generation.backend == "engine",
                "needs another program that samples, because the engine has the weights that are "
                "trained; set generation.backend=vllm",
            ),
            (
                self.generation.sleep,
                "needs servers that are awake while the model trains; set generation.sleep=false",
            ),
            (
                rl.rollout.replace_zero_std > 0,
                "samples before it is known which groups are replaced; set "
                "rl.rollout.replace_zero_std=0",
            ),
            (
                rl.advantage.name in NEEDS_GREEDY,
                f"samples no greedy completions for {rl.advantage.name}; take another advantage",
            ),
            (
                rl.rollout.top_p < 1,
                "needs log-probs of the policy that sampled, which servers do not give with top_p; "
                "set rl.rollout.top_p=1",
            ),
        )
        return next((why for wrong, why in checks if wrong), "")


def add_task(task: Task) -> None:
    """Let recipes of this process name a task that no package installs. Raises `ConfigError` for a
    name that an installed task has.
    """
    register(task)
    configs = [known.config for known in TASKS.values()]
    Recipe.model_fields["task"].annotation = reduce(or_, configs) | None  # type: ignore[assignment]
    Recipe.model_rebuild(force=True)


def today() -> datetime.date:
    """The date of today."""
    return datetime.date.today()


def with_date(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the date that chat templates take for today: its own, the one that the
    recipe in the folder has (none, if an earlier version wrote it), or today.
    """
    if recipe.model.date is not None:
        return recipe
    known = recorded_recipe(folder)
    date = known.model.date if known else today()
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"date": date})})


def record_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into a folder that is to hold what comes of it, and whose lock is held.

    Raises `ConfigError` if the folder holds what came of another. Keys that cannot change the
    result may differ; keys that the folder's recipe does not have count as their defaults.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        known, begun = recorded_recipe(folder), has_begun(folder)
        for left in folder.glob(UNFINISHED):  # of a process that died while it wrote
            left.unlink(missing_ok=True)
    if known and begun and (changed := differences(identity(known), identity(recipe))):
        raise ConfigError(
            f"{folder} was made by another recipe: {'; '.join(changed)}; "
            "choose another run.dir, or delete it."
        )
    if not known and any((folder / name / "done.json").exists() for name in ("data", *STAGES)):
        raise ConfigError(
            f"{folder} holds a run, but its recipe.yaml is gone; put it back, or choose another "
            "run.dir."
        )
    if not begun or not (folder / RECORD).exists():
        write_sealed(folder / RECORD, {"recipe": identity(recipe)})
    write_text(folder / "recipe.yaml", dump(recipe))


def recorded_recipe(folder: Path) -> Recipe | None:
    """The recipe that a folder was begun with, without the keys that cannot change the result; None
    where there is none.
    """
    path, record = folder / "recipe.yaml", folder / RECORD
    if not record.exists():
        return load(Recipe, path) if path.exists() else None
    known = read_sealed(record, f"delete it, and {path} counts.")
    try:
        return from_identity(Recipe, known.get("recipe"))
    except ValidationError:
        raise ConfigError(
            f"{record} holds a recipe that this version does not know; go on with the version that "
            "wrote it, or choose another run.dir."
        ) from None


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run, by which its parts are used. Raises `StorageError` for one that is not
    the recipe that the run was begun with, such as half of it.
    """
    path = folder / "recipe.yaml"
    recipe, known = load(Recipe, path), recorded_recipe(folder)
    if known and (changed := differences(identity(known), identity(recipe))):
        raise StorageError(
            f"{path} is not as the run wrote it ({changed[0]}); put it back as it was, or start the"
            " run again, which writes it again."
        )
    return recipe


def record_model(folder: Path, made: Digests) -> None:
    """Record what the model that the run starts from is made of, or compare it with that.

    Raises `StorageError` if it is another by now.
    """
    path = folder / RECORD
    if not path.exists():  # an earlier version began it
        return
    known = read_sealed(path, f"delete it, and {folder / 'recipe.yaml'} counts.")
    before = known.get("model")
    if not before:
        write_sealed(path, {**known, "model": made})
    elif made and (what := changed_files(before, made)):
        raise StorageError(
            f"The model that {folder} began with is another by now ({what}); put it back as it was,"
            " or choose another run.dir."
        )


def has_begun(folder: Path) -> bool:
    """Whether the folder has results of its recipe. A run that failed early, because of its data or
    its model, has none.
    """
    own = ("recipe.yaml", RECORD, SOURCES, LOCK_FILE, FALLBACK_LOCK_FILE, GIVEN)
    there = folder.iterdir() if folder.is_dir() else ()
    others = [p for p in there if p.name not in own and not p.match(UNFINISHED)]
    return any(not p.is_dir() or any(p.iterdir()) for p in others)
