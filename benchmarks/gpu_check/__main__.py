"""What Gearshift does on this machine's GPU: a table, and DIR/gpu_check.json.

    python -m benchmarks.gpu_check                  # on a card: exits 0, the table says what failed
    python -m benchmarks.gpu_check --cpu            # tiny sizes: exits 1 where something failed

Each part of a step runs in a process of its own and is killed at its time.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

STEPS = {
    "env": "env", "sdpa": "sdpa", "triton": "decode_kernels", "graphs": "graphs",
    "parity": "parity", "batching": "batching", "decode": "decode", "train": "train",
    "grpo": "grpo", "memory": "memory", "resume": "resume", "wide": "wide", "faults": "faults",
}  # fmt: skip
"""The steps in order of importance, and the file of each."""
NEEDED = (
    "torch",
    "transformers",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "gymnasium",
    "ftfy",
    "pebble",
)
"""Packages that gearshift imports; without one of them most steps cannot run."""


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seconds", type=float, default=520.0, help="time for everything")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("--only", metavar="STEP,...", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"there is no step {unknown[0]}; there are {', '.join(STEPS)}")
    _prepare(options.cpu)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"missing packages: {', '.join(missing)}; what needs them cannot run", flush=True)
    if not {"torch", "transformers"}.isdisjoint(missing):
        return 2

    from benchmarks.gpu_check.harness import checked

    return checked({name: STEPS[name] for name in names}, options.out, options.seconds, options.cpu)


def _prepare(cpu: bool) -> None:
    """Set what must be set before torch and Triton are imported."""
    os.environ["TRITON_INTERPRET"] = "1" if cpu else "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # as `gearshift` does
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


if __name__ == "__main__":
    sys.exit(main())
