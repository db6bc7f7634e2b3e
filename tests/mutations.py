"""The quiet failures of this field, put in one at a time: each must make a test fail.

    python -m tests.mutations [--only NAME]

Each mutation is made in a copy of the package, where the tests that should catch it are run. Prints
a line for each and `caught N of M` last; exits non-zero when more than one was missed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """`old` in `gearshift/file` becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "reward after the end: at the episode's last token, whoever wrote it",
        "rollouts/reward_sum.py",
        "last = max(i for i, mask in enumerate(trajectory.loss_mask) if mask)",
        "last = len(trajectory.loss_mask) - 1",
        "tests/rollouts/test_reward_sum.py",
    ),
    Mutation(
        "mask off by one: a token is scored by the state at itself",
        "types.py",
        "previous = torch.arange(-1, len(self) - 1)",
        "previous = torch.arange(len(self))",
        "tests/invariants/test_1_gears_agree.py",
    ),
    Mutation(
        "the first token of a completion is predicted by its own prompt's start",
        "types.py",
        "self.cu_seqlens[self.parents.clamp(min=0) + 1] - 1",
        "self.cu_seqlens[self.parents.clamp(min=0)]",
        "tests/invariants/test_5_packing.py",
    ),
    Mutation(
        "dropout on in scoring",
        "engine/hybrid.py",
        "self.model.train(dropout)",
        "self.model.train(True)",
        "tests/invariants/test_4_first_update.py",
    ),
    Mutation(
        "truncated completions are learned from though they are masked",
        "trainers/rl.py",
        'if config.truncated == "mask":',
        "if False:",
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "truncated completions pay no penalty",
        "trainers/rl.py",
        "rewards_NA[last_N] -= config.missing_end_penalty * cut_N",
        "pass",
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "a group of equal rewards has rounding errors for advantages",
        "algorithms/advantages.py",
        "dtype=torch.float64",
        "dtype=torch.float32",
        "tests/algorithms/test_advantages.py",
    ),
    Mutation(
        "groups of equal rewards are kept under dynamic sampling",
        "trainers/rl.py",
        "if not tells_nothing(members)}",
        "if True}",
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "the gradient is normalised per micro-batch",
        "trainers/rl.py",
        'weights_M = batch.scored("loss_weights")\n        counts_N',
        'weights_M = batch.scored("loss_weights")\n'
        "        weights_M = weights_M / weights_M.sum()\n        counts_N",
        "tests/trainers/test_rl.py -k micro_batches",
    ),
    Mutation(
        "supervised micro-batches are each a mean",
        "trainers/sft.py",
        'weights_M = batch.scored("loss_weights")',
        'weights_M = batch.scored("loss_weights")\n    weights_M = weights_M / weights_M.sum()',
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "pad = end in a decoder reward model",
        "models/classifier.py",
        "tokenizer.pad_token = spare or tokenizer.eos_token",
        "pass",
        "tests/smoke/test_recipe.py -k transformers",
    ),
    Mutation(
        "double BOS: special tokens are added to a rendered chat",
        "data/chat.py",
        "add_special_tokens=False",
        "add_special_tokens=True",
        "tests/data/test_chat.py tests/data/test_templates.py",
    ),
    Mutation(
        "turns are decoded and tokenised again",
        "rollouts/collector.py",
        "        text = self._text(episode)\n        episode.rewards",
        "        text = self._text(episode)\n"
        "        again = self._tokenizer(text)['input_ids']\n"
        "        n = len(episode.token_ids) - episode.turn_start\n"
        "        episode.token_ids[episode.turn_start:] = (again + [0] * n)[:n]\n"
        "        episode.rewards",
        "tests/trainers/test_rl.py -k two_turns",
    ),
    Mutation(
        "stale weights: the cache of an older version is used",
        "engine/hybrid.py",
        "self._scheduler.cache.forget()",
        "pass",
        "tests/invariants/test_6_gears_and_updates.py tests/engine/test_hybrid.py",
    ),
    Mutation(
        "stale weights: packed copies are not made anew",
        "engine/hybrid.py",
        "self.weights_version += 1",
        "pass",
        "tests/invariants/test_6_gears_and_updates.py tests/engine/test_hybrid.py"
        " tests/engine/test_kernels.py",
    ),
    Mutation(
        "the adapter is not applied in rollouts",
        "engine/weights.py",
        "for down, up, scaling in adapters(module):",
        "for down, up, scaling in ():",
        "tests/models/test_adapters.py tests/invariants/test_6_gears_and_updates.py",
    ),
    Mutation(
        "the reference has the adapter on",
        "models/adapters.py",
        "layer.enable_adapters(False)",
        "layer.enable_adapters(True)",
        "tests/models/test_adapters.py tests/smoke/test_recipe.py -k adapter",
    ),
    Mutation(
        "KL sign: distance is rewarded",
        "algorithms/shaping.py",
        "rewards_NA - beta * kl_NA",
        "rewards_NA + beta * kl_NA",
        "tests/algorithms",
    ),
    Mutation(
        "KL sign: reference and policy changed places",
        "algorithms/kl.py",
        "return logprobs - ref_logprobs",
        "return ref_logprobs - logprobs",
        "tests/algorithms",
    ),
    Mutation(
        "the KL in the loss is subtracted",
        "trainers/rl.py",
        "loss_M = loss_M + self.memory.beta * kl_M",
        "loss_M = loss_M - self.memory.beta * kl_M",
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "PPO takes the greater of the two terms",
        "algorithms/policy_losses.py",
        "torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)",
        "torch.maximum(ratio_M * advantages_M, clipped_M * advantages_M)",
        "tests/algorithms",
    ),
    Mutation(
        "RLOO's baseline has the completion itself in it",
        "algorithms/advantages.py",
        "others_N = (sum_N - rewards_N) / (size_N - 1).clamp(min=1)",
        "others_N = sum_N / size_N",
        "tests/algorithms",
    ),
    Mutation(
        "GAE looks beyond the end of a row",
        "algorithms/advantages.py",
        "values_NA = values_NA.detach().masked_fill(~mask_NA, 0.0)",
        "values_NA = values_NA.detach()",
        "tests/algorithms",
    ),
    Mutation(
        "training scores at temperature 1 what was sampled at another",
        "trainers/rl.py",
        "scores = self.engine.logprobs(batch, config.temperature, self.head)",
        "scores = self.engine.logprobs(batch, 1.0, self.head)",
        "tests/trainers/test_guards.py",
    ),
    Mutation(
        "the importance ratio is upside down",
        "algorithms/policy_losses.py",
        "log_ratio_M = (old_logprobs_M - sampler_logprobs_M).detach()\n    if mode",
        "log_ratio_M = (sampler_logprobs_M - old_logprobs_M).detach()\n    if mode",
        "tests/algorithms",
    ),
    Mutation(
        "bf16 weights without fp32 masters",
        "runtime/optimizer.py",
        "flat.master.grad = flat.gather(scale)",
        "flat.master.grad = flat.gather(scale)\n"
        "            flat.master.data = _Flat(flat.parameters, self.device).master.data",
        "tests/runtime/test_optimizer.py",
    ),
    Mutation(
        "DPO prefers what was rejected",
        "algorithms/preference_losses.py",
        "logits_P = beta * (chosen_P - rejected_P)",
        "logits_P = beta * (rejected_P - chosen_P)",
        "tests/algorithms",
    ),
    Mutation(
        "the reference of preferences is the policy of the moment",
        "trainers/preference.py",
        "score_N = logprob_N - torch.tensor(known, device=device)",
        "score_N = logprob_N - logprob_N.detach()",
        "tests/trainers/test_preference.py",
    ),
    Mutation(
        "values are compared with the values of now when they are clipped",
        "algorithms/policy_losses.py",
        "near_M = old_values_M + (values_M - old_values_M).clamp(-clip, clip)",
        "near_M = values_M",
        "tests/algorithms",
    ),
    Mutation(
        "an environment's failure becomes a reward of zero",
        "rollouts/collector.py",
        'if e.finish_reason != "abort"',
        "if True",
        "tests/rollouts/test_collector.py",
    ),
    Mutation(
        "the old policy is the one being updated",
        "trainers/rl.py",
        "scores.logprobs.detach() if batch.old_logprobs is None else",
        "scores.logprobs.detach() if True else",
        "tests/invariants/test_4_first_update.py",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="mutations whose name has this in it")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if options.only in m.name]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("gearshift", "tests", "recipes", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutation in chosen:
            found = is_caught(mutation, copy)
            caught += found
            print(f"{'caught' if found else 'MISSED'}  {mutation.name}", flush=True)
    print(f"caught {caught} of {len(chosen)}")
    sys.exit(caught < len(chosen) - 1)


def is_caught(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests fail with it; they are known to pass without."""
    path = copy / "gearshift" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) < 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has no such text any more.")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *mutation.tests.split()], cwd=copy, capture_output=True, text=True
        )
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode not in (0, 1):  # 1: tests ran, and some failed
        raise SystemExit(f"{mutation.name}: pytest could not run.\n{done.stdout[-2000:]}")
    return done.returncode == 1


if __name__ == "__main__":
    main()
