"""The command line: words in, one line out when something is wrong, never a traceback.

The commands are in `run.py`, `talk.py` and `tools.py`. No file here names a task.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from gearshift import __version__
from gearshift.cli import run, talk, tools
from gearshift.errors import ConfigError
from gearshift.runtime.exit_errors import exit_on_signals, exit_with_error, remove_signal_handlers
from gearshift.runtime.terminal import echo


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 an error that the user can correct, 2 wrong usage, 70 an
    error that no code foresaw (its traceback is in a file; GEARSHIFT_DEBUG=1 prints it), 128 + n
    stopped by signal n.
    """
    for stream, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):  # text outside its encoding is no error
            stream.reconfigure(errors=errors)
    # A GPU's memory then falls less into pieces. PyTorch reads this when it first takes some.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if argv is None:
        exit_on_signals()
    words = run.options_first(list(sys.argv[1:] if argv is None else argv))
    arguments = argparse.Namespace()
    try:
        arguments = make_parser().parse_args(words or ["--help"])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not hasattr(arguments, "on_ranks"):
            raise ConfigError(
                f"gearshift {words[0]} runs in one process; start it without torchrun."
            )
        arguments.do(arguments)
        sys.stdout.flush()  # a full disk is an error here, and not the interpreter's
        if argv is None:
            remove_signal_handlers()
    except (Exception, KeyboardInterrupt) as error:
        exit_with_error(error, getattr(arguments, "folder_of_run", None), alone=argv is None)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="gearshift", description="Align language models with reinforcement learning."
    )
    parser.add_argument("--version", action="version", version=f"gearshift {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (run, talk, tools):
        group.add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        echo(message, end="", file=file or sys.stderr)
