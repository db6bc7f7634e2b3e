"""The summary of a run: the figures of its records, in `summary.json` and `report.html`. It must
not import an engine or a trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from gearshift.errors import StorageError
from gearshift.models.made import DONE
from gearshift.pipeline.recipe import STAGES, Recipe
from gearshift.pipeline.records import Record, comparisons, records
from gearshift.pipeline.report import write_report
from gearshift.runtime.digests import read_sealed
from gearshift.runtime.files import json_bytes, write_json
from gearshift.runtime.metrics import read_metrics


class RewardModelSummary(TypedDict):
    """What the reward model's stage measured."""

    accuracy: float | None
    """The share of held-out pairs in the right order; None if there is no such stage."""


class EngineSummary(TypedDict):
    """By how much the log-probs of the two gears differ; None before RL has run."""

    logprob_gap: float | None
    """The mean, in nats."""
    logprob_gap_max: float | None
    """The largest, in nats."""
    dtype: str | None
    """The dtype of the weights."""


class Summary(TypedDict):
    """What `summary.json` holds."""

    heldout: dict[str, float]
    """The held-out figure of each policy."""
    heldout_detail: dict[str, Record]
    """The held-out record of each policy, without its samples."""
    heldout_compared: list[dict[str, Any]]
    """Each policy with the one before it."""
    reward_model: RewardModelSummary
    seconds: dict[str, float]
    """The seconds of each stage and of each evaluation."""
    engine: EngineSummary
    task: str | None
    seed: int
    model: str
    stages: dict[str, Record]
    """What each stage recorded; {} for one that was not run."""


def summarise(folder: Path, recipe: Recipe) -> Summary:
    """Write `summary.json` and `report.html` into the run's folder; returns the summary."""
    done: dict[str, Record] = {name: read_done(folder / name) for name in STAGES}
    heldout = records(folder / "validation")
    gap = done["rl"].get("gap", {})
    seconds: dict[str, float] = {name: record["seconds"] for name, record in done.items() if record}
    seconds |= {f"heldout_{name}": record["seconds"] for name, record in heldout.items()}
    if data := read_done(folder / "data"):
        seconds["data"] = data["seconds"]
    table = {
        name: {k: v for k, v in record.items() if k not in ("samples", "seconds")}
        for name, record in heldout.items()
    }
    compared = [c.summary() for c in comparisons(heldout)]
    summary: Summary = {
        "heldout": {name: record["value"] for name, record in heldout.items()},
        "heldout_detail": table,
        "heldout_compared": compared,
        "reward_model": {"accuracy": done["reward"].get("accuracy")},
        "seconds": seconds,
        "engine": {
            "logprob_gap": gap.get("mean"),
            "logprob_gap_max": gap.get("max"),
            "dtype": gap.get("dtype"),
        },
        "task": recipe.task.name if recipe.task else None,
        "seed": recipe.run.seed,
        "model": recipe.model.name,
        "stages": done,
    }
    path, report = folder / "summary.json", folder / "report.html"
    if report.exists() and path.exists() and path.read_bytes() == json_bytes(summary):
        return summary  # the report is of the same records
    write_json(path, summary)
    write_report(
        folder,
        title=folder.name,
        metrics={
            name: read_metrics(folder / name / "metrics.jsonl")
            for name in STAGES
            if (folder / name / "metrics.jsonl").exists()
        },
        samples_before_after=_side_by_side(heldout),
        heldout=table,
        summary=summary,
        compared=compared,
    )
    return summary


def read_done(stage: Path) -> dict[str, Any]:
    """What a finished stage recorded, without its digests; {} for one that is not finished. Raises
    `StorageError` if the record is broken.
    """
    path = stage / DONE
    if not path.exists():
        return {}
    way_out = f"delete {stage} to do it again."
    record = read_sealed(path, way_out)
    if not isinstance(record.get("seconds"), int | float):
        raise StorageError(f"{path} does not say how long it took; {way_out}")
    return {k: v for k, v in record.items() if k not in ("digests", "made_from", "base")}


def _side_by_side(heldout: dict[str, dict[str, Any]], count: int = 24) -> list[dict[str, Any]]:
    """The same held-out prompts under each policy, those that changed first."""
    rows: dict[int, dict[str, Any]] = {}
    for name, record in heldout.items():
        for sample in (s for s in record["samples"] if not s["failed"]):
            row = rows.setdefault(
                sample["row"],
                {"prompt": sample["prompt"], "gold": sample["gold"], "stages": {}, "rewards": {}},
            )
            row["stages"][name] = sample["completion"]
            row["rewards"][name] = sample["reward"]
    ordered = sorted(rows.values(), key=lambda r: len(set(r["rewards"].values())) == 1)
    return ordered[:count]
