"""What the stages of one run share: its recipe, its folder, its task's data, and how they open
models, begin, and save. It must not import a trainer of one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.engine import Engine
from gearshift.errors import ConfigError
from gearshift.models.adapters import add_adapter
from gearshift.models.classifier import use_own_pad
from gearshift.models.embedded import source_of
from gearshift.models.load import load_classifier, load_policy, load_tokenizer, save_model
from gearshift.models.made import DONE, made_of
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.given import Given
from gearshift.pipeline.heldout import evaluate_policy, open_engine
from gearshift.pipeline.machine import Machine
from gearshift.pipeline.memory import Shape, fit, shortage
from gearshift.pipeline.provenance import (
    Trained,
    check_functions,
    check_sources,
    functions_of,
    made_from,
)
from gearshift.pipeline.recipe import POLICIES, STAGES, Recipe, StageName, record_model
from gearshift.pipeline.task_data import TaskData
from gearshift.runtime.digests import Digests
from gearshift.runtime.distributed import world
from gearshift.runtime.files import writing
from gearshift.runtime.interrupt import doing
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import echo
from gearshift.trainers.stage import Stage, StageConfig

Fitted = TypeVar("Fitted", bound=StageConfig)


@dataclass
class Context:
    """One run of a recipe in its folder, as its stages see it."""

    recipe: Recipe
    folder: Path
    echo: Callable[[str], None] = echo
    """Takes each line that the run prints."""
    given: Given = field(default_factory=Given)
    """What the caller hands in besides the recipe."""
    trained: Trained | None = None
    """The rows that the run trains on, which its held-out figures leave out."""
    stage: Stage | None = None
    """The stage that runs now."""
    _shown: set[str] = field(default_factory=set)
    made: dict[str, Digests] = field(default_factory=dict)
    """Digests of what the stage that runs now is made from."""

    @property
    def seed(self) -> int:
        """The seed from which all random numbers of the run are drawn."""
        return self.recipe.run.seed

    @property
    def task(self) -> TaskData:
        """The recipe's task with its files."""
        return TaskData(self.recipe, self.folder / "data")

    def begin_stage(
        self, name: StageName, total: int, config: StageConfig, start: str | None = None
    ) -> Stage:
        """The stage in its folder, `total` steps long. `start` names the model that it starts from;
        None is the recipe's.
        """
        # The commit of a model on the hub is known once it was loaded.
        world().says(self.record_model, "the model's record")
        found = world().says(
            lambda: made_from(config, start, self.folder), "what a stage is made from"
        )
        self.made = {"made_from": found}
        if self.recipe.model.lora:
            self.made["base"] = made_of(start or self.recipe.model.name)
        functions, folder = functions_of(config, self.recipe), self.folder / name
        world().says(
            lambda: check_sources(self.folder, folder, found | functions), "the stage's sources"
        )
        origins = self.recipe, found, functions | self.given.digests()
        callbacks, profile = self.given.callbacks, self.recipe.run.profile
        self.stage = Stage(name, folder, total, self.seed, config, *origins, callbacks, profile)
        return self.stage

    def record_model(self) -> None:
        """Record what the model that the run starts from is made of, or compare it with that."""
        record_model(self.folder, made_of(self.recipe.model.name))

    def newest_policy(self, before: str) -> str | None:
        """The folder of the policy that the stages before `before` made; None is the recipe's
        model. Raises `ConfigError` if one of them has not run.
        """
        stages = POLICIES[: POLICIES.index(before)] if before in POLICIES else POLICIES[:2]
        for name in reversed(stages):
            if getattr(self.recipe, name) is None:
                continue
            folder = self.folder / name
            if not world().says((folder / DONE).exists, "whether a stage is done"):
                raise ConfigError(
                    f"{before} starts from the {name} stage, which has not run in {self.folder}; "
                    f"run it first, or set {name}=null."
                )
            return str(folder)
        return None

    def open_policy(self, config: Fitted, start: str | None) -> tuple[Fitted, Engine]:
        """The policy that a stage trains, with a fresh adapter if the recipe has one; and the
        stage's config with the sizes that it leaves to the memory.
        """
        model = load_policy(self.recipe.model, start)
        if self.recipe.model.lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(named_seed(self.seed, "adapter"))
                add_adapter(model, self.recipe.model.lora)
        config, recompute = self._fit(config, model)
        engine = open_engine(self.recipe, start, model, recompute, trained=True)
        self.show_form("policy", engine.runner)
        return config, engine

    def open_classifier(
        self, config: Fitted, start: str | None, of_tokens: bool = False
    ) -> tuple[Fitted, ModelRunner, PreTrainedTokenizerBase]:
        """The classifier that a stage trains, of sequences or `of_tokens`, with a fresh head; its
        tokenizer, and the stage's config as `open_policy` has it.
        """
        model = load_classifier(self.recipe.model, start, of_tokens=of_tokens, fresh_head=True)
        tokenizer = load_tokenizer(self.recipe.model, start, of_policy=False)
        use_own_pad(model, tokenizer)
        config, _ = self._fit(config, model)
        runner = ModelRunner(model, undescribed=OF_TOKENS if of_tokens else None)
        self.show_form("process reward model" if of_tokens else "reward model", runner)
        return config, runner, tokenizer

    def show_form(self, role: str, runner: ModelRunner) -> ModelRunner:
        """Print how the model of this role runs, unless the same line was printed before; returns
        the runner.
        """
        line = runner.form_line(role)
        if line not in self._shown:
            self._shown.add(line)
            self.echo(line)
        return runner

    def _fit(self, config: Fitted, model: PreTrainedModel) -> tuple[Fitted, bool]:
        """The config with the sizes that it leaves to the memory; and whether to compute layers
        again in the backward pass.
        """
        shape = Shape.of(model, model.dtype)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stage = next(n for n in STAGES if isinstance(getattr(self.recipe, n), type(config)))
        needs, machine = self.recipe.memory_needs(stage), Machine.here(model.device)
        lora = self.recipe.model.lora if needs.head == "logprobs" else None
        activations = Activations(model.config, needs, model.dtype, model.device, lora, type(model))
        engine, adapters = self.recipe.engine, lora is not None
        fitted = fit(needs, engine, shape, trained, machine, activations, adapters)
        key = f"{stage}.{config.micro_batch_key}"
        if short := shortage(fitted.parts["total"], machine.free, key):
            self.echo(f"memory: {short}")
        if not needs.micro_batch_tokens:
            config = config.with_micro_batch(fitted.tokens)
        return config, fitted.recompute

    def heldout(self, name: str, engine_of: Callable[[], Engine]) -> None:
        """Evaluate a policy on the validation rows, once; its record is kept in the folder."""
        to = self.folder / "validation"
        path = to / f"{name}.json"
        if self.recipe.task and not world().says(path.exists, "whether a policy was evaluated"):
            world().says(lambda: check_functions(self.folder, self.recipe), "the functions")
            evaluate_policy(self.task, engine_of(), name, to, trained=self.trained)

    def save(
        self,
        folder: Path,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        how: str,
        start: str | None,
    ) -> None:
        """Write a runner's model with its card, which says `how` it was made."""
        base = self.recipe.model.name
        card = (
            f"# {self.folder.name}/{folder.name}\n\n`{base}` after {how} with Gearshift.\n\n"
            f"The recipe is in `recipe.yaml` of the run; seed {self.seed}.\n"
        )
        origin = str(source_of(start or base))
        if Path(origin).is_dir():
            origin = str(Path(origin).resolve())

        def write() -> None:
            with writing(folder):
                lora = self.recipe.model.lora
                save_model(folder, runner.model, tokenizer, card, lora, origin, weights)

        with doing(f"while saving {folder.name}"):
            weights = runner.whole_state()
            world().says(write, "the saved model")
