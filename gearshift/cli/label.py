"""The command `label`: people compare, judge and correct answers on a page of this machine.

The package `serve` knows no run and no task; this file finds the rows and the models, and hands
over what the page needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gearshift import __version__
from gearshift.cli.serve import add_address, settings_of
from gearshift.cli.served_models import load_all, models_of, print_memory
from gearshift.cli.talk import system_of
from gearshift.errors import ConfigError, FolderInUseError
from gearshift.runtime.terminal import counted, echo

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from gearshift.cli.served_models import Named
    from gearshift.data.formats import PromptExample
    from gearshift.data.labels import Item
    from gearshift.serve.labelling.sampling import Sampler
    from gearshift.serve.policies import Policies

OWNER_KEY = "GEARSHIFT_OWNER_KEY"
_FORMATS = ("preference", "judged", "messages")


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "label",
        help="let people label answers on a page, or export their labels",
        description="Let people compare, judge and correct answers on a page, or export their "
        "labels (--export). The labels of a run are kept in RUN/labels, those of a file in "
        "FILE.labels.",
    )
    command.add_argument("what", metavar="RUN|FILE", help="a run's folder, or a file of rows")
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help="one more policy that answers the prompts; a file of prompts needs at least one",
    )
    command.add_argument(
        "--rollouts",
        action="store_true",
        help="compare the episodes in the run's rollouts.jsonl, and load no model",
    )
    command.add_argument(
        "--samples", type=int, choices=(1, 2), default=2, help="answers to compare; 2. 1: judge it"
    )
    command.add_argument("--temperature", type=float, default=1.0, help="of the samples; 1")
    command.add_argument(
        "--max-new-tokens", type=int, default=256, help="the most tokens of an answer; 256"
    )
    command.add_argument("--seed", type=int, default=0, help="the seed of samples and sides; 0")
    command.add_argument("--guidelines", metavar="FILE", help="a text that people read first")
    command.add_argument("--tags", default="", help="reasons to choose from: wrong,too long")
    command.add_argument(
        "--criteria", default="", help="rate single answers from 1 to 5 by these: helpful,true"
    )
    command.add_argument(
        "--overlap", type=float, default=0.0, help="the share of items that two people label; 0"
    )
    command.add_argument("--gold", metavar="FILE", help="pairs whose better answer is known")
    command.add_argument(
        "--people",
        default="",
        metavar="NAMES",
        help="print a link with a key of its own for each: Ann,Ben; needs GEARSHIFT_KEY",
    )
    add_address(command)
    exports = command.add_argument_group("export")
    exports.add_argument("--export", metavar="FILE", help="write the labels as rows, and end")
    exports.add_argument(
        "--format", choices=_FORMATS, default="preference", help="of the rows; preference"
    )
    exports.add_argument(
        "--min-agree", type=float, default=0.0, help="the least share of people who agree; 0"
    )
    exports.add_argument(
        "--by", action="append", default=[], metavar="WHO", help="only this person's labels"
    )
    exports.add_argument("--ties", action="store_true", help="keep ties, with margin 0")
    command.set_defaults(do=label)


def label(arguments: argparse.Namespace) -> None:
    """Serve the page until a signal, or write an export."""
    what = Path(arguments.what).expanduser()
    for name in ("overlap", "min_agree"):
        if not 0 <= getattr(arguments, name) <= 1:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is {getattr(arguments, name)}; give a share from 0 to 1.")
    if what.is_dir():
        folder = what / "labels"
    elif what.is_file():
        folder = what.with_name(f"{what.name}.labels")
    else:
        raise ConfigError(f"There is no run and no file {what}; check the path.")
    if arguments.export:
        _export(arguments, folder)
    else:
        _serve(arguments, what, folder)


def _export(arguments: argparse.Namespace, folder: Path) -> None:
    from gearshift.data.labels import FILE, Labels, label_rows, read_events, rows_text
    from gearshift.runtime.files import write_text

    labels = Labels(read_events(folder / FILE)[0])
    how = arguments.format, arguments.min_agree, arguments.by, arguments.ties
    rows = list(label_rows(labels, *how))
    write_text(Path(arguments.export).expanduser(), rows_text(rows))
    echo(f"{counted(len(rows), 'row')} of {counted(len(labels.items), 'item')} written to "
         f"{arguments.export}")  # fmt: skip


def _serve(arguments: argparse.Namespace, what: Path, folder: Path) -> None:
    settings = replace(settings_of(arguments), people=_words(arguments.people))
    if settings.people and not settings.key:
        raise ConfigError("--people needs the server's own key; set GEARSHIFT_KEY.")
    from gearshift.serve.app import make_app, run_app
    from gearshift.serve.labelling.routes import LabelSettings, label_routes
    from gearshift.serve.labelling.store import LabelStore
    from gearshift.serve.pages import page_routes

    guidelines = arguments.guidelines and Path(arguments.guidelines).expanduser()
    if guidelines and not guidelines.is_file():
        raise ConfigError(f"There is no file {guidelines}; check --guidelines.")
    labelling = LabelSettings(
        title=what.name,
        guidelines=guidelines.read_text(encoding="utf-8") if guidelines else "",
        tags=_words(arguments.tags),
        criteria=_words(arguments.criteria),
        seed=arguments.seed,
        overlap=arguments.overlap,
        owner_key=os.environ.get(OWNER_KEY, "").strip() or None,
    )
    with ExitStack() as stack:
        store = stack.enter_context(LabelStore(folder, f"gearshift {__version__}"))
        work = _work(arguments, what, stack)
        new = sum(map(store.add_item, work.items))
        echo(f"labels: {counted(len(store.labels.items), 'item')}, {new} of them new; {store.file}")
        routes = label_routes(store, work.sampler, labelling, work.prompts)
        run_app(make_app([*routes, *page_routes(["labels"])], settings), "/labels")


def labels_beside(
    run: Path, policies: Policies, named: list[Named], stack: ExitStack
) -> list[BaseRoute]:
    """The routes of the labels of a run whose policies are served: the first two are compared, or
    two answers of one. None while another process labels this run. `stack` ends the store.
    """
    from gearshift.serve.labelling.items import prompts_of
    from gearshift.serve.labelling.routes import LabelSettings, label_routes
    from gearshift.serve.labelling.sampling import policy_sampler
    from gearshift.serve.labelling.store import LabelStore
    from gearshift.types import SamplingParams

    try:
        store = stack.enter_context(LabelStore(run / "labels", f"gearshift {__version__}"))
    except FolderInUseError as error:
        echo(f"no labels here: {error}", file=sys.stderr)
        return []

    prompts: Iterable[PromptExample] = ()
    with suppress(ConfigError):  # a task without rows: people are asked what the chat sends
        prompts = prompts_of(_rows_of_run(run), system_of(named[0].recipe))

    async def sample(prompt: PromptExample) -> Any:
        served = [(policies.get(n.name), kept_name(n.source)) for n in named[:2]]
        params = SamplingParams(max_new_tokens=256)
        return await policy_sampler(served, 3 - len(served), params)(prompt)

    owner_key = os.environ.get(OWNER_KEY, "").strip() or None
    settings = LabelSettings(title=run.name, owner_key=owner_key)
    return label_routes(store, sample, settings, prompts)


def kept_name(source: str) -> str:
    """The name that labels keep of a model: its run and stage, and no folder of this machine."""
    return "/".join(Path(source).parts[-2:])


class _Work(NamedTuple):
    """What people are asked: items that exist, and prompts with what answers them."""

    items: list[Item]
    prompts: Iterable[PromptExample] = ()
    sampler: Sampler | None = None


def _work(arguments: argparse.Namespace, what: Path, stack: ExitStack) -> _Work:
    """The items and prompts of a run or a file."""
    from gearshift.data import load_rows
    from gearshift.serve.labelling.items import has_answers, item_of_row, prompts_of, rollout_items

    known = load_rows(str(arguments.gold)) if arguments.gold else []
    items = [item_of_row(row, known=True) for row in known]
    if arguments.rollouts:
        steps = load_rows(str(what / "rl" / "rollouts.jsonl"))
        return _Work([*items, *rollout_items(steps, what.name)])
    rows = _rows_of_run(what) if what.is_dir() else load_rows(str(what))
    if not what.is_dir() and all(map(has_answers, rows)):
        return _Work([*items, *map(item_of_row, rows)])
    policies = [*([str(what)] if what.is_dir() else []), *arguments.against]
    if not policies:
        raise ConfigError(f"{what} has prompts without answers; name a policy with --against.")
    if len(policies) > 2:
        raise ConfigError(f"There are {len(policies)} policies; two can be compared at once.")
    sampler, system = _sampler(arguments, policies, stack)
    return _Work(items, prompts_of(rows, system), sampler)


def _rows_of_run(run: Path) -> list[Any]:
    """The training rows of the run's task, which its policies may learn from once labelled."""
    from gearshift.pipeline.recipe import recipe_of
    from gearshift.pipeline.task_data import TaskData

    rows = TaskData(recipe_of(run), run / "data").load("train")
    if rows is None:
        raise ConfigError(f"The task of {run} has no rows; give a file of prompts, or --rollouts.")
    return list(rows)


def _sampler(
    arguments: argparse.Namespace, names: list[str], stack: ExitStack
) -> tuple[Sampler, str | None]:
    """What answers a prompt, and the system message of the first policy's task. `stack` ends the
    engines.
    """
    from gearshift.serve.labelling.sampling import policy_sampler
    from gearshift.serve.metrics import Metrics
    from gearshift.serve.policies import Policies
    from gearshift.types import SamplingParams

    count = 1 if len(names) == 2 else arguments.samples
    params = SamplingParams(
        temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens
    )
    policies, metrics, named = Policies(), Metrics(), models_of(names[0], names[1:])
    print_memory(named)
    load_all(named, arguments.seed, policies, metrics, stack)
    served = [(policies.get(n.name), kept_name(n.source)) for n in named]
    return policy_sampler(served, count, params), served[0][0].system


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
