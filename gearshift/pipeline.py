"""A recipe, and what running it means: prepare data, evaluate, three stages, evaluate, report.

Everything is kept in the run's folder as it is done, and nothing that lies there is done again: the
same command goes on after an interrupt, and a second run of a finished recipe only prints its
table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gearshift.data import (
    DataConfig,
    Mixture,
    clean,
    load_rows,
    to_judged,
    to_preference,
    to_steps,
    to_supervised,
)
from gearshift.engine import EngineConfig, HybridEngine
from gearshift.errors import ConfigError
from gearshift.models.adapters import add_adapter
from gearshift.models.classifier import use_own_pad
from gearshift.models.load import (
    ModelConfig,
    load_classifier,
    load_policy,
    load_tokenizer,
    save_model,
    source_of,
)
from gearshift.presets import Algorithm, expand
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.evaluate import evaluate
from gearshift.rollouts.gym_text import make_environment
from gearshift.rollouts.reward_sum import RewardSum
from gearshift.rollouts.tasks import get_task
from gearshift.rollouts.tasks.voice import VoiceConfig
from gearshift.runtime.allocator import give_back_freed_memory
from gearshift.runtime.config import Config, dump
from gearshift.runtime.metrics import read_metrics
from gearshift.runtime.progress import Progress
from gearshift.runtime.report import write_report
from gearshift.runtime.seeding import named_seed
from gearshift.trainers.critic import Critic, load_critic
from gearshift.trainers.gap import logprob_gap
from gearshift.trainers.memory import Shape, available, micro_batch, parts_of, resident
from gearshift.trainers.preference import (
    NEEDS_REFERENCE,
    Judged,
    PreferenceConfig,
    PreferenceTrainer,
    render_judged,
)
from gearshift.trainers.process import (
    ProcessRewardConfig,
    Steps,
    render_steps,
    step_accuracy,
    train_process_model,
)
from gearshift.trainers.reward import (
    RewardModelConfig,
    pair_accuracy,
    render_pairs,
    train_reward_model,
)
from gearshift.trainers.rl import RLConfig, RLTrainer
from gearshift.trainers.sft import Rendered, SFTConfig, render_examples, train_sft
from gearshift.trainers.stage import Stage, StageConfig, write_json
from gearshift.types import SamplingParams

StageName = Literal["sft", "preference", "reward", "process", "rl"]
STAGES: tuple[StageName, ...] = ("sft", "preference", "reward", "process", "rl")
POLICIES = ("sft", "preference", "rl")
"""Stages that train the policy."""
Example = TypeVar("Example")
Fitted = TypeVar("Fitted", SFTConfig, PreferenceConfig, RLConfig)
Row = dict[str, Any]


class RunConfig(Config):
    """Where a run lives, and what it is made from."""

    dir: str = "runs/run"
    """The run's folder."""
    seed: int = Field(0, ge=0, lt=2**63)
    """All randomness of the run flows from it."""


class EvalConfig(Config):
    """Held-out evaluation, before and after each stage."""

    limit: int | None = Field(None, ge=1)
    """Held-out rows to use; None takes all."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""


class Recipe(Config):
    """A whole run. A stage that is left out (or null) is not run."""

    run: RunConfig = RunConfig()
    """Folder and seed."""
    model: ModelConfig = ModelConfig()
    """What to start from."""
    algorithm: Algorithm | None = None
    """A published method by name: fills in the keys of `rl` (or of `preference`, in place of `rl`)
    that it stands for; what the recipe sets itself stays."""
    engine: EngineConfig = EngineConfig()
    """The hybrid engine."""
    task: VoiceConfig | None = None
    """What the environment is, and the data that it makes."""
    sft: SFTConfig | None = None
    """Step 1: supervised fine-tuning."""
    preference: PreferenceConfig | None = None
    """Learning from judged completions: DPO and its kin, in place of a reward model and RL."""
    reward: RewardModelConfig | None = None
    """Step 2: the reward model."""
    process: ProcessRewardConfig | None = None
    """A reward model of the steps of an answer."""
    rl: RLConfig | None = None
    """Step 3: reinforcement learning."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""

    @model_validator(mode="before")
    @classmethod
    def _with_algorithm(cls, tree: Any) -> Any:
        return expand(tree) if isinstance(tree, dict) else tree


class Run:
    """One run of a recipe in its folder."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print) -> None:
        """Raises `ConfigError` if the folder holds a run of another recipe."""
        self.recipe, self.say = recipe, say
        self.folder = Path(recipe.run.dir)
        self.seed = recipe.run.seed
        if recipe.model.threads:
            torch.set_num_threads(recipe.model.threads)

    def execute(self, stages: Iterable[StageName] = STAGES) -> dict[str, Any]:
        """Run these stages (and what they need of data); returns and writes the summary."""
        self._claim_folder()
        if self.recipe.task:
            self._prepare_data()
            self._heldout("base", lambda: self._engine(None))
        wanted = tuple(stages)
        work: dict[StageName, Callable[[Path], dict[str, Any]]] = {
            "sft": self._sft,
            "preference": self._preference,
            "reward": self._reward,
            "process": self._process,
            "rl": self._rl,
        }
        for name in STAGES:
            if name in wanted and getattr(self.recipe, name) is not None:
                self._stage(name, work[name])
        return self._summarise()

    # Stages

    def _sft(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.sft
        assert config is not None
        engine = self._engine(None, trained=True)
        config = self._fitted(config, engine)
        examples = self._examples(config.data, engine, config.max_length)
        stage = self._new_stage("sft", config.steps(len(examples)), config)
        train_sft(config, engine, examples, stage)
        self._save(folder, engine.model, engine.tokenizer, "supervised fine-tuning", None)
        self._heldout("sft", lambda: engine)
        return {"examples": len(examples), "steps": stage.total}

    def _preference(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.preference
        assert config is not None
        start = self._newest_policy(before="preference")
        engine = self._engine(start, trained=True)
        config = self._fitted(config, engine)
        max_length = config.max_length

        def render(rows: list[Row]) -> list[Judged]:
            return render_judged([to_judged(r) for r in rows], engine.tokenizer, max_length)

        sources = [render(rows) for rows in self._rows(config.data)]
        heldout = [pair for rows in self._rows(config.heldout) for pair in render(rows)]
        rows = self._mixed(config.data, sources)
        reference = None
        if config.reference == "each_step" and config.loss in NEEDS_REFERENCE:
            reference = self._reference(engine, start)
        trainer = PreferenceTrainer(config, engine, reference)
        if reference is None:
            trainer.precompute([row for source in sources for row in source])
        trainer.precompute(heldout)
        stage = self._new_stage("preference", config.steps(len(rows)), config)
        trainer.train(rows, stage)
        how = f"preference learning ({config.loss})"
        self._save(folder, engine.model, engine.tokenizer, how, start)
        self._heldout("preference", lambda: engine)
        accuracy = trainer.accuracy(heldout) if heldout else None
        return {"rows": len(rows), "accuracy": accuracy, "steps": stage.total}

    def _process(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.process
        assert config is not None
        start = config.model or self._newest_policy(before="process")
        model = load_classifier(self.recipe.model, start, of_tokens=True)
        tokenizer = load_tokenizer(self.recipe.model, start)
        use_own_pad(model, tokenizer)

        def render(rows: list[Row]) -> list[Steps]:
            examples = [to_steps(r) for r in rows]
            return render_steps(examples, tokenizer, config.separator, config.max_length)

        rows = self._mixture(config.data, render)
        stage = self._new_stage("process", config.steps(len(rows)), config)
        train_process_model(config, model, rows, stage)
        self._save(folder, model, tokenizer, "process reward modelling", start)
        heldout = [row for source in self._rows(config.heldout) for row in render(source)]
        accuracy = step_accuracy(model, heldout) if heldout else None
        return {"rows": len(rows), "accuracy": accuracy, "steps": stage.total}

    def _reward(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.reward
        assert config is not None
        start = config.model or self._newest_policy(before="reward")
        model = load_classifier(self.recipe.model, start)
        tokenizer = load_tokenizer(self.recipe.model, start)
        use_own_pad(model, tokenizer)

        def render(rows: list[Row]) -> list[Any]:
            return render_pairs([to_preference(r) for r in rows], tokenizer, config.max_length)

        pairs = self._mixture(config.data, render)
        stage = self._new_stage("reward", config.steps(len(pairs)), config)
        train_reward_model(config, model, pairs, stage)
        self._save(folder, model, tokenizer, "reward modelling (Bradley-Terry)", start)
        heldout = [pair for source in self._rows(config.heldout) for pair in render(source)]
        accuracy = pair_accuracy(model, heldout) if heldout else None
        return {
            "pairs": len(pairs),
            "heldout_pairs": len(heldout),
            "accuracy": accuracy,
            "steps": stage.total,
        }

    def _rl(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.rl
        assert config is not None
        if self.recipe.task is None:
            raise ConfigError(
                "rl needs an environment; set task.name, for example task.name=voice_assistant."
            )
        start = self._newest_policy(before="rl")
        engine = self._engine(start, trained=True)
        config = self._fitted(config, engine)
        reference = None
        if config.kl.beta > 0:
            reference = self._reference(engine, start, config.kl.reference)
        mix, needs_critic = config.supervised, config.value == "critic"
        collector = self._collector(engine, "train")
        trainer = RLTrainer(
            config,
            engine,
            collector,
            self._count_rows("train"),
            RewardSum(config.rewards, self.recipe.model, self.folder / "reward"),
            self._new_stage("rl", config.steps, config),
            reference=reference,
            critic=self._critic(start, engine) if needs_critic else None,
            examples=self._examples(mix.data, engine, mix.max_length) if mix.data.sources else None,
        )
        trainer.train()
        if trainer.average:
            with trainer.average.applied():
                self._save(folder / "ema", engine.model, engine.tokenizer, "averaging", start)
        self.say(_latency(read_metrics(folder / "metrics.jsonl")))
        how = f"reinforcement learning ({config.advantage})"
        self._save(folder, engine.model, engine.tokenizer, how, start)
        evaluated = self._heldout("rl", lambda: engine)
        gap = self._gap(engine, config.max_new_tokens)
        return {
            "steps": config.steps,
            "failures": collector.failures,
            "gap": gap,
            "heldout": evaluated["success"],
        }

    def _stage(self, name: StageName, work: Callable[[Path], dict[str, Any]]) -> None:
        folder = self.folder / name
        if (folder / "done.json").exists():
            self.say(f"{name}: done before, kept ({folder})")
            return
        began = time.perf_counter()
        result = work(folder)
        write_json(folder / "done.json", {**result, "seconds": time.perf_counter() - began})
        give_back_freed_memory()

    def _new_stage(self, name: str, total: int, config: StageConfig) -> Stage:
        identity = {
            "recipe": self.recipe.model_dump(mode="json", exclude={"run": {"dir"}}),
            "stage": name,
        }
        return Stage(name, self.folder / name, total, self.seed, config, identity)

    # Parts

    def _engine(self, name: str | None, trained: bool = False) -> HybridEngine:
        model = load_policy(self.recipe.model, name)
        if trained and self.recipe.model.lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(named_seed(self.seed, "adapter"))
                add_adapter(model, self.recipe.model.lora)
        return HybridEngine(
            model, load_tokenizer(self.recipe.model, name), self.recipe.engine, seed=self.seed
        )

    def _fitted(self, config: Fitted, engine: HybridEngine) -> Fitted:
        """The config with what it leaves to the memory decided: tokens of a micro-batch, and
        whether the engine computes layers again in the backward pass.
        """
        shape = Shape.of(engine.model, engine.model.dtype)
        trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
        lora = self.recipe.model.lora is not None
        parts = parts_of(config, engine.config, shape, trained, engine.device, lora)
        # What is loaded by now is among the parts.
        free = available(engine.device) + resident(engine.device)
        tokens, again = micro_batch(config, engine.config, shape, parts, free)
        engine.config = engine.config.model_copy(update={"recompute": again})
        return config if config.max_tokens else config.model_copy(update={"max_tokens": tokens})

    def _critic(self, start: str | None, engine: HybridEngine) -> Critic:
        """From what `rl.critic` names: a folder, this run's reward model, or (null) the policy."""
        assert self.recipe.rl is not None
        folder = self.recipe.rl.critic
        if folder == "reward":
            folder = str(self.folder / "reward")
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"rl.critic: there is no model in {folder}; train it first.")
        return load_critic(self.recipe.model, folder or start, engine.tokenizer.decode)

    def _reference(
        self, engine: HybridEngine, start: str | None, named: str | None = None
    ) -> PreTrainedModel:
        """The policy as it starts: a second copy; or, with adapters, the same model, which is
        scored with them switched off. Or the model that is `named`.
        """
        if named:
            teacher = load_policy(self.recipe.model, named).requires_grad_(False)
            if teacher.config.vocab_size != engine.model.config.vocab_size:
                raise ConfigError(
                    f"rl.kl.reference: {named} has another vocabulary than the policy; "
                    "a reference must read the same tokens."
                )
            return teacher
        if self.recipe.model.lora:
            return engine.model
        return load_policy(self.recipe.model, start).requires_grad_(False)

    def _newest_policy(self, before: str) -> str | None:
        """The folder of the policy that the stages before have made; None: the model itself."""
        stages = POLICIES[: POLICIES.index(before)] if before in POLICIES else POLICIES[:2]
        for name in reversed(stages):
            if getattr(self.recipe, name) is None:
                continue
            folder = self.folder / name
            if not (folder / "done.json").exists():
                raise ConfigError(
                    f"{before} starts from the {name} stage, which has not run in {self.folder}; "
                    f"run it first, or set {name}=null."
                )
            return str(folder)
        return None

    def _collector(self, engine: HybridEngine, split: str) -> Collector:
        assert self.recipe.task is not None
        environment = get_task(self.recipe.task.name).environment
        path = str(self._data(split))
        return Collector(
            lambda: make_environment(environment, path=path),
            engine.tokenizer,
            engine,
            timeout=self.recipe.rl.episode_timeout if self.recipe.rl else None,
        )

    def _gap(self, engine: HybridEngine, max_new_tokens: int) -> dict[str, Any]:
        """Invariant 1 on held-out prompts, sampled afresh from the trained policy."""
        collector = self._collector(engine, "heldout")
        params = SamplingParams(n=2, max_new_tokens=max_new_tokens)
        gap = logprob_gap(
            engine, collector, rows=min(16, self._count_rows("heldout")), params=params
        )
        return {**gap, "dtype": str(engine.model.dtype).removeprefix("torch.")}

    def _heldout(self, name: str, engine_of: Callable[[], HybridEngine]) -> dict[str, Any]:
        """Evaluate a policy on the held-out rows, once; the result is kept in the run's folder."""
        path = self.folder / "heldout" / f"{name}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        if self.recipe.task is None:
            return {"success": None}
        began = time.perf_counter()
        engine = engine_of()
        rows = self._count_rows("heldout")
        if self.recipe.eval.limit:
            rows = min(rows, self.recipe.eval.limit)
        with Progress(rows, f"held-out {name}") as progress, engine.generating():
            result = evaluate(
                self._collector(engine, "heldout"),
                rows,
                self.recipe.eval.max_new_tokens,
                lambda episodes, tokens: progress.advance(episodes, tokens=tokens),
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            **result.summary(),
            "seconds": time.perf_counter() - began,
            "samples": result.samples,
        }
        write_json(path, record)
        self.say(f"held-out {name}: {result.success:.1%} right of {result.n}")
        return record

    # Data

    def _prepare_data(self) -> None:
        task = self.recipe.task
        assert task is not None
        done = self.folder / "data" / "done.json"
        if done.exists():
            return
        began = time.perf_counter()
        self.say(f"data: preparing {task.name}")
        files = get_task(task.name).prepare(task, self.seed, self.folder / "data")
        seconds = time.perf_counter() - began
        write_json(done, {"files": {k: str(v) for k, v in files.items()}, "seconds": seconds})

    def _data(self, split: str) -> Path:
        return self.folder / "data" / f"{split}.jsonl"

    def _count_rows(self, split: str) -> int:
        return len(load_rows(str(self._data(split))))

    def _rows(self, config: DataConfig) -> list[list[Row]]:
        """The cleaned rows of each source; `task:NAME` is a file that the task prepared."""
        sources = []
        for source in config.sources:
            path = source.path
            if path.startswith("task:"):
                path = str(self._data(path.removeprefix("task:")))
            rows, report = clean(load_rows(path, source.split)[: source.limit], config.clean)
            self.say(f"data: {source.path}: {report}")
            sources.append(rows)
        return sources

    def _examples(
        self, config: DataConfig, engine: HybridEngine, max_length: int
    ) -> Mixture[Rendered]:
        return self._mixture(
            config,
            lambda rows: render_examples([to_supervised(r) for r in rows], engine, max_length),
        )

    def _mixture(
        self, config: DataConfig, render: Callable[[list[Row]], list[Example]]
    ) -> Mixture[Example]:
        return self._mixed(config, [render(rows) for rows in self._rows(config)])

    def _mixed(self, config: DataConfig, sources: list[list[Example]]) -> Mixture[Example]:
        if not sources:
            raise ConfigError("This stage has no data; name some under data.sources.")
        return Mixture(sources, [source.weight for source in config.sources], self.seed)

    # Records

    def _claim_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "recipe.yaml", dump(self.recipe)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self.folder} holds a run of another recipe (see {path}); "
                "choose another run.dir, or delete it."
            )
        path.write_text(text, encoding="utf-8")

    def _save(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        how: str,
        start: str | None,
    ) -> None:
        base = self.recipe.model.name
        card = (
            f"# {self.folder.name}/{folder.name}\n\n`{base}` after {how} with Gearshift.\n\n"
            f"The recipe is in `recipe.yaml` of the run; seed {self.seed}.\n"
        )
        origin = str(Path(start).resolve()) if start else str(source_of(base))
        save_model(folder, model, tokenizer, card, self.recipe.model.lora, origin)

    def _read(self, *parts: str) -> dict[str, Any]:
        path = self.folder.joinpath(*parts)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @cached_property
    def _policies(self) -> Sequence[str]:
        return ("base", *POLICIES)

    def _summarise(self) -> dict[str, Any]:
        done = {name: self._read(name, "done.json") for name in STAGES}
        heldout = {name: self._read("heldout", f"{name}.json") for name in self._policies}
        heldout = {name: record for name, record in heldout.items() if record}
        gap = done["rl"].get("gap", {})
        seconds: dict[str, float] = {
            name: record["seconds"] for name, record in done.items() if record
        }
        seconds |= {f"heldout_{name}": record["seconds"] for name, record in heldout.items()}
        if prepared := self._read("data", "done.json"):
            seconds["data"] = prepared["seconds"]
        table = {
            name: {k: v for k, v in record.items() if k not in ("samples", "seconds")}
            for name, record in heldout.items()
        }
        summary = {
            "heldout": {name: record["success"] for name, record in heldout.items()},
            "heldout_detail": table,
            "reward_model": {"accuracy": done["reward"].get("accuracy")},
            "seconds": seconds,
            "engine": {
                "logprob_gap": gap.get("mean"),
                "logprob_gap_max": gap.get("max"),
                "dtype": gap.get("dtype"),
            },
            "seed": self.seed,
            "model": self.recipe.model.name,
            "stages": done,
        }
        write_json(self.folder / "summary.json", summary)
        write_report(
            self.folder,
            title=self.folder.name,
            metrics={
                name: read_metrics(self.folder / name / "metrics.jsonl")
                for name in STAGES
                if (self.folder / name / "metrics.jsonl").exists()
            },
            samples_before_after=_side_by_side(heldout),
            heldout=table,
            summary=summary,
        )
        return summary


def _latency(steps: Sequence[dict[str, float]]) -> str:
    """Where the seconds of a step of reinforcement learning went, by medians."""

    def middle(name: str) -> float:
        known = [step[name] for step in steps if step[name] is not None]
        return median(known) if known else float("nan")

    parts = {name: middle(f"engine/{name}_seconds") for name in ("shift", "prefill", "decode")}
    parts |= {name: middle(f"seconds/{name}") for name in ("reward", "score", "train")}
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return (
        f"rl: {middle('step_time'):.2f} s a step ({told}); decoding "
        f"{middle('engine/decode_tokens_per_second'):,.0f} tokens/s, "
        f"{middle('engine/roofline_fraction'):.0%} of what this machine could at best"
    )


def _side_by_side(heldout: dict[str, dict[str, Any]], count: int = 24) -> list[dict[str, Any]]:
    """The same held-out prompts under each policy, those that changed first."""
    rows: dict[int, dict[str, Any]] = {}
    for name, record in heldout.items():
        for sample in record["samples"]:
            row = rows.setdefault(
                sample["row"],
                {"prompt": sample["prompt"], "gold": sample["gold"], "stages": {}, "rewards": {}},
            )
            row["stages"][name] = sample["completion"]
            row["rewards"][name] = sample["reward"]
    ordered = sorted(rows.values(), key=lambda r: len(set(r["rewards"].values())) == 1)
    return ordered[:count]
