"""The command `watch`: the run page of runs that train or have ended. It loads no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gearshift.cli.serve import add_address, settings_of
from gearshift.errors import ConfigError


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "watch",
        help="show runs on a page: curves, episodes token by token, held-out rows",
        description="Show runs on a page: their curves, live while they train, their episodes "
        "token by token, the time of each phase, held-out rows. It only reads the runs' files.",
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a stage's")
    add_address(command)
    command.set_defaults(do=watch)


def watch(arguments: argparse.Namespace) -> None:
    """Serve the page until a signal."""
    settings = settings_of(arguments)
    from gearshift.serve.app import make_app, run_app
    from gearshift.serve.pages import page_routes
    from gearshift.serve.runs.routes import names_of, run_routes

    folders = [Path(name).expanduser() for name in arguments.runs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"There is no folder {folder}; name a run's folder.")
    routes = [*run_routes(names_of(folders)), *page_routes(["runs"])]
    run_app(make_app(routes, settings), "/runs")
