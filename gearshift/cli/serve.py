"""The command `serve`: a run's policy and its reward model over HTTP.

`serve` the package knows no run and no task; this file finds them, loads the models, and hands over
what the app needs.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift.cli.served_models import load_all, models_of, print_memory
from gearshift.errors import ConfigError
from gearshift.runtime.terminal import echo

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from gearshift.pipeline.given import Given
    from gearshift.pipeline.recipe import Recipe
    from gearshift.serve.metrics import Metrics
    from gearshift.serve.policies import Policies
    from gearshift.serve.task_panel import Panel


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "serve",
        help="serve a run's policy, or a reward model's scores, over HTTP",
        description="Serve a run's newest policy by OpenAI's wire (/v1/chat/completions and "
        "others), and its reward model's scores (/score), over HTTP.",
    )
    command.add_argument("run", help="a run's folder, a model's folder, or a Hugging Face name")
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help="one more model to serve: a stage of the run such as sft, `base`, a folder, or a "
        "Hugging Face name; may be given several times",
    )
    add_address(command)
    command.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        help="how many requests may wait for the engine; a further one gets status 429; 256",
    )
    command.add_argument(
        "--default-tokens",
        type=int,
        default=1024,
        help="the most tokens of an answer to a request that names no limit; 1024",
    )
    command.add_argument(
        "--strict",
        action="store_true",
        help="refuse requests with unknown fields, which are ignored otherwise",
    )
    command.add_argument("--seed", type=int, default=0, help="the seed of sampling; 0")
    add_recogniser(command)
    command.set_defaults(do=serve)


def add_recogniser(command: argparse.ArgumentParser) -> None:
    """Add the argument that says what turns a recording into words."""
    command.add_argument(
        "--recogniser",
        help="module:function or file.py:function that gives the text of a WAV file, for the "
        "recordings of the chat page",
    )


def add_address(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a server listens, and whom it answers."""
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address; any but loopback needs a key in GEARSHIFT_KEY",
    )
    command.add_argument("--port", type=int, default=8000, help="the port; 8000")
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="one more name under which clients may reach the server",
    )
    command.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may call the server, such as https://example.org",
    )


def settings_of(arguments: argparse.Namespace) -> Any:
    """The `ServerSettings` of these arguments, with the key of GEARSHIFT_KEY. Raises `ConfigError`
    if the libraries of the server are not installed.
    """
    try:
        from gearshift.serve.settings import ServerSettings

        __import__("gearshift.serve.app")
        __import__("prometheus_client")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"A server needs {error.name}; run pip install 'gearshift[serve]'."
        ) from error
    from gearshift.rewards.http_client import bearer_key

    for origin in arguments.allow_origin:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise ConfigError(f"--allow-origin {origin} is no origin; write https://example.org.")
    return ServerSettings(
        host=arguments.host,
        port=arguments.port,
        key=bearer_key(None, "GEARSHIFT_KEY"),
        allow_host=tuple(arguments.allow_host),
        allow_origin=tuple(arguments.allow_origin),
    )


def serve(arguments: argparse.Namespace) -> None:
    """Answer over HTTP until a signal."""
    given = {name: getattr(arguments, name) for name in ("max_waiting", "default_tokens", "strict")}
    if min(arguments.max_waiting, arguments.default_tokens) < 1:
        raise ConfigError("--max-waiting and --default-tokens must be 1 or more.")
    settings = replace(settings_of(arguments), **given)
    from gearshift.cli.label import labels_beside
    from gearshift.serve.app import make_app, run_app
    from gearshift.serve.metrics import Metrics
    from gearshift.serve.policies import Policies

    folder = Path(arguments.run).expanduser()
    if (reward := _reward(folder)) is not None and reward == folder:
        run_app(make_app(_score_routes(reward), settings), "/score")
    metrics, policies = Metrics(), Policies()
    named = models_of(arguments.run, arguments.against)
    run = folder.resolve() if (folder / "recipe.yaml").exists() else None
    panel = panel_of(named[0].recipe, arguments.recogniser)
    print_memory(named)
    with ExitStack() as stack:
        labels = labels_beside(run, policies, named, stack) if run else []
        runs = {run.name: run} if run else {}
        routes = [*labels, *_routes(policies, metrics, runs, panel, bool(labels))]
        routes += _score_routes(reward) if reward else []

        def load() -> None:
            load_all(named, arguments.seed, policies, metrics, stack)

        run_app(make_app(routes, settings, metrics.observe), "/", load)


@contextmanager
def beside(recipe: Recipe, port: int, recogniser: str | None = None) -> Iterator[Given]:
    """A server beside a run: its page, its figures, and its policy while it learns by
    reinforcement. Gives what the run needs for that. `recogniser`: see `panel_of`. Raises
    `ConfigError` on several ranks.
    """
    from gearshift.cli.talk import system_of
    from gearshift.engine import Engine
    from gearshift.engine.service import EngineService
    from gearshift.pipeline.given import Given
    from gearshift.runtime.exit_errors import in_several_processes

    if in_several_processes():
        raise ConfigError("--serve works in one process; leave it out with torchrun.")
    settings = settings_of(Namespace(host="127.0.0.1", port=port, allow_host=[], allow_origin=[]))
    from gearshift.serve.app import Server, make_app
    from gearshift.serve.metrics import Metrics
    from gearshift.serve.policies import Policies, Policy

    policies, metrics, folder = Policies(), Metrics(), Path(recipe.run.dir)
    system = system_of(recipe)

    @contextmanager
    def serving(engine: Engine) -> Iterator[None]:
        with EngineService(engine, own_thread=False) as service:
            policy = Policy("policy", service, engine.tokenizer, system, engine.end_tokens)
            policies.add(policy)
            metrics.serve(policy)
            try:
                yield
            finally:
                policies.remove("policy")

    panel = panel_of(recipe, recogniser)
    routes = _routes(policies, metrics, {folder.resolve().name: folder}, panel)
    server = Server(make_app(routes, settings, metrics.observe))
    server.start()
    echo(f"the run's page and policy: {server.url}", file=sys.stderr)
    try:
        yield Given(serving=serving)
    finally:
        server.stop(drain=1.0)


def _routes(
    policies: Policies,
    metrics: Metrics,
    runs: dict[str, Path],
    panel: Panel | None,
    labels: bool = False,
) -> list[BaseRoute]:
    """The endpoints and the pages of a server of policies, and of these runs."""
    from gearshift.serve.openai import openai_routes
    from gearshift.serve.runs.routes import run_routes
    from gearshift.serve.served import policy_page_routes

    own = [*openai_routes(policies, metrics), *metrics.routes(), *run_routes(runs)]
    return [*own, *policy_page_routes(policies, bool(runs), labels, panel)]


def panel_of(recipe: Recipe | None, recogniser: str | None = None) -> Panel | None:
    """What the chat page shows beside a conversation with a model of this recipe's task.
    `recogniser` names the function that gives the text of a recording; None takes pocketsphinx.
    """
    from gearshift.serve.speech import hear
    from gearshift.serve.task_panel import Panel
    from gearshift.tasks.registry import get_task

    task = get_task(recipe.task.name) if recipe and recipe.task else None
    if recipe is None or task is None or task.panel is None:
        return None
    panel, config, run, phrases = task.panel, recipe.task, Path(recipe.run.dir), task.phrases

    def words(path: str) -> str:
        return hear(path, recogniser, phrases(run) if phrases and not recogniser else ())

    return Panel(
        panel.folder,
        lambda messages: panel.state(config, run, messages),
        words,
        panel.single,
        recogniser,
    )


def _reward(folder: Path) -> Path | None:
    """The reward model that the user names, or that the named run has."""
    from gearshift.models.load import ModelConfig, holds_model, writes_text

    for place in (folder, folder / "reward"):
        if holds_model(place) and not writes_text(ModelConfig(), str(place)):
            return place
    return None


def _score_routes(folder: Path) -> Any:
    from gearshift.models.load import ModelConfig
    from gearshift.rewards.models import ModelReward
    from gearshift.serve.score import score_routes

    return score_routes(ModelReward(ModelConfig(), folder))
