"""A run cut and resumed is the run that was not, bit for bit; a signal saves and stops it."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.errors import (
    CheckpointError,
    InterruptedRunError,
    NumericalError,
    StorageError,
)
from gearshift.models.tiny import tiny_model
from gearshift.runtime import checkpoint, metrics
from gearshift.runtime.config import Config, Neutral
from gearshift.runtime.distributed import Part
from gearshift.runtime.metrics import MEASURED, read_metrics
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.stage import Stage, StageConfig
from tests.trainers.rl_runs import small, trainer


def fingerprint(run: RLTrainer) -> dict[str, str]:
    """Hashes of everything a run ends with; times, and what the scheduler met, are left out of the
    metrics.
    """
    state: dict[str, Any] = {k: v.state_dict() for k, v in run.stage._tracked.items()}
    tensors, skeleton = checkpoint.flatten(state)
    weights = hashlib.blake2b()
    for name in sorted(tensors):
        weights.update(name.encode())
        value = tensors[name]
        whole = value.own if isinstance(value, Part) else value.detach()
        weights.update(whole.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    folder = run.stage.folder
    metrics = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "weights and optimizer": weights.hexdigest(),
        "scalars": json.dumps(skeleton, sort_keys=True),
        "metrics": json.dumps(metrics),
        "sampled tokens": (folder / "rollouts.jsonl").read_text(),
    }


def stop_after(run: RLTrainer, step: int) -> None:
    """Have SIGTERM arrive during this step."""
    log = run.stage.log

    def log_and_signal(at: int, metrics: dict[str, float], tokens: int, *of: Any) -> None:
        log(at, metrics, tokens, *of)
        if at == step:
            signal.raise_signal(signal.SIGTERM)

    run.stage.log = log_and_signal  # type: ignore[method-assign]


@pytest.mark.parametrize("value", ["head", "critic"])
def test_seven_and_thirteen_steps_are_twenty(tmp_path: Path, value: str) -> None:
    config = small(
        steps=20,
        value={"kind": value},
        update={"epochs": 2, "minibatches": 2},
        loss={"name": "ppo_clip"},
    )
    straight = trainer(config, tmp_path / "straight")
    straight.train()

    cut = trainer(config, tmp_path / "cut")
    stop_after(cut, 6)
    with pytest.raises(InterruptedRunError, match="after step 7 of 20"):
        cut.train()
    resumed = trainer(config, tmp_path / "cut")
    resumed.train()
    assert fingerprint(resumed) == fingerprint(straight)


def test_it_is_so_in_bf16_with_many_micro_batches_and_a_warm_up(tmp_path: Path) -> None:
    config = small(
        steps=8,
        update={
            "micro_batch_tokens": 16,
            "optimizer": {"lr": 1e-2, "warmup": 2, "schedule": "cosine"},
        },
        value={"warmup": 2},
        kl={"beta": 0},
    )
    ends = []
    for name, stop in (("straight", None), ("cut", 1), ("cut", 4), ("cut", None)):
        run = trainer(config, tmp_path / name, model=tiny_model().bfloat16())
        if stop is None:
            run.train()
            ends.append(fingerprint(run))
            continue
        stop_after(run, stop)
        with pytest.raises(InterruptedRunError):
            run.train()
    assert ends[0] == ends[1]


def test_steps_after_the_checkpoint_are_done_again(tmp_path: Path) -> None:
    """Killed between checkpoints: what was logged after the last one must not stay twice in the
    metrics.
    """
    config = small(steps=6, save_every=2)
    straight = trainer(config, tmp_path / "straight")
    straight.train()

    killed = trainer(config, tmp_path / "cut")
    log = killed.stage.log

    def log_and_die(at: int, metrics: dict[str, float], tokens: int, *of: Any) -> None:
        log(at, metrics, tokens, *of)
        if at == 4:
            raise MemoryError

    killed.stage.log = log_and_die  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        killed.train()
    resumed = trainer(config, tmp_path / "cut")
    resumed.train()
    assert fingerprint(resumed) == fingerprint(straight)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    config = small(steps=4)
    run = trainer(config, tmp_path)
    stop_after(run, 1)
    with pytest.raises(InterruptedRunError):
        run.train()
    other = trainer(config, tmp_path)
    other.stage = Stage("rl", tmp_path, 4, 0, config, Another())
    other.stage.track(model=other.engine.model)
    with pytest.raises(CheckpointError, match="another configuration"):
        other.train()


class CutError(Exception):
    """Whatever ends a run in the middle of a step."""


def cut_at(run: RLTrainer, step: int, place: str) -> None:
    """End this step in the middle: before its rewards, before its first update, within one."""
    if place == "rollout":
        collect = run.sampler.collector.collect

        def collected(starts: Any, *args: Any, **kwargs: Any) -> Any:
            if starts[0].group_id == step * run.config.rollout.prompts:
                raise CutError
            return collect(starts, *args, **kwargs)

        run.sampler.collector.collect = collected  # type: ignore[method-assign]
        return
    if place == "loss":
        update = run.update

        def updated(batch: Any, at: int) -> Any:
            if at == step:
                raise NumericalError("the loss is nan")
            return update(batch, at)

        run.update = updated  # type: ignore[method-assign]
        return
    scatter = run.optimizers[0].flats[-1].scatter

    def scattered() -> None:
        scatter()
        if run.optimizers[0].begun == step * 2 + 1:  # two updates a step
            raise CutError

    run.optimizers[0].flats[-1].scatter = scattered  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("place", "kept"), [("rollout", 3), ("loss", 3), ("update", 2)], ids=lambda v: str(v)
)
def test_what_ends_a_step_in_the_middle_loses_no_finished_one(
    tmp_path: Path, place: str, kept: int
) -> None:
    """Unless weights of the unfinished one are written: then the checkpoint before stands."""
    config = small(
        steps=5,
        save_every=2,
        advantage={"name": "moving_average"},
        update={"minibatches": 2},
        kl={"beta": 0},
    )
    straight = trainer(config, tmp_path / "straight")
    straight.train()
    run = trainer(config, tmp_path / "cut")
    cut_at(run, 3, place)
    with pytest.raises((CutError, NumericalError)) as error:
        run.train()
    assert run.stage.keep(error.value) == f"the same command goes on after step {kept} of 5"
    resumed = trainer(config, tmp_path / "cut")
    resumed.train()
    assert fingerprint(resumed) == fingerprint(straight)


def test_what_ends_a_stage_after_its_last_step_loses_none(tmp_path: Path) -> None:
    run = trainer(small(steps=2), tmp_path)
    run.train()
    assert run.stage.keep(KeyboardInterrupt()) == "the same command goes on after step 2 of 2"
    resumed = trainer(small(steps=2), tmp_path)
    resumed.train()
    assert fingerprint(resumed) == fingerprint(run)


def test_a_signal_in_the_last_step_ends_the_stage(tmp_path: Path) -> None:
    run = trainer(small(steps=2), tmp_path)
    stop_after(run, 1)
    with pytest.raises(InterruptedRunError, match=r"after step 2 of 2 .* everything is saved"):
        run.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


class Another(Config):
    """What a stage may belong to, here of one section and two keys."""

    stage: StageConfig = StageConfig()
    lr: float = 0.1
    place: Neutral[str] = "a"


class Later(Another):
    """The same class in a later version."""

    new: int = 3


def test_what_cannot_change_the_result_may_change_before_a_resume(tmp_path: Path) -> None:
    for step in Stage("rl", tmp_path, 4, 0, StageConfig(save_every=1), Another()).steps():
        if step == 1:
            break
    neutral = {"save_every": 7, "keep": 3, "trackers": ["tensorboard"]}
    for recipe in (Another(place="b", stage=StageConfig.model_validate(neutral)), Later()):
        assert next(Stage("rl", tmp_path, 4, 0, StageConfig(), recipe).steps()) == 1
    for recipe, named in (
        (Another(lr=0.2), r"`lr` was 0\.1 and is 0\.2;"),
        (Later(new=4), "`new` was 3 and is 4;"),
    ):
        with pytest.raises(CheckpointError, match=named):
            next(Stage("rl", tmp_path, 4, 0, StageConfig(), recipe).steps())
    with pytest.raises(CheckpointError, match="made 4 steps and make 5"):
        next(Stage("rl", tmp_path, 5, 0, StageConfig(), Another()).steps())


def stage(folder: Path, **keys: Any) -> Stage:
    return Stage("rl", folder, 9, 0, StageConfig(save_every=2, **keys), Another())


def steps_to(last: int, folder: Path, **keys: Any) -> None:
    """A stage that is killed in this step, with what it has logged of it."""
    it = stage(folder, **keys)
    for step in it.steps():
        it.rollouts.append(step, {"said": step})
        if step == last:
            return
        it.log(step, {"loss": 1.0}, 1)


def test_a_damaged_checkpoint_stops_the_run_and_its_way_out_works(tmp_path: Path) -> None:
    """Two are kept, so that deleting the newer one costs its steps alone."""
    steps_to(5, tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    (folder / "step-000004" / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match="delete that folder: the run then goes on from step"):
        next(stage(tmp_path).steps())
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    shutil.rmtree(folder / "step-000004")
    assert next(stage(tmp_path).steps()) == 2
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    (folder / "step-000002").rename(folder / "step-000008")
    with pytest.raises(CheckpointError, match="step-000008 holds step-000002; rename it"):
        next(stage(tmp_path).steps())


def test_records_that_a_checkpoint_relies_on_are_safe_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    save, synced = checkpoint.save, metrics.sync
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (done.append("saved"), save(*a, **k)))
    monkeypatch.setattr(metrics, "sync", lambda path: (done.append(path.name), synced(path)))
    steps_to(2, tmp_path)
    assert done == ["metrics.jsonl", "rollouts.jsonl", "saved"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_records_that_lost_a_line_stop_the_run(tmp_path: Path, name: str) -> None:
    steps_to(3, tmp_path)
    path = tmp_path / name
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(StorageError, match=rf"{name} is not as the run wrote it"):
        next(stage(tmp_path).steps())


def test_a_source_that_changed_since_the_checkpoint_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with as many rows as before is refused too; for a reward's function there is only a
    warning.
    """

    def made_from(rows: str, function: str) -> Stage:
        files = {"rows.jsonl": rows}, {"rewards.py": function}
        return Stage("rl", tmp_path, 9, 0, StageConfig(save_every=1), Another(), *files)

    for step in made_from("1:a", "1:a").steps():
        if step == 1:
            break
    with pytest.raises(CheckpointError, match=r"step-000001 .* \(rows\.jsonl changed\); put that"):
        next(made_from("1:b", "1:a").steps())
    assert next(made_from("1:a", "1:b").steps()) == 1
    assert "rewards.py changed since step 1" in capsys.readouterr().out


def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path) -> None:
    steps_to(3, tmp_path)
    it = stage(tmp_path)
    it.track(later=torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be taken up \(KeyError"):
        next(it.steps())


def test_a_source_that_changed_before_the_first_checkpoint_is_told(tmp_path: Path) -> None:
    def stage(digest: str) -> Stage:
        return Stage("sft", tmp_path, 4, 0, StageConfig(), Another(), {"rows.jsonl": digest})

    assert next(stage("1:a").steps()) == 0
    assert next(stage("1:a").steps()) == 0
    with pytest.raises(CheckpointError, match=r"rows\.jsonl changed.*delete"):
        next(stage("1:b").steps())


@pytest.mark.parametrize(
    "which", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, which: signal.Signals) -> None:
    command = [
        sys.executable, "-m", "gearshift", "run", "tests/smoke/tiny.yaml",
        f"run.dir={tmp_path / 'run'}", "rl.steps=400", "sft=null", "reward=null", "eval.limit=4",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "rl" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(which)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + which
    assert "everything is saved" in errors and "Traceback" not in errors
    [saved] = (tmp_path / "run" / "rl" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert len(metrics.read_text().splitlines()) == step < 400
