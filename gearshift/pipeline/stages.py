"""The five stages of a run: each opens its model, reads its rows, trains, saves, and measures what
it made. Each is a function of its own config and of the run. What a stage returns goes into its
`done.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from gearshift.data import to_preference, to_stepwise, to_supervised, to_unpaired
from gearshift.data.text import decode
from gearshift.engine import Engine
from gearshift.errors import ConfigError, DataError, ModelError
from gearshift.models.classifier import context
from gearshift.models.load import load_policy, load_tokenizer, writes_text
from gearshift.models.runner import ModelRunner
from gearshift.models.vocabulary import check_same_tokens
from gearshift.pipeline.context import Context
from gearshift.pipeline.heldout import open_engine, perplexity
from gearshift.pipeline.recipe import StageName
from gearshift.pipeline.records import records
from gearshift.pipeline.stage_data import Row, mix, render_rows, render_sources
from gearshift.rewards.composite import CompositeReward
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.runtime.digests import write_sealed
from gearshift.runtime.distributed import world
from gearshift.runtime.interrupt import doing
from gearshift.runtime.metrics import read_metrics
from gearshift.runtime.terminal import counted
from gearshift.tasks.registry import TASKS
from gearshift.trainers.judged import Judged, render_judged
from gearshift.trainers.preference import (
    NEEDS_REFERENCE,
    PreferenceConfig,
    PreferenceLoss,
    train_preference,
)
from gearshift.trainers.process_reward_model import (
    ProcessRewardConfig,
    Steps,
    render_steps,
    step_accuracy,
    train_process_reward_model,
)
from gearshift.trainers.reward_model import (
    Pair,
    RewardModelConfig,
    pair_accuracy,
    render_pairs,
    train_reward_model,
)
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.critic import Critic, TokenCritic, load_critic
from gearshift.trainers.rl.logprob_gap import logprob_gap
from gearshift.trainers.rl.loop import RLData, train_rl
from gearshift.trainers.rl.methods import CriticConfig
from gearshift.trainers.sft import Rendered, SFTConfig, render_examples, train_sft
from gearshift.types import SamplingParams

Result = dict[str, Any]


def sft(config: SFTConfig, run: Context) -> Result:
    """Supervised fine-tuning of the recipe's model."""
    config, engine = run.open_policy(config, None)
    render = partial(_render_supervised, engine=engine, max_length=config.max_length)
    examples = mix(config.data, run, render_sources(config.data, run, render))
    stage = run.begin_stage("sft", config.steps(len(examples)), config)
    train_sft(config, engine, examples, stage)
    run.save(stage.folder, engine.runner, engine.tokenizer, "supervised fine-tuning", None)
    run.heldout("sft", lambda: engine)
    return {"examples": len(examples), "steps": stage.total}


def preference(config: PreferenceConfig, run: Context) -> Result:
    """Preference learning of the newest policy."""
    start = run.newest_policy(before="preference")
    config, engine = run.open_policy(config, start)
    max_length = config.max_length
    labels = config.inputs().labels

    def render(rows: list[Row]) -> list[Judged]:
        examples = [to_unpaired(r) for r in rows]
        return render_judged(examples, engine.tokenizer, max_length, engine.max_length)

    rows = mix(config.data, run, render_sources(config.data, run, render, labels))
    heldout = render_rows(config.heldout, run, render, labels)
    reference = None
    if config.reference == "each_step" and config.loss in NEEDS_REFERENCE:
        reference = load_reference(run, engine, start)
    loss = PreferenceLoss(config, engine, reference)
    loss.precompute(heldout)
    stage = run.begin_stage("preference", config.steps(len(rows)), config, start)
    train_preference(config, engine, rows, stage, reference)
    how = f"preference learning ({config.loss})"
    run.save(stage.folder, engine.runner, engine.tokenizer, how, start)
    run.heldout("preference", lambda: engine)
    accuracy = loss.accuracy(heldout) if heldout else None
    return {"rows": len(rows), "accuracy": accuracy, "steps": stage.total}


def reward(config: RewardModelConfig, run: Context) -> Result:
    """A reward model, from `config.model` or from the newest policy."""
    start = config.model or run.newest_policy(before="reward")
    config, runner, tokenizer = run.open_classifier(config, start)
    longest = config.max_length, context(runner.model)
    labels = config.inputs().labels

    def render(rows: list[Row]) -> list[Pair]:
        examples = [to_preference(r) for r in rows]
        return render_pairs(examples, tokenizer, *longest)

    pairs = mix(config.data, run, render_sources(config.data, run, render, labels))
    heldout = render_rows(config.heldout, run, render, labels)
    stage = run.begin_stage("reward", config.steps(len(pairs)), config, start)
    train_reward_model(config, runner, pairs, stage)
    run.save(stage.folder, runner, tokenizer, "reward modelling (Bradley-Terry)", start)
    accuracy = pair_accuracy(runner, heldout) if heldout else None
    return {
        "pairs": len(pairs),
        "heldout_pairs": len(heldout),
        "accuracy": accuracy,
        "steps": stage.total,
    }


def process(config: ProcessRewardConfig, run: Context) -> Result:
    """A reward model of steps, from `config.model` or from the newest policy."""
    start = config.model or run.newest_policy(before="process")
    config, runner, tokenizer = run.open_classifier(config, start, of_tokens=True)
    separator, longest = config.separator, (config.max_length, context(runner.model))

    def render(rows: list[Row]) -> list[Steps]:
        examples = [to_stepwise(r) for r in rows]
        return render_steps(examples, tokenizer, separator, *longest)

    rows = mix(config.data, run, render_sources(config.data, run, render))
    heldout = render_rows(config.heldout, run, render)
    stage = run.begin_stage("process", config.steps(len(rows)), config, start)
    train_process_reward_model(config, runner, rows, stage)
    run.save(stage.folder, runner, tokenizer, "process reward modelling", start)
    accuracy = step_accuracy(runner, heldout) if heldout else None
    return {"rows": len(rows), "accuracy": accuracy, "steps": stage.total}


def rl(config: RLConfig, run: Context) -> Result:
    """Reinforcement learning of the newest policy on the recipe's task."""
    if run.recipe.task is None:
        raise ConfigError(f"rl needs a task; set task.name, one of {', '.join(TASKS)}.")
    start = run.newest_policy(before="rl")
    config, engine = run.open_policy(config, start)
    with ExitStack() as opened:
        reference = None
        if config.kl.beta > 0:
            reference = load_reference(run, engine, start, config.kl.reference)
        collector = opened.enter_context(run.task.collector(engine, "train"))
        score = CompositeReward(
            config.rewards, run.recipe.model, run.folder / "reward", engine.tokenizer
        )
        opened.enter_context(closing(score))
        rows = usable_rows(config, run, collector, engine)
        critic, examples = None, None
        if mixed := config.sft_mix:
            render = partial(_render_supervised, engine=engine, max_length=mixed.max_length)
            examples = mix(mixed.data, run, render_sources(mixed.data, run, render))
        stage = run.begin_stage("rl", config.steps, config, start)
        if isinstance(config.value, CriticConfig):
            critic = load_value_model(config.value, run, engine, start)
        data = RLData(collector, rows, score, examples)
        opened.enter_context(run.given.serving(engine))
        trainer = train_rl(config, engine, data, stage, reference, critic)
    folder = run.folder / "rl"
    if trainer.average:
        with trainer.average.applied():
            run.save(folder / "ema", engine.runner, engine.tokenizer, "averaging", start)
    if world().main:
        run.echo(_step_times(read_metrics(folder / "metrics.jsonl")))
    if left_out := trainer.left_out.describe():
        run.echo(f"rl: {left_out}")
    how = f"reinforcement learning ({config.advantage.name})"
    run.save(folder, engine.runner, engine.tokenizer, how, start)
    run.heldout("rl", lambda: engine)
    with doing("while measuring what rl has made"):
        gap = _measure_gap(config, run, engine)
        if run.recipe.eval.perplexity:
            _add_perplexity(run, start)
    failures = sum(trainer.left_out.counts.values())
    return {"steps": config.steps, "failures": failures, "gap": gap}


STAGE_FUNCTIONS: dict[StageName, Callable[[Any, Context], Result]] = {
    "sft": sft,
    "preference": preference,
    "reward": reward,
    "process": process,
    "rl": rl,
}


def _render_supervised(rows: list[Row], engine: Engine, max_length: int) -> list[Rendered]:
    return render_examples([to_supervised(r) for r in rows], engine, max_length)


def usable_rows(
    config: RLConfig, run: Context, collector: Collector, engine: Engine
) -> Sequence[int] | None:
    """The rows to draw prompts from, None where there are none. Rows whose prompt is too long, or
    that the chat template refuses, are an error that names file and line, or are left out.
    """
    count, path = run.task.rows("train"), run.task.path("train")
    if count is None:
        return None
    limits = engine.limits
    longest = min(limits.max_length, limits.cache_tokens or limits.max_length)
    if config.rollout.max_new_tokens >= longest:
        raise ConfigError(
            f"rl.rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no place for a "
            f"prompt in {longest} tokens; lower it."
        )
    most = longest - config.rollout.max_new_tokens
    unusable = world().says(lambda: collector.unusable_rows(count, most), "the rows' lengths")
    if not unusable:
        return range(count)
    row, why = next(iter(unusable.items()))
    message = (
        f"{path}, line {row + 1}: {why}; {len(unusable)} of {counted(count, 'row')} cannot be used"
    )
    if config.rollout.overlong_prompts == "error" or len(unusable) == count:
        drop = "" if len(unusable) == count else ", or set rl.rollout.overlong_prompts=drop"
        raise DataError(f"{message}. Shorten them or lower rl.rollout.max_new_tokens{drop}.")
    run.echo(f"rl: {message}, and are left out")
    return [i for i in range(count) if i not in unusable]


def load_value_model(
    config: CriticConfig, run: Context, engine: Engine, start: str | None
) -> Critic:
    """The critic that `init_from` names: a folder, this run's reward model, or (null) the policy as
    it starts.
    """
    model, key, named = run.recipe.model, "rl.value.init_from", config.init_from
    folder = str(run.folder / "reward") if named == "reward" else named
    if folder and not Path(folder).is_dir():
        raise ConfigError(f"{key}: there is no model in {folder}; train it first.")
    if folder and named == "reward" and writes_text(model, folder):
        raise ModelError(
            f"{key}: {folder} holds a language model, which has no trained score head; "
            "train the reward stage, or leave init_from out to start from the policy."
        )
    critic = load_critic(
        model, folder or start, partial(decode, engine.tokenizer), engine.runner.keep_whole
    )
    run.show_form("critic", critic.runner)
    if folder and isinstance(critic, TokenCritic):
        _check_reads(f"{key}: {folder}", critic.trunk, run, folder, engine)
    return critic


def load_reference(
    run: Context, engine: Engine, start: str | None, named: str | None = None
) -> ModelRunner:
    """The policy as it starts: a second copy; or, with adapters, the same model, which is scored
    with them switched off. Or the model that is `named`.
    """
    if named:
        teacher = load_policy(run.recipe.model, named).requires_grad_(False)
        _check_reads(f"rl.kl.reference: {named}", teacher, run, named, engine)
        return _unchanged(run, teacher)
    if run.recipe.model.lora:
        return run.show_form("reference", engine.runner)
    return _unchanged(run, load_policy(run.recipe.model, start).requires_grad_(False))


def _unchanged(run: Context, model: PreTrainedModel) -> ModelRunner:
    """The runner of a reference model. It is split over the ranks where the policy is only split,
    too.
    """
    runner = ModelRunner(model, keep_whole=run.recipe.generation.backend == "engine")
    if not runner.keep_whole:
        runner.split()
    return run.show_form("reference", runner)


def _check_reads(
    key: str, model: PreTrainedModel, run: Context, folder: str, engine: Engine
) -> None:
    """Raises `ConfigError` for a model that has other tokens than the policy, or that cannot read
    the longest episode.
    """
    tokenizer = load_tokenizer(run.recipe.model, folder, of_policy=False)
    check_same_tokens(key, model, tokenizer, engine)
    if (most := context(model)) < engine.max_length:
        raise ConfigError(
            f"{key} takes {most} tokens, and an episode may have {engine.max_length}; "
            f"set engine.max_length={most}."
        )


def _measure_gap(config: RLConfig, run: Context, engine: Engine) -> dict[str, Any]:
    """By how much the gears' log-probs differ on held-out prompts, sampled from the trained
    policy.
    """
    rows = run.task.rows("validation")
    params = SamplingParams(n=2, max_new_tokens=config.rollout.max_new_tokens)
    starts = [EpisodeSpec(i, i, None if rows is None else i) for i in range(min(16, rows or 16))]
    with run.task.collector(engine, "validation") as collector:
        gap = logprob_gap(engine, collector, starts, params)
    return {**gap, "dtype": str(engine.model.dtype).removeprefix("torch.")}


def _add_perplexity(run: Context, start: str | None) -> None:
    """Add to each held-out record its answers' perplexity under the policy that RL began from."""
    engine = open_engine(run.recipe, start)
    for name, record in records(run.folder / "validation").items():
        episodes = [s for s in record["samples"] if not s["failed"]]
        record["perplexity"] = perplexity(engine, episodes)
        path = run.folder / "validation" / f"{name}.json"
        world().says(partial(write_sealed, path, record), "a policy's record")


def _step_times(steps: Sequence[dict[str, float]]) -> str:
    """How long the parts of a step of reinforcement learning took, by medians. Where servers
    sample, the engine's figures are missing.
    """

    def middle(name: str) -> float:
        known = [step[name] for step in steps if step.get(name) is not None]
        return median(known) if known else float("nan")

    parts = {name: middle(f"engine/{name}_seconds") for name in ("shift", "prefill", "decode")}
    parts |= {name: middle(f"seconds/{name}") for name in ("reward", "score", "train")}
    listed = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0)
    text = f"rl: {middle('step_time'):.2f} s a step ({listed})"
    if not isnan(rate := middle("engine/decode_tokens_per_second")):
        text += (
            f"; decoding {rate:,.0f} tokens/s, {middle('engine/roofline_fraction'):.0%} of what "
            "this machine's measured speed allows"
        )
    mfu = middle("speed/mfu")
    used = "" if isnan(mfu) else f" ({mfu:.0%} of the GPU's promised rate)"
    return f"{text}; training {middle('speed/tokens_per_second'):,.0f} tokens/s{used}"
