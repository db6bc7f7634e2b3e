"""The quiet failures of this field, put in one at a time: each must make a test fail.

    python -m tests.mutations [--only NAME]

Each mutation is made in a copy of the package, where the tests that should catch it are run. All
of them are run once before, as they must pass without it. Prints a line for each and `caught N of
M` last; exits non-zero when more than one was missed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tests.mutations import (
    Mutation,
    api,
    chat,
    determinism,
    doors,
    endings,
    failing,
    figures,
    files,
    gpu,
    hostile,
    labels,
    loop,
    models,
    ranks_checkpoint,
    requests,
    rewards,
    rl,
    run_folder,
    run_page,
    scale,
    sharded,
    verdicts,
    vllm,
    weights,
    wire,
    zero,
)  # fmt: skip

ROOT = Path(__file__).parent.parent.parent
SUBJECTS = (
    loop, models, requests, rewards, rl, chat, files, figures, run_folder, endings, weights,
    hostile, failing, verdicts, doors, determinism, api, gpu, scale, sharded, vllm,
    ranks_checkpoint, labels, wire, run_page, zero,
)  # fmt: skip
MUTATIONS = [mutation for subject in SUBJECTS for mutation in subject.MUTATIONS]
PATIENCE = 900.0
"""Seconds after which tests that hang have seen the mutation."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    options = parser.parse_args(argv)
    named = [m for m in MUTATIONS if options.only in m.name]
    chosen = [m for m in named if not m.needs or find_spec(m.needs)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("gearshift", "tests", "recipes", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        words = {w for m in chosen for w in m.tests.split() if w.startswith("tests")}
        before = run_tests(" ".join(sorted(words)), copy, patience=None)
        assert before is not None
        if before.returncode:
            raise SystemExit(f"Tests fail without a mutation.\n{before.stdout[-2000:]}")
        for mutation in chosen:
            found = is_caught(mutation, copy)
            caught += found
            print(f"{'caught' if found else 'MISSED'}  {mutation.name}", flush=True)
    print(f"caught {caught} of {len(chosen)}")
    sys.exit(caught < len(chosen) - 1)


def is_caught(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests fail with it."""
    path = copy / "gearshift" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) < 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has no such text any more.")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        done = run_tests(mutation.tests, copy)
    finally:
        path.write_text(source, encoding="utf-8")
    if done is None:
        return True
    interrupted = done.returncode == 2 and "! KeyboardInterrupt !" in done.stdout
    if done.returncode not in (0, 1) and not interrupted:  # 1: tests ran, and some failed
        raise SystemExit(f"{mutation.name}: pytest could not run.\n{done.stdout[-2000:]}")
    return done.returncode != 0


def run_tests(
    tests: str, copy: Path, patience: float | None = PATIENCE
) -> subprocess.CompletedProcess[str] | None:
    """pytest on these tests in the copy; None if they hang."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        return subprocess.run(
            [*command, *tests.split()], cwd=copy, capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return None


if __name__ == "__main__":
    main()
