"""The command line: words in, one line out when something is wrong, never a traceback.

The commands are in `run.py`, `ray.py`, `talk.py`, `serve.py`, `label.py`, `watch.py`,
`tools.py` and `doctor.py`. No file here names a task.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from gearshift import __version__
from gearshift.cli import doctor, label, ray, run, serve, talk, tools, watch
from gearshift.errors import ConfigError
from gearshift.runtime.exit_errors import (
    exit_on_signals,
    exit_with_error,
    in_several_processes,
    rank_of_process,
    remove_signal_handlers,
)
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
    if in_several_processes():  # PyTorch warns at length where another rank has ended
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if argv is None:
        exit_on_signals()
    words = run.options_first(list(sys.argv[1:] if argv is None else argv))
    arguments = argparse.Namespace()
    try:
        arguments = make_parser().parse_args(words or ["--help"])
        if in_several_processes() and not hasattr(arguments, "on_ranks"):
            raise ConfigError(
                f"gearshift {words[0]} runs in one process; start it without torchrun."
            )
        arguments.do(arguments)
        sys.stdout.flush()  # a full disk is an error here, and not the interpreter's
        if argv is None:
            remove_signal_handlers()
    except (Exception, KeyboardInterrupt) as error:
        # A signal may have cut the import of PyTorch, which cannot be imported again then.
        if in_several_processes() and isinstance(error, Exception):
            from gearshift.runtime.distributed import share_error

            share_error(error)
        exit_with_error(error, getattr(arguments, "folder_of_run", None), alone=argv is None)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="gearshift", description="Align language models with reinforcement learning."
    )
    parser.add_argument("--version", action="version", version=f"gearshift {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (run, ray, talk, serve, label, watch, tools, doctor):
        group.add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        if rank_of_process() == 0:
            echo(message, end="", file=file or sys.stderr)
