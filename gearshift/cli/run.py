"""The commands that train and evaluate: `run`, one for each stage, and `eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift.cli.paths import resolve_folder
from gearshift.cli.serve import add_recogniser, beside
from gearshift.errors import ConfigError
from gearshift.pipeline.shipped import find_recipe
from gearshift.runtime.exit_errors import rank_of_process
from gearshift.runtime.terminal import echo, one_line, printable, tolerate_lost_output

if TYPE_CHECKING:
    from gearshift.pipeline.recipe import Recipe, StageName
    from gearshift.pipeline.records import Record
    from gearshift.pipeline.summary import Summary
    from gearshift.rollouts.evaluate import Comparison

STAGES = {
    "run": "run a recipe: its data, its evaluations and all its stages",
    "sft": "run one stage: supervised fine-tuning",
    "dpo": "run one stage: learning from preferences (DPO, IPO, KTO, ORPO, SimPO)",
    "reward": "run one stage: the reward model",
    "process": "run one stage: a reward model of the steps of an answer",
    "rl": "run one stage: reinforcement learning",
}

_WITH_VALUE = {
    "--recipe", "--show", "--split", "--workers", "--gpus-per-worker", "--cpus-per-worker",
    "--max-failures", "--on", "--serve", "--recogniser",
}  # fmt: skip
"""Options that a value follows."""
_OVERRIDES = "a key of the recipe and its new value, such as rl.steps=100"


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    for name, what in STAGES.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument(
            "recipe", help="a YAML file, or the name of a recipe that ships with gearshift"
        )
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help=_OVERRIDES)
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check files, print the whole recipe, the plan and the memory; train nothing",
        )
        command.add_argument(
            "--on",
            metavar="NODESxGPUSxGIB",
            help="with --dry-run: plan the memory for another machine, such as 4x8x79: four nodes "
            "with eight GPUs of 79 GiB each",
        )
        command.add_argument(
            "--profile",
            action="store_true",
            help="record two steps of each stage in profile.json in its folder, a Chrome trace",
        )
        if name in ("run", "rl"):
            command.add_argument(
                "--serve",
                type=int,
                metavar="PORT",
                help="serve the run's page and its policy beside the run, on loopback; requests "
                "are answered while it samples, and wait while it trains",
            )
            add_recogniser(command)
        command.set_defaults(do=run, command=name, on_ranks=True, serve=None, recogniser=None)
    evaluation = commands.add_parser(
        "eval",
        help="measure policies on held-out rows",
        description="Measure a run's policies, or any model, on held-out rows, and print a table "
        "with intervals, and the answers that changed most.",
    )
    evaluation.add_argument(
        "run", help="a run's folder, or any model (a folder or a Hugging Face name)"
    )
    evaluation.add_argument("overrides", nargs="*", metavar="key.sub=value", help=_OVERRIDES)
    evaluation.add_argument(
        "--recipe", help="the recipe whose task is used; a run's own by default"
    )
    evaluation.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="the rows: validation (the default) to choose settings, test once at the end",
    )
    evaluation.add_argument(
        "--show", type=int, default=3, help="how many wins and losses are printed"
    )
    evaluation.set_defaults(do=evaluate)


def options_first(words: list[str]) -> list[str]:
    """The words of these commands with options in front: argparse takes no overrides after one."""
    if not words or words[0] not in {*STAGES, "eval", "ray"}:
        return words
    command, *rest = words
    options: list[str] = []
    others: list[str] = []
    for i, word in enumerate(rest):
        is_value = i > 0 and rest[i - 1] in _WITH_VALUE
        (options if word.startswith("--") or is_value else others).append(word)
    return [command, *options, *others]


def run(arguments: argparse.Namespace) -> None:
    """Run a recipe, or one of its stages, and print the results."""
    from gearshift.pipeline.recipe import STAGES as ALL
    from gearshift.pipeline.recipe import Recipe
    from gearshift.pipeline.run import Run
    from gearshift.runtime.allocator import keep_freed_memory
    from gearshift.runtime.config import load

    overrides = [*arguments.overrides, *(["run.profile=true"] if arguments.profile else [])]
    recipe = load(Recipe, find_recipe(arguments.recipe), overrides)
    arguments.folder_of_run = Path(recipe.run.dir)
    command = {"dpo": "preference"}.get(arguments.command, arguments.command)
    if command in ALL and getattr(recipe, command) is None:
        raise ConfigError(f"The recipe has no section `{command}`; add one to run that stage.")
    stages = ALL if command == "run" else (command,)
    if arguments.dry_run:
        _plan(recipe, stages, arguments.on)
        return
    if arguments.on:
        raise ConfigError("--on plans for another machine; add --dry-run.")
    if arguments.recogniser and arguments.serve is None:
        raise ConfigError("--recogniser is for the page beside a run; add --serve PORT.")
    keep_freed_memory()
    with ExitStack() as opened:
        given = None
        if arguments.serve is not None:
            given = opened.enter_context(beside(recipe, arguments.serve, arguments.recogniser))
        summary = Run(recipe, given=given).execute(stages)
    if rank_of_process():
        return
    with tolerate_lost_output():  # the run is done, whether or not its table can be printed
        print_summary(Path(recipe.run.dir), summary)


def _plan(recipe: Recipe, stages: Sequence[StageName], on: str | None) -> None:
    """Check the recipe and print its plan, which all ranks make together."""
    from gearshift.pipeline.check import check_recipe
    from gearshift.pipeline.plan import plan
    from gearshift.runtime.distributed import joined

    with joined(recipe.scale, None):
        check_recipe(recipe, stages)
        echo(plan(recipe, on))


def print_summary(folder: Path, summary: Summary) -> None:
    """Print the held-out table of a run, and what else its summary says."""
    from gearshift.pipeline.records import comparisons, records

    found = records(folder / "validation")
    _print_table(f"{folder}: validation", found, comparisons(found))
    if (accuracy := summary["reward_model"]["accuracy"]) is not None:
        echo(f"reward model: {accuracy:.1%} of held-out pairs in the right order")
    if (gap := summary["engine"]["logprob_gap"]) is not None:
        echo(
            f"engine: the gears' log-probs differ by {gap:.1e} nat on average "
            f"({summary['engine']['dtype']})"
        )
    minutes = sum(summary["seconds"].values()) / 60
    echo(f"{minutes:.1f} minutes in all; report: {folder / 'report.html'}")
    if found:
        echo(f"talk to it: gearshift chat {folder}")


def _print_table(title: str, found: Mapping[str, Record], compared: list[Comparison]) -> None:
    """Each policy's figures in a column, then what changed from one to the next."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gearshift.rollouts.evaluate import span

    if not found:
        return
    console = Console(highlight=False)
    kept = ("metric", "value", "interval", "seconds", "samples", "n", "episodes", "split")
    metric = next(iter(found.values()))["metric"]
    others = dict.fromkeys(k for r in found.values() for k in r if k not in kept and k != metric)
    table = Table(title=Text(printable(title)), title_justify="left")
    for column in ("", *found):
        table.add_column(Text(printable(column)), justify="right" if column else "left")

    rows = found.values()
    lines = {
        metric: [f"{r['value']:.3f}" for r in rows],
        "95%": [span(r["interval"]) for r in rows],
        **{name: [f"{r[name]:.4g}" if name in r else "" for r in rows] for name in others},
        "problems": [str(r["n"]) for r in rows],
        "episodes": [str(r["episodes"]) for r in rows],
    }
    for name, cells in lines.items():
        table.add_row(*(Text(printable(cell)) for cell in (name, *cells)))
    console.print(table)
    for comparison in compared:
        echo(str(comparison))


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the held-out table of a run or a model, and the answers that changed most."""
    from gearshift.pipeline.heldout import evaluate_run
    from gearshift.pipeline.records import changed, comparisons

    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    run = resolve_folder(arguments.run)
    title, found = evaluate_run(run, recipe, arguments.overrides, arguments.split)
    if arguments.split == "test":
        echo("test: these rows are for the end; choose no setting by what they say")
    compared = comparisons(found)
    _print_table(title, found, compared)
    if not compared:
        return
    last = next(c for c in compared if (c.before, c.after) == tuple(found)[-2:])
    for word, rows in (("better", last.wins), ("worse", last.losses)):
        shown = changed(found[last.before], found[last.after], rows, arguments.show)
        for prompt, before, after in shown:
            echo(f"\n{word}: {one_line(prompt, 160)}")
            echo(f"  {last.before}: {one_line(before, 160)}")
            echo(f"  {last.after}: {one_line(after, 160)}")
