"""The trainings that one rank and several must do alike: each in a folder, to what came of it.

`CHECKS` train inside a world that is joined already; `CALLS` are calls of the Python interface,
each of which meets the other ranks and parts from them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

import gearshift
from gearshift.pipeline.result import RunResult
from gearshift.runtime.distributed import world
from gearshift.trainers.sft import SFTConfig
from gearshift.trainers.stage import Stage
from tests.gyms import TwoTurns
from tests.scale.outcome import Outcome
from tests.scale.rl import (
    CRITIC,
    GAE,
    GRPO,
    HEAD,
    HERE,
    PLAIN,
    AllAlike,
    FailsBySeed,
    SomeAlike,
    letters,
    merge,
    rl,
    with_adapters,
    with_encoder,
    with_examples,
    with_reward_model,
)
from tests.scale.supervised import (
    OPTIMIZER,
    SETTINGS,
    preference,
    process,
    reward,
    sft,
    without_ties,
)

Train = Callable[[Path], Outcome]
CALL: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "verbose": False, "scale": {"timeout": 600},
    "batch_size": 3, "optimizer": OPTIMIZER,
}  # fmt: skip
WORDS = ("one", "two", "three", "four", "five")
PAIRS = [
    {"prompt": f"say {word}", "chosen": word, "rejected": f"no {i}"} for i, word in enumerate(WORDS)
]
CHATS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


def streams(folder: Path) -> Outcome:
    """What each rank draws first in each step."""
    stage = Stage("sft", folder, 3, 0, SFTConfig.model_validate(SETTINGS))
    drawn = [world().gather(float(torch.rand(())), "what is drawn") for _ in stage.steps()]
    return Outcome(records={"drawn": drawn})


def fails_once(train: Train, where: str, fault: Callable[..., Any]) -> Train:
    """The training with a loss (`module.function`) whose first call on the last rank is `fault`."""

    def run(folder: Path) -> Outcome:
        module, _, name = where.rpartition(".")
        loss = getattr(importlib.import_module(module), name)
        left = [fault] * (world().rank == world().size - 1)
        with patch(where, lambda *given, **keys: (left.pop() if left else loss)(*given, **keys)):
            return train(folder)

    return run


def no_memory(*given: Any, **keys: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def not_finite(*given: Any, **keys: Any) -> Any:
    return torch.tensor(float("nan")), {}


def reads(result: RunResult) -> Outcome:
    """What a call of the Python interface came to."""
    outcome = Outcome.of(result.model, {})
    if world().main:  # it is the one that wrote the files; they are there for all of them
        outcome.add_records(result.folder)
    outcome.weights = load_file(result.model / "model.safetensors")
    return outcome


def api_sft_dpo(folder: Path) -> Outcome:
    """One call after another, each with the model that the one before made."""
    first = gearshift.train_sft("tiny", CHATS, output=folder / "sft", **CALL)
    outcome = reads(gearshift.train_dpo(first, PAIRS, output=folder / "dpo", heldout=PAIRS, **CALL))
    outcome.metrics = reads(first).metrics + without_ties(outcome.metrics)
    return outcome


def api_reward_model(folder: Path) -> Outcome:
    return reads(gearshift.train_reward_model("tiny", PAIRS, output=folder, heldout=PAIRS, **CALL))


def api_rl(folder: Path) -> Outcome:
    """With adapters, a function as the reward, and held-out prompts."""
    return reads(gearshift.train_rl(
        "tiny", [f"say {i}" for i in range(7)], letters, "grpo", output=folder, steps=2,
        validation=[f"tell {i}" for i in range(5)], lora={"rank": 4}, eval={"perplexity": True},
        rollout={"prompts": 3, "group_size": 2, "max_new_tokens": 6},
        update={"minibatches": 2, "ema": 0.5, "optimizer": OPTIMIZER},
        dtype="float32", device="cpu", verbose=False, scale={"timeout": 600},
    ))  # fmt: skip


CHECKS: dict[str, Train] = {
    "sft": sft,
    "sft-of-one-micro-batch": partial(sft, micro_batch_tokens=4096),
    "sft-of-masked-rows": partial(sft, masked=2),
    "sft-in-bf16": partial(sft, dtype="bfloat16"),
    "reward-model": reward,
    "reward-model-of-an-encoder": partial(reward, encoder=True),
    "process-reward-model": process,
    **{loss: partial(preference, loss=loss) for loss in ("dpo", "kto", "orpo")},
    "dpo-with-a-reference-model": partial(preference, loss="dpo", each_step=True),
    "grpo": partial(rl, **merge(GRPO, update={"minibatches": 2})),
    "gae": partial(rl, **GAE, value=HEAD, kl={"beta": 0.05, "target": 2.0}, update={"ema": 0.9}),
    "token-critic": partial(rl, **GAE, value={**CRITIC, "warmup": 1}),
    "encoder-critic": with_encoder,
    "dynamic-sampling": partial(
        rl, environment=SomeAlike, **merge(PLAIN, rollout={"replace_zero_std": 2})
    ),
    "remax": partial(
        rl, advantage={"name": "remax"}, kl={"beta": 0.0}, rollout={"group_size": 1, "prompts": 5}
    ),
    "moving-average-of-returns": partial(rl, advantage={"name": "moving_average"}),
    "supervised-examples": with_examples,
    "adapters": with_adapters,
    "importance": partial(rl, **GRPO, importance={"mode": "token_truncate"}),
    "two-turns": partial(rl, environment=TwoTurns, **GAE, value=HEAD),
    "reward-model-as-the-reward": with_reward_model,
    "normalised-function": partial(
        rl,
        sources=[{"source": f"{HERE}:letters", "normalize": True}, {"source": "environment"}],
        **PLAIN,
    ),
    "lost-rewards": partial(
        rl,
        sources=[{"source": f"{HERE}:some", "normalize": True}, {"source": "environment"}],
        **PLAIN,
    ),
    "one-group": partial(rl, **merge(GRPO, rollout={"prompts": 1})),
    "lost-episodes": partial(rl, environment=FailsBySeed, **merge(PLAIN, rollout={"prompts": 2})),
    "equal-rewards": partial(
        rl, environment=AllAlike, **merge(PLAIN, rollout={"replace_zero_std": 1})
    ),
    "memory-of-one-rank": fails_once(sft, "gearshift.trainers.sft.supervised_loss", no_memory),
    "memory-of-one-rank-in-rl": fails_once(
        partial(rl, **GRPO), "gearshift.trainers.rl.loop.rl_loss", no_memory
    ),
    "a-function-that-raises": partial(
        rl,
        steps=6,
        sources=[{"source": f"{HERE}:raises"}],
        **merge(PLAIN, rollout={"prompts": 2, "max_new_tokens": 2}),
    ),
    "streams": streams,
    "a-loss-that-is-not-finite": fails_once(
        sft, "gearshift.trainers.sft.supervised_loss", not_finite
    ),
    "masked-answers": partial(
        rl,
        **merge(PLAIN, rollout={"max_new_tokens": 64}),
        shaping={"mask_truncated_completions": True, "overlong_buffer": 0.5},
    ),
}
CALLS: dict[str, Train] = {
    "train_sft-then-train_dpo": api_sft_dpo,
    "train_reward_model": api_reward_model,
    "train_rl": api_rl,
}
