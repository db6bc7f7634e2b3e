"""The command `ray`: a recipe's run on workers of Ray Train, started again when one ends."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from gearshift.errors import ConfigError, GearshiftError, RankError
from gearshift.pipeline.shipped import find_recipe
from gearshift.runtime.terminal import tolerate_lost_output


def add_commands(commands: Any) -> None:
    """Add the parser of this command."""
    command = commands.add_parser(
        "ray",
        help="run a recipe on several workers of Ray",
        description="Run a recipe on several workers of Ray: of the cluster that RAY_ADDRESS "
        "names, or else of this machine. All of them must see the run's folder.",
    )
    command.add_argument(
        "recipe", help="a YAML file, or the name of a recipe that ships with gearshift"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="a key of the recipe and its new value, such as rl.steps=100",
    )
    command.add_argument("--workers", type=int, required=True, help="how many workers")
    command.add_argument(
        "--gpus-per-worker", type=int, default=0, choices=(0, 1), help="0 (the default) or 1"
    )
    command.add_argument("--cpus-per-worker", type=float, default=1, help="1 by default")
    command.add_argument(
        "--max-failures",
        type=int,
        default=0,
        help="how often all workers are started again after one of them ended; 0 by default",
    )
    command.set_defaults(do=run_on_ray)


def run_on_ray(arguments: argparse.Namespace) -> None:
    """Run a recipe on Ray's workers, and print the results."""
    from gearshift.cli.run import print_summary
    from gearshift.pipeline.recipe import Recipe
    from gearshift.runtime.config import load

    recipe = load(Recipe, find_recipe(arguments.recipe), arguments.overrides)
    folder = arguments.folder_of_run = Path(recipe.run.dir)
    if arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}; give at least 1.")
    failed = _fit(arguments, recipe.scale.timeout, folder)
    if failed:
        error: Any = GearshiftError(failed["line"])
        error.exit_code = failed["code"]
        raise error
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with tolerate_lost_output():
        print_summary(folder, summary)


def _fit(arguments: argparse.Namespace, timeout: float, folder: Path) -> dict[str, Any]:
    """Run on the workers; the line and the exit code of an error that another try would meet too.
    Raises `RankError` if workers ended more often than allowed.
    """
    try:
        import ray
        import ray.train as train
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError as error:
        raise ConfigError(
            f"Ray Train cannot be imported ({error}); pip install 'gearshift[ray]'."
        ) from error
    gpus = arguments.gpus_per_worker
    logging.getLogger("ray").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,  # Ray repeats each error of each worker at length
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
        )
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "recipe": str(find_recipe(arguments.recipe)),
            "overrides": arguments.overrides,
            "folder": os.getcwd(),
        },
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=max(1, int(timeout))
        ),
        scaling_config=train.ScalingConfig(
            num_workers=arguments.workers,
            use_gpu=bool(gpus),
            resources_per_worker={
                "CPU": arguments.cpus_per_worker,
                **({"GPU": gpus} if gpus else {}),
            },
        ),
        run_config=train.RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            failure_config=train.FailureConfig(max_failures=arguments.max_failures),
        ),
    )
    try:
        return trainer.fit().return_value or {}
    except TrainingFailedError as error:
        raise RankError(_why(error, arguments.max_failures)) from error
    finally:
        ray.shutdown()


def _why(error: Any, allowed: int) -> str:
    """Why the workers ended, in a sentence."""
    from gearshift.runtime.terminal import one_line

    failures = getattr(error, "worker_failures", None) or {0: error}
    rank, first = min(failures.items())
    return (
        f"Ray's worker {rank} ended, after {allowed} starts that --max-failures allows: "
        f"{one_line(str(first), 1000)}; the same command goes on from what is saved."
    )


def _work(given: dict[str, Any]) -> dict[str, Any]:
    """One worker: the whole run, as one rank of it. Returns an error that another try would meet
    too.
    """
    import torch
    from ray.train.torch import get_device

    from gearshift.pipeline.recipe import Recipe
    from gearshift.pipeline.run import Run
    from gearshift.runtime.config import load
    from gearshift.runtime.exit_errors import describe_error

    os.chdir(given["folder"])
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    folder = None
    try:
        recipe = load(Recipe, Path(given["recipe"]), given["overrides"])
        folder = Path(recipe.run.dir)
        Run(recipe).execute()
    except (Exception, KeyboardInterrupt) as error:
        line, code = describe_error(error, folder)
        if code != 1 or isinstance(error, RankError):
            raise RuntimeError(line) from None
        return {"line": line, "code": code}
    return {}
