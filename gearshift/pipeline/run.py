"""A recipe, and what running it means: prepare data, evaluate, three stages, evaluate, report.

Everything is kept in the run's folder as it is done, and nothing that lies there is done again: the
same command goes on after an interrupt, and a second run of a finished recipe only prints its
table.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
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
from gearshift.data.sources import source_mark
from gearshift.data.text import decode
from gearshift.engine import Engine
from gearshift.errors import (
    CapacityError,
    ConfigError,
    DataError,
    ModelError,
    OverlongError,
    StorageError,
)
from gearshift.models.adapters import add_adapter
from gearshift.models.classifier import context, use_own_pad
from gearshift.models.embedded import source_of
from gearshift.models.load import (
    load_classifier,
    load_policy,
    load_tokenizer,
    save_model,
    writes_text,
)
from gearshift.models.made import DONE, check_kept, made_of, written_by
from gearshift.models.vocabulary import check_same_tokens
from gearshift.pipeline.heldout import (
    TaskData,
    Trained,
    comparisons,
    open_engine,
    perplexity,
    records,
    trained_on,
)
from gearshift.pipeline.memory import (
    Shape,
    available,
    micro_batch,
    parts_of,
    resident,
    shortage,
    with_total,
)
from gearshift.pipeline.recipe import POLICIES, STAGES, Recipe, StageName, claim, claim_model, dated
from gearshift.pipeline.report import write_report
from gearshift.rewards.composite import CompositeReward
from gearshift.rollouts.collector import Collector, EpisodeSpec
from gearshift.runtime.allocator import give_back_freed_memory, short_of_memory
from gearshift.runtime.digests import Digests, file_digest, file_digests, read_sealed, write_sealed
from gearshift.runtime.files import write_json, writing
from gearshift.runtime.folder_lock import lock_run_folder
from gearshift.runtime.interrupt import Interrupt, doing
from gearshift.runtime.metrics import read_metrics
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import echo, one_line, tolerate_lost_output
from gearshift.trainers.preference import (
    NEEDS_REFERENCE,
    Judged,
    PreferenceConfig,
    PreferenceTrainer,
    render_judged,
)
from gearshift.trainers.process_reward_model import (
    Steps,
    render_steps,
    step_accuracy,
    train_process_model,
)
from gearshift.trainers.reward_model import (
    pair_accuracy,
    render_pairs,
    train_reward_model,
)
from gearshift.trainers.rl.critic import Critic, TokenCritic, load_critic
from gearshift.trainers.rl.logprob_gap import logprob_gap
from gearshift.trainers.rl.loop import RLConfig, RLTrainer
from gearshift.trainers.sft import Rendered, SFTConfig, render_examples, train_sft
from gearshift.trainers.stage import Stage, StageConfig
from gearshift.types import SamplingParams

Example = TypeVar("Example")
Fitted = TypeVar("Fitted", SFTConfig, PreferenceConfig, RLConfig)
Row = dict[str, Any]


class Run:
    """One run of a recipe in its folder."""

    def __init__(self, recipe: Recipe, echo: Callable[[str], None] = echo) -> None:
        """Raises `ConfigError` if the folder holds a run of another recipe."""
        self.folder = Path(recipe.run.dir)
        self.recipe, self.say = dated(recipe, self.folder), echo
        self.seed = recipe.run.seed
        self.task = TaskData(recipe, self.folder / "data")
        self._trained: Trained | None = None
        self._newest: Stage | None = None
        """The stage that runs."""
        self._made: dict[str, Digests] = {}

    def execute(self, stages: Iterable[StageName] = STAGES) -> dict[str, Any]:
        """Run these stages (and what they need of data); returns and writes the summary.

        Raises `FolderInUseError` while another process or thread writes into the folder, and
        `InterruptedRunError` after SIGTERM, SIGHUP or Ctrl-C: the same recipe goes on.
        """
        with (
            tolerate_lost_output(),
            Interrupt(),
            lock_run_folder(self.folder),
            _own_torch(self.recipe),
        ):
            return self._execute(tuple(stages))

    def _execute(self, wanted: Sequence[StageName]) -> dict[str, Any]:
        claim(self.folder, self.recipe)
        named = [n for n in wanted if getattr(self.recipe, n) is not None]
        kept = [*(f"{n}/{DONE}" for n in named), *["validation/base.json"] * bool(self.recipe.task)]
        left = not all((self.folder / file).exists() for file in kept)
        records(self.folder / "validation")  # a broken one is told before hours of work
        if left:
            self._claim_model()
        if self.recipe.task:
            with doing("while preparing the data"):
                self.task.prepare()
            if left:
                self._trained = trained_on(self.folder, self.recipe, begun=False)
            self._heldout("base", lambda: self._engine(None))
        work: dict[StageName, Callable[[Path], dict[str, Any]]] = {
            "sft": self._sft,
            "preference": self._preference,
            "reward": self._reward,
            "process": self._process,
            "rl": self._rl,
        }
        for name in STAGES:
            if name in named:
                self._stage(name, work[name])
        with doing("while writing the report"):
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
            examples = [to_judged(r) for r in rows]
            return render_judged(examples, engine.tokenizer, max_length, engine.max_length)

        sources = self._rendered(config.data, render)
        heldout = [pair for rows in self._rendered(config.heldout, render) for pair in rows]
        rows = self._mixed(config.data, sources)
        reference = None
        if config.reference == "each_step" and config.loss in NEEDS_REFERENCE:
            reference = self._reference(engine, start)
        trainer = PreferenceTrainer(config, engine, reference)
        if reference is None:
            trainer.precompute([row for source in sources for row in source])
        trainer.precompute(heldout)
        stage = self._new_stage("preference", config.steps(len(rows)), config, start)
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
        model = load_classifier(self.recipe.model, start, of_tokens=True, fresh_head=True)
        tokenizer = load_tokenizer(self.recipe.model, start, of_policy=False)
        use_own_pad(model, tokenizer)

        def render(rows: list[Row]) -> list[Steps]:
            examples = [to_steps(r) for r in rows]
            lengths = config.max_length, context(model)
            return render_steps(examples, tokenizer, config.separator, *lengths)

        rows = self._mixture(config.data, render)
        heldout = [row for rows in self._rendered(config.heldout, render) for row in rows]
        stage = self._new_stage("process", config.steps(len(rows)), config, start)
        train_process_model(config, model, rows, stage)
        self._save(folder, model, tokenizer, "process reward modelling", start)
        accuracy = step_accuracy(model, heldout) if heldout else None
        return {"rows": len(rows), "accuracy": accuracy, "steps": stage.total}

    def _reward(self, folder: Path) -> dict[str, Any]:
        config = self.recipe.reward
        assert config is not None
        start = config.model or self._newest_policy(before="reward")
        model = load_classifier(self.recipe.model, start, fresh_head=True)
        tokenizer = load_tokenizer(self.recipe.model, start, of_policy=False)
        use_own_pad(model, tokenizer)

        def render(rows: list[Row]) -> list[Any]:
            examples = [to_preference(r) for r in rows]
            return render_pairs(examples, tokenizer, config.max_length, context(model))

        pairs = self._mixture(config.data, render)
        heldout = [pair for rows in self._rendered(config.heldout, render) for pair in rows]
        stage = self._new_stage("reward", config.steps(len(pairs)), config, start)
        train_reward_model(config, model, pairs, stage)
        self._save(folder, model, tokenizer, "reward modelling (Bradley-Terry)", start)
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
        with ExitStack() as opened:
            collector = opened.enter_context(self.task.collector(engine, "train"))
            reward = self.folder / "reward"
            score = CompositeReward(config.rewards, self.recipe.model, reward, engine.tokenizer)
            opened.enter_context(closing(score))
            mixed = mix.data.sources
            trainer = RLTrainer(
                config,
                engine,
                collector,
                self._prompts(collector, engine, config),
                score,
                self._new_stage("rl", config.steps, config, start),
                reference=reference,
                critic=self._critic(start, engine) if needs_critic else None,
                examples=self._examples(mix.data, engine, mix.max_length) if mixed else None,
            )
            trainer.train()
        if trainer.average:
            with trainer.average.applied():
                self._save(folder / "ema", engine.model, engine.tokenizer, "averaging", start)
        self.say(_latency(read_metrics(folder / "metrics.jsonl")))
        if left_out := trainer.left_out.told():
            self.say(f"rl: {left_out}")
        how = f"reinforcement learning ({config.advantage})"
        self._save(folder, engine.model, engine.tokenizer, how, start)
        self._heldout("rl", lambda: engine)
        with doing("while measuring what rl has made"):
            gap = self._gap(engine, config.max_new_tokens)
            if self.recipe.eval.perplexity:
                self._add_perplexity(start)
        failures = sum(trainer.left_out.counts.values())
        return {"steps": config.steps, "failures": failures, "gap": gap}

    def _stage(self, name: StageName, work: Callable[[Path], dict[str, Any]]) -> None:
        folder = self.folder / name
        if (folder / DONE).exists():
            self.say(f"{name}: done before, kept ({folder}){check_kept(folder)}")
            return
        began = time.perf_counter()
        with Interrupt() as interrupt, doing(f"while preparing {name}"):
            try:
                result = work(folder)
            except BaseException as error:
                reason = short_of_memory(error)
                if reason:  # the step's tensors go, so that there is some to save with
                    traceback.clear_frames(error.__traceback__)
                if self._newest:
                    interrupt.rest = self._newest.keep()
                if reason:
                    raise CapacityError(
                        f"{name}: the memory does not suffice ({one_line(reason)}); lower "
                        f"{name}.micro_batch_tokens, end other programs, or take a smaller model; "
                        f"{interrupt.rest}."
                    ) from error
                raise
            finally:
                self._newest = None
            files = {**self._made, "digests": file_digests(folder, written_by(folder))}
            seconds = time.perf_counter() - began
            write_sealed(folder / DONE, {**result, "seconds": seconds, **files})
        give_back_freed_memory()

    def _new_stage(
        self, name: StageName, total: int, config: StageConfig, start: str | None = None
    ) -> Stage:
        self._claim_model()  # one of the hub is known once it was loaded
        made_from = self._made_from(config, start)
        self._made = {"made_from": made_from}
        if self.recipe.model.lora:
            self._made["base"] = made_of(start or self.recipe.model.name)
        folder, functions = self.folder / name, self._functions(config)
        self._newest = Stage(
            name, folder, total, self.seed, config, self.recipe, made_from, functions
        )
        return self._newest

    # What it is made from

    def _claim_model(self) -> None:
        claim_model(self.folder, made_of(self.recipe.model.name))

    def _made_from(self, config: StageConfig, start: str | None) -> Digests:
        """Digests of the sources and models that a stage reads, by the names that the recipe has
        for them.
        """
        found: Digests = {}
        mix = getattr(config, "supervised", None)
        for owner, key in ((config, "data"), (config, "heldout"), (mix, "data")):
            data: DataConfig = getattr(owner, key, DataConfig())
            for source in data.sources:
                if source.path.startswith("task:"):
                    path = self.task.path(source.path.removeprefix("task:"))
                    found[f"data/{path.name}"] = file_digest(path)
                else:
                    found[source.path] = source_mark(source.path, source.split)
        models = [start]
        if isinstance(config, RLConfig):
            path = self.task.path("train")
            found |= {f"data/{path.name}": file_digest(path)} if path.exists() else {}
            models += [config.critic, config.kl.reference if config.kl.beta else None]
            for part in config.rewards:
                kind, _, folders = part.source.partition(":")
                models += (folders or "reward").split(",") if kind == "model" else []
        for model in filter(None, models):
            name = str(self.folder / model) if model == "reward" else model
            label = name.removeprefix(f"{self.folder}/")
            found |= {f"{label}/{file}": known for file, known in made_of(name).items()}
        return found

    def _functions(self, config: StageConfig) -> Digests:
        """Digests of the files that rewards are functions in."""
        named = [part.source for part in getattr(config, "rewards", ())]
        named.append(str(getattr(self.recipe.task, "reward", "")))
        files = {name.rpartition(":")[0] for name in named}
        return {file: file_digest(Path(file)) for file in sorted(files) if Path(file).is_file()}

    # Parts

    def _engine(self, name: str | None, trained: bool = False) -> Engine:
        if not (trained and self.recipe.model.lora):
            return open_engine(self.recipe, name)
        model = load_policy(self.recipe.model, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(named_seed(self.seed, "adapter"))
            add_adapter(model, self.recipe.model.lora)
        return open_engine(self.recipe, name, model)

    def _fitted(self, config: Fitted, engine: Engine) -> Fitted:
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
        parts["activations"] = tokens * shape.token(again)
        if short := shortage(with_total(parts)["total"], free):
            self.say(f"memory: {short}")
        engine.config = engine.config.model_copy(update={"recompute": again})
        return (
            config
            if config.micro_batch_tokens
            else config.model_copy(update={"micro_batch_tokens": tokens})
        )

    def _prompts(
        self, collector: Collector, engine: Engine, config: RLConfig
    ) -> Sequence[int] | None:
        """The rows to draw prompts from, None where there are none; those whose prompt is too long
        or refused are told by file and line, or left out.
        """
        count, path = self.task.rows("train"), self.task.path("train")
        if count is None:
            return None
        longest = min(engine.max_length, engine.config.kv_cache_tokens or engine.max_length)
        if config.max_new_tokens >= longest:
            raise ConfigError(
                f"rl.max_new_tokens={config.max_new_tokens} leaves no place for a prompt in "
                f"{longest} tokens; lower it."
            )
        unusable = collector.unusable_rows(count, longest - config.max_new_tokens)
        if not unusable:
            return range(count)
        row, why = next(iter(unusable.items()))
        told = f"{path}, line {row + 1}: {why}; {len(unusable)} of {count} rows cannot be used"
        if config.overlong_prompts == "error" or len(unusable) == count:
            drop = "" if len(unusable) == count else ", or set rl.overlong_prompts=drop"
            raise DataError(f"{told}. Shorten them or lower rl.max_new_tokens{drop}.")
        self.say(f"rl: {told}, and are left out")
        return [i for i in range(count) if i not in unusable]

    def _critic(self, start: str | None, engine: Engine) -> Critic:
        """From what `rl.critic` names: a folder, this run's reward model, or (null) the policy."""
        assert self.recipe.rl is not None
        named = folder = self.recipe.rl.critic
        if named == "reward":
            folder = str(self.folder / "reward")
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"rl.critic: there is no model in {folder}; train it first.")
        if folder and named == "reward" and writes_text(self.recipe.model, folder):
            raise ModelError(
                f"rl.critic: {folder} holds a language model, which has no trained score head; "
                "train the reward stage, or set rl.critic=null to start from the policy."
            )
        critic = load_critic(self.recipe.model, folder or start, partial(decode, engine.tokenizer))
        if folder and isinstance(critic, TokenCritic):
            tokenizer = load_tokenizer(self.recipe.model, folder, of_policy=False)
            check_same_tokens(f"rl.critic: {folder}", critic.trunk, tokenizer, engine)
            _check_context(f"rl.critic: {folder}", critic.trunk, engine)
        return critic

    def _reference(
        self, engine: Engine, start: str | None, named: str | None = None
    ) -> PreTrainedModel:
        """The policy as it starts: a second copy; or, with adapters, the same model, which is
        scored with them switched off. Or the model that is `named`.
        """
        if named:
            teacher = load_policy(self.recipe.model, named).requires_grad_(False)
            tokenizer = load_tokenizer(self.recipe.model, named, of_policy=False)
            check_same_tokens(f"rl.kl.reference: {named}", teacher, tokenizer, engine)
            _check_context(f"rl.kl.reference: {named}", teacher, engine)
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
            if not (folder / DONE).exists():
                raise ConfigError(
                    f"{before} starts from the {name} stage, which has not run in {self.folder}; "
                    f"run it first, or set {name}=null."
                )
            return str(folder)
        return None

    def _gap(self, engine: Engine, max_new_tokens: int) -> dict[str, Any]:
        """Invariant 1 on held-out prompts, sampled afresh from the trained policy."""
        rows = self.task.rows("validation")
        params = SamplingParams(n=2, max_new_tokens=max_new_tokens)
        starts = [
            EpisodeSpec(i, i, None if rows is None else i) for i in range(min(16, rows or 16))
        ]
        with self.task.collector(engine, "validation") as collector:
            gap = logprob_gap(engine, collector, starts, params)
        return {**gap, "dtype": str(engine.model.dtype).removeprefix("torch.")}

    def _heldout(self, name: str, engine_of: Callable[[], Engine]) -> None:
        """Evaluate a policy on the validation rows, once; its record is kept in the folder."""
        to = self.folder / "validation"
        if self.recipe.task and not (to / f"{name}.json").exists():
            self.task.evaluate(engine_of(), name, to, trained=self._trained)

    def _add_perplexity(self, start: str | None) -> None:
        """To each held-out record, under the policy that RL began from."""
        engine = self._engine(start)
        for name, record in records(self.folder / "validation").items():
            episodes = [s for s in record["samples"] if not s["failed"]]
            record["perplexity"] = perplexity(engine, episodes)
            write_sealed(self.folder / "validation" / f"{name}.json", record)

    # Data

    def _rows(self, config: DataConfig) -> list[list[Row]]:
        """The cleaned rows of each source; `task:NAME` is a file that the task prepared."""
        sources = []
        for source in config.sources:
            path = source.path
            if path.startswith("task:"):
                path = str(self.task.path(path.removeprefix("task:")))
            rows, report = clean(
                load_rows(path, source.split)[: source.limit], config.clean, answered=True
            )
            self.say(f"data: {source.path}: {report}")
            sources.append(rows)
        return sources

    def _examples(self, config: DataConfig, engine: Engine, max_length: int) -> Mixture[Rendered]:
        return self._mixture(
            config,
            lambda rows: render_examples([to_supervised(r) for r in rows], engine, max_length),
        )

    def _mixture(
        self, config: DataConfig, render: Callable[[list[Row]], list[Example]]
    ) -> Mixture[Example]:
        return self._mixed(config, self._rendered(config, render))

    def _rendered(
        self, config: DataConfig, render: Callable[[list[Row]], list[Example]]
    ) -> list[list[Example]]:
        """What the rows of each source become, without those that are too long where the recipe
        leaves them out.
        """
        sources = self._rows(config)
        if config.overlong == "drop":
            for i, rows in enumerate(sources):
                sources[i] = [row for row in rows if _fits(row, render)]
                if left := len(rows) - len(sources[i]):
                    path = config.sources[i].path
                    self.say(f"data: {path}: {left} of {len(rows)} rows are too long, left out")
        return [render(rows) for rows in sources]

    def _mixed(self, config: DataConfig, sources: list[list[Example]]) -> Mixture[Example]:
        if not sources:
            raise ConfigError("This stage has no data; name some under data.sources.")
        return Mixture(sources, [source.weight for source in config.sources], self.seed)

    # Records

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
        origin = str(source_of(start or base))
        if Path(origin).is_dir():
            origin = str(Path(origin).resolve())
        with writing(folder), doing(f"while saving {folder.name}"):
            save_model(folder, model, tokenizer, card, self.recipe.model.lora, origin)

    def _done(self, name: str) -> dict[str, Any]:
        """What is told of what was done; {} if it was not."""
        path = self.folder / name / DONE
        if not path.exists():
            return {}
        way_out = f"delete {path.parent} to do it again."
        record = read_sealed(path, way_out)
        if not isinstance(record.get("seconds"), int | float):
            raise StorageError(f"{path} does not say how long it took; {way_out}")
        return {k: v for k, v in record.items() if k not in ("digests", "made_from", "base")}

    def _summarise(self) -> dict[str, Any]:
        done = {name: self._done(name) for name in STAGES}
        heldout = records(self.folder / "validation")
        gap = done["rl"].get("gap", {})
        seconds: dict[str, float] = {
            name: record["seconds"] for name, record in done.items() if record
        }
        seconds |= {f"heldout_{name}": record["seconds"] for name, record in heldout.items()}
        if prepared := self._done("data"):
            seconds["data"] = prepared["seconds"]
        table = {
            name: {k: v for k, v in record.items() if k not in ("samples", "seconds")}
            for name, record in heldout.items()
        }
        compared = [c.summary() for c in comparisons(heldout)]
        summary = {
            "heldout": {name: record["value"] for name, record in heldout.items()},
            "heldout_detail": table,
            "heldout_compared": compared,
            "reward_model": {"accuracy": done["reward"].get("accuracy")},
            "seconds": seconds,
            "engine": {
                "logprob_gap": gap.get("mean"),
                "logprob_gap_max": gap.get("max"),
                "dtype": gap.get("dtype"),
            },
            "task": self.recipe.task.name if self.recipe.task else None,
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
            compared=compared,
        )
        return summary


@contextmanager
def _own_torch(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads; they, and the random numbers of whoever runs it, come back after."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(recipe.model.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _check_context(key: str, model: PreTrainedModel, engine: Engine) -> None:
    """Raises `ConfigError` for a model that cannot read the longest episode."""
    if (most := context(model)) < engine.max_length:
        raise ConfigError(
            f"{key} takes {most} tokens, and an episode may have {engine.max_length}; "
            f"set engine.max_length={most}."
        )


def _fits(row: Row, render: Callable[[list[Row]], list[Any]]) -> bool:
    try:
        render([row])
    except OverlongError:
        return False
    return True


def _latency(steps: Sequence[dict[str, float]]) -> str:
    """Where the seconds of a step of reinforcement learning went, by medians."""

    def middle(name: str) -> float:
        known = [step[name] for step in steps if step.get(name) is not None]
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
        for sample in (s for s in record["samples"] if not s["failed"]):
            row = rows.setdefault(
                sample["row"],
                {"prompt": sample["prompt"], "gold": sample["gold"], "stages": {}, "rewards": {}},
            )
            row["stages"][name] = sample["completion"]
            row["rewards"][name] = sample["reward"]
    ordered = sorted(rows.values(), key=lambda r: len(set(r["rewards"].values())) == 1)
    return ordered[:count]
