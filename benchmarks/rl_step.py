"""A whole reinforcement-learning step (GRPO) and a supervised step: ours beside TRL's, in turn.

    python -m benchmarks.rl_step [--quick]

Same weights, prompts, completions a prompt, sampler, lengths, loss, learning rate, one update a
rollout. Before anything is timed: the gradients of the two losses on the same completions, in fp32,
must agree, and so must the curves of the reward (the fraction of even tokens). TRL lives in an
environment of its own under `.bench/`, made at first use, and its process is stopped while ours
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import (
    in_turn,
    machine,
    now,
    peak_gib,
    reset_peak,
    skewed_lengths,
    versions,
    write,
)
from gearshift.engine import Engine
from gearshift.engine.stats import measure
from gearshift.models.embedded import embedded_folder
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.models.runner import ModelRunner
from gearshift.runtime.allocator import keep_freed_memory
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.sft import supervised_batch, supervised_loss
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import update
from gearshift.types import SamplingParams, Trajectory

TRL = "trl==1.16.0"
GROUP, MAX_NEW, LR = 8, 128, 1e-5
MAX_TOKENS = 2304  # of a micro-batch of ours
# What was tried on 2 cores is in docs/performance.md; these are the fastest settings found.
BEST = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": False,
    "bf16": False,
    "model_init_kwargs": {"dtype": "bfloat16"},
}
FP32 = {**BEST, "model_init_kwargs": {"dtype": "float32"}}
# Token mean, as ours; the rest as TRL has it.
LOSS = {"loss_type": "bnpo", "learning_rate": LR, "temperature": 1.0}
SENTENCE = "Say what the weather is like today in a town by the sea, and what one should wear. "


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one round of beta 0, short curves")
    options = parser.parse_args()
    keep_freed_memory()
    set_up()
    prompts = [SENTENCE * k for k in (2, 3, 5, 6)]
    result: dict[str, Any] = {"machine": machine(), "versions": {**versions(), "trl": TRL}}
    result["gradient_cosine"] = {str(beta): cosine(prompts, beta) for beta in (0.0, 0.04)}
    print("cosine of the gradients, by beta:", result["gradient_cosine"])
    if min(result["gradient_cosine"].values()) < 0.999:
        raise SystemExit("The two losses differ; nothing was timed.")
    short = [f"Say what one wears in a town by the {x}." for x in ("sea", "lake", "wood", "hill")]
    result["curves"] = curves(short, steps=8 if options.quick else 50)
    figures = result["curves"]
    print(
        "mean reward of the curves:",
        figures["ours_mean"],
        figures["trl_mean"],
        figures["within_noise"],
    )

    rounds = 1 if options.quick else 3
    rng = random.Random(1)
    lengths = {
        "fixed": [MAX_NEW] * (GROUP * len(prompts)),
        "skewed": skewed_lengths(GROUP * len(prompts), MAX_NEW, rng),
    }
    result["phases"], result["peak_memory"] = {}, {}
    for beta in (0.0, 0.04):
        for name, own in lengths.items():
            if options.quick and beta:
                continue
            key = name if beta == 0 else f"{name}_beta_{beta}"
            result[key] = compare(prompts, own, beta, rounds, result, key)
    if not options.quick:
        seconds = of_defaults(prompts, lengths["fixed"])
        ours = median(result["fixed"]["seconds"]["gearshift"])
        result["fixed"]["ratio_vs_trl_defaults"] = seconds / ours
        print(f"fixed, TRL's defaults: {seconds:.1f} s a step")
    result["sft"] = supervised(rounds)
    print("sft:", {k: v for k, v in result["sft"].items() if k != "seconds"})
    print("samples in", write("rl_step", result))


def of_defaults(prompts: list[str], lengths: list[int]) -> float:
    """Seconds of a step of TRL at its own settings, after one to warm up."""
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    peer = Trl({"task": "rl", "prompts": prompts, "config": {**LOSS, **batch, "beta": 0.0}})
    figures = [peer.step(lengths) for _ in range(2)][-1]
    peer.close()
    return float(figures["seconds"])


def compare(
    prompts: list[str],
    lengths: list[int],
    beta: float,
    rounds: int,
    result: dict[str, Any],
    key: str,
) -> dict[str, Any]:
    """Seconds a step of both, by phase."""
    peer = Trl({"task": "rl", "prompts": prompts, "config": {**BEST, **LOSS, "beta": beta}})
    ours = Ours(peer.prompts, beta)
    phases: dict[str, list[dict[str, float]]] = {"gearshift": [], "trl": []}

    def our_step() -> float:
        seconds, figures = ours.step(lengths)
        phases["gearshift"].append(figures)
        return seconds

    def their_step() -> float:
        figures = peer.step(lengths)
        phases["trl"].append(figures["phases"])
        result["peak_memory"].setdefault(key, {})["trl_gib"] = figures["peak_gib"]
        return float(figures["seconds"])

    reset_peak()
    samples = in_turn({"gearshift": our_step, "trl": their_step}, rounds)
    result["peak_memory"][key]["gearshift_gib"] = peak_gib()
    peer.close()
    result["phases"][key] = {
        who: {phase: median(t[phase] for t in figures[1:]) for phase in figures[0]}
        for who, figures in phases.items()
    }
    result["phases"][key]["floor"] = ours.floor(lengths, beta)
    figures = {
        "tokens": sum(lengths),
        "seconds": samples,
        "ratio_vs_trl_best": median(samples["trl"]) / median(samples["gearshift"]),
    }
    print(f"{key}: {figures['ratio_vs_trl_best']:.2f} times TRL's best;", json.dumps(
        {who: {k: round(v, 2) for k, v in p.items()} for who, p in result["phases"][key].items()}
    ))  # fmt: skip
    return figures


class Ours:
    """The trainer's own methods on one rollout."""

    def __init__(
        self,
        prompts: list[list[int]],
        beta: float,
        dtype: str = "bfloat16",
        max_new: int = MAX_NEW,
        lr: float = LR,
        seed: int = 0,
    ) -> None:
        self.prompts, self.max_new = prompts, max_new
        model = ModelConfig(dtype=dtype)
        self.engine = Engine(load_policy(model), load_tokenizer(model), seed=seed)
        self.engine.end_tokens = frozenset()  # each completion has its own length
        config = RLConfig.model_validate({
            "rollout": {
                "prompts": len(prompts), "group_size": GROUP, "max_new_tokens": max_new,
            },
            "steps": 10**6, "save_every": 0,
            "advantage": {"name": "grpo"}, "loss": {"name": "ppo_clip"},
            "kl": {"beta": beta, "estimator": "k3", "where": "loss"},
            "update": {
                "micro_batch_tokens": MAX_TOKENS,
                "optimizer": {"lr": lr, "warmup": 0, "betas": (0.9, 0.999)},
            },
        })  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = RLTrainer(
            config, self.engine,
            collector=None,  # type: ignore[arg-type]  # completions come from the engine itself
            rows=None,
            score=None,  # type: ignore[arg-type]  # and their rewards from here
            stage=Stage("rl", Path(self.folder.name), config.steps, 0, config),
            reference=ModelRunner(load_policy(model)) if beta > 0 else None,
        )  # fmt: skip
        self.steps = 0

    def sample(self, lengths: Sequence[int]) -> list[list[int]]:
        """One completion for each length; a group's have their prompt's keys in common."""
        prompts = [p for p in self.prompts for _ in range(GROUP)]
        params = [SamplingParams(max_new_tokens=n) for n in lengths]
        ids = range(self.steps * len(prompts), (self.steps + 1) * len(prompts))
        with self.engine.generating():
            groups = self.engine.generate(prompts, params, request_ids=ids)
        self.completions = [c for [c] in groups]
        return [c.token_ids for c in self.completions]

    def trajectories(self) -> list[Trajectory]:
        """With the reward of each at its last token."""
        made = []
        for i, c in enumerate(self.completions):
            prompt, n = self.prompts[i // GROUP], len(c.token_ids)
            made.append(
                Trajectory(
                    prompt + c.token_ids, [0] * len(prompt) + [1] * n,
                    [0.0] * len(prompt) + c.logprobs,
                    [0.0] * (len(prompt) + n - 1) + [reward(c.token_ids)],
                    i // GROUP, len(prompt), "length",
                )
            )  # fmt: skip
        return made

    def step(self, lengths: Sequence[int]) -> tuple[float, dict[str, float]]:
        """Seconds, in all and by phase."""
        times = [now()]
        self.sample(lengths)
        times.append(now())
        trajectories = self.trajectories()
        self.reward = fmean(t.reward for t in trajectories)
        times.append(now())
        batch = pack_trajectories(trajectories).to(self.engine.device)
        batch, _ = self.trainer.make_experience(batch, trajectories)
        times.append(now())
        optimizer, spent = self.trainer.optimizers[0], 0.0
        plain = optimizer.step

        def timed(known: float | None = None) -> float:
            nonlocal spent
            began = now()
            norm = plain(known)
            spent = now() - began
            return norm

        optimizer.step = timed  # type: ignore[method-assign]
        self.trainer.update(batch, self.steps)
        optimizer.step = plain  # type: ignore[method-assign]
        times.append(now())
        self.steps += 1
        a = [after - before for before, after in pairwise(times)]
        return sum(a), {
            "generate": a[0], "reward": a[1], "score": a[2], "train": a[3] - spent,
            "optimizer": spent,
        }  # fmt: skip

    def floor(self, lengths: Sequence[int], beta: float) -> dict[str, float]:
        """Seconds that this machine's measured rates allow each phase."""
        roofline = measure(self.engine.device, self.engine.model.dtype)
        size = sum(p.numel() for p in self.engine.model.parameters())
        prompt = sum(map(len, self.prompts))
        live = [sum(n > t for n in lengths) for t in range(1, max(lengths))]
        decode = sum(roofline.seconds(2 * size, 2 * size * rows) for rows in live if rows)
        tokens = prompt + sum(lengths)
        return {
            "generate": decode + roofline.seconds(2 * size, 2 * size * prompt),
            "reward": 0.0,
            "score": roofline.seconds(0, 2 * size * tokens) if beta else 0.0,
            "train": roofline.seconds(0, 6 * size * tokens),
            # gradient, master and two moments are read; master, moments and weight are written
            "optimizer": roofline.seconds((2 + 12 + 12 + 2) * size, 0),
        }


def reward(ids: Sequence[int]) -> float:
    """The fraction of even tokens, as the peer computes it."""
    return sum(t % 2 == 0 for t in ids) / len(ids)


def cosine(prompts: list[str], beta: float) -> float:
    """The cosine between the gradients of the two losses, on the same completions and in fp32. The
    policy differs a little from the reference.
    """
    peer = Trl({"task": "gradients", "prompts": prompts, "config": {**FP32, **LOSS, "beta": beta,
        "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}})  # fmt: skip
    ours = Ours(peer.prompts, beta, dtype="float32")
    with torch.no_grad():
        torch.manual_seed(0)
        for p in ours.engine.model.parameters():
            p += 0.01 * p.std() * torch.randn_like(p)
    ours.engine.weights_changed()
    completions = ours.sample([24] * (GROUP * len(prompts)))
    with tempfile.TemporaryDirectory() as folder:
        policy, save = f"{folder}/policy.safetensors", f"{folder}/gradient.safetensors"
        weights = dict(ours.engine.model.named_parameters())
        save_file({n: p.detach().clone() for n, p in weights.items()}, policy)
        peer.ask({"policy": policy, "save": save, "completions": completions})
        theirs = load_file(save)
    peer.close()
    batch = pack_trajectories(ours.trajectories()).to(ours.engine.device)
    batch, _ = ours.trainer.make_experience(batch, ours.trajectories())
    stepped = ours.trainer.optimizers[0]
    stepped.step = lambda: 0.0  # type: ignore[method-assign]  # the gradient is what we want
    ours.trainer.update(batch, 0)
    a, b = (
        torch.cat([g[n].double().flatten().cpu() for n in sorted(theirs)])
        for g in ({n: p.grad for n, p in weights.items()}, theirs)
    )
    return float(a @ b / a.norm() / b.norm())


def curves(prompts: list[str], steps: int) -> dict[str, Any]:
    """Rewards of both over some steps of short completions, and whether they agree."""
    # TRL's fastest setting has no fp32 masters: in bf16 alone most of an update is lost.
    lengths, lr = [12] * (GROUP * len(prompts)), 2e-5
    config = {**FP32, **LOSS, "learning_rate": lr, "beta": 0.0,
        "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}  # fmt: skip
    peer = Trl({"task": "rl", "prompts": prompts, "max_new": 12, "config": config})
    ours = [our_curve(peer.prompts, lengths, lr, steps, seed) for seed in range(3)]
    theirs = [float(peer.step(lengths)["reward"]) for _ in range(steps)]
    peer.close()
    return {"ours": ours, "trl": theirs, **agreement(ours, theirs)}


def our_curve(
    prompts: list[list[int]], lengths: list[int], lr: float, steps: int, seed: int
) -> list[float]:
    """The mean reward of each step."""
    ours = Ours(prompts, 0.0, max_new=max(lengths), lr=lr, seed=seed)
    rewards = []
    for _ in range(steps):
        ours.step(lengths)
        rewards.append(ours.reward)
    return rewards


def agreement(ours: list[list[float]], theirs: list[float]) -> dict[str, Any]:
    """Whether TRL's curve lies among ours: its mean over the steps, within three of the standard
    deviations by which ours of other seeds differ.
    """
    means = [fmean(curve) for curve in ours]
    noise = stdev(means) * (1 + 1 / len(means)) ** 0.5
    return {
        "ours_mean": means, "trl_mean": fmean(theirs), "noise": noise,
        "within_noise": abs(fmean(means) - fmean(theirs)) <= 3 * noise,
    }  # fmt: skip


def supervised(rounds: int) -> dict[str, Any]:
    """Seconds of a supervised step over the same rows, of uneven length."""
    rng = random.Random(2)
    rows = [
        ([rng.randrange(100, 40_000) for _ in range(n)], [0] * (n // 3) + [1] * (n - n // 3))
        for n in (rng.randrange(24, 256) for _ in range(32))
    ]
    peer = Trl({"task": "sft", "rows": rows, "max_length": 256, "config": {
        **BEST, "learning_rate": LR}})  # fmt: skip
    model = ModelConfig()
    engine = Engine(load_policy(model), load_tokenizer(model))
    optimizer = MasterAdamW(engine.model.parameters(), OptimizerConfig(lr=LR), 10**6)
    size = MicroBatchSize(MAX_TOKENS)

    def ours() -> None:
        with engine.training(dropout=True):
            batch = supervised_batch(rows).to(engine.device)
            update(batch.split, size, lambda b: supervised_loss(engine, b), optimizer)
        engine.weights_changed()

    samples = in_turn({"gearshift": ours, "trl": lambda: float(peer.ask({})["seconds"])}, rounds)
    peer.close()
    tokens = sum(len(ids) for ids, _ in rows)
    return {
        "tokens": tokens,
        "seconds": samples,
        "tokens_per_second": {who: tokens / median(s) for who, s in samples.items()},
        "ratio_vs_trl": median(samples["trl"]) / median(samples["gearshift"]),
    }


class Trl:
    """TRL in a process of its own, stopped while others run."""

    def __init__(self, settings: dict[str, Any]) -> None:
        settings = {"group": GROUP, "max_new": MAX_NEW, "model": str(embedded_folder()), **settings}
        self.log = tempfile.NamedTemporaryFile("w+", prefix="trl")  # noqa: SIM115
        self.process = subprocess.Popen(
            [".bench/trl/bin/python", str(Path(__file__).with_name("trl_peer.py")),
             json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            start_new_session=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        self.prompts: list[list[int]] = self._answer().get("prompts", [])
        os.killpg(self.process.pid, signal.SIGSTOP)

    def step(self, lengths: Sequence[int]) -> dict[str, Any]:
        """One step whose completions have these lengths."""
        return self.ask({"lengths": list(lengths)})

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """What the process answers."""
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        os.killpg(self.process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End the process."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self.log.seek(0)
        raise SystemExit("TRL's process ended: " + self.log.read()[-2000:])


def set_up() -> None:
    """TRL's environment, made once."""
    folder = Path(".bench/trl")
    if (folder / ".ready").exists():
        return
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "install"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    same = f"torch==={version('torch')}"  # for a GPU too, where ours is
    subprocess.run([*pip, "--constraint", "constraints.txt", same], check=True)
    subprocess.run([*pip, "--constraint", "constraints.txt", TRL], check=True)
    (folder / ".ready").touch()


if __name__ == "__main__":
    main()
