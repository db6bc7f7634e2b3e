"""TRL as `benchmarks.rl_step` drives it: a step for each line on stdin, what it took on stdout.

The first argument holds the settings. TRL's own loop runs; a callback waits for the line before
each step, and wrapped methods time its phases.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria, StoppingCriteriaList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

QUIET = {
    "output_dir": ".bench/trl-runs",
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": not torch.cuda.is_available(),
    "max_steps": 10**6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["task"] == "sft":
        sft(settings)
    else:
        rl(settings)


class Turns(TrainerCallback):
    """One step for each line that comes in."""

    def __init__(self, seconds: dict[str, float], figures: Callable[[], dict[str, Any]]) -> None:
        self.seconds, self.figures = seconds, figures
        self.order: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        self.order = json.loads(line)
        self.seconds.clear()
        self.began = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        total = now() - self.began
        phases = dict(self.seconds)
        phases["optimizer"] = total - phases.pop("step")
        phases["train"] = total - sum(phases.values())
        answer({"seconds": total, "phases": phases, **self.figures()})


class EndAt(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self.ends = torch.tensor([prompt + n for n in lengths])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends.to(input_ids.device)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The fraction of even tokens."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def rl(settings: dict[str, Any]) -> None:
    config = GRPOConfig(
        **QUIET,
        **settings["config"],
        num_generations=settings["group"],
        max_completion_length=settings["max_new"],
        shuffle_dataset=False,
        # None would mean the model's own; rows that end early would be filled with its token.
        generation_kwargs={"eos_token_id": -1},
    )
    trainer = GRPOTrainer(
        settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p} for p in settings["prompts"]] * 64),
    )
    trainer.eos_token_ids = [-1]  # nothing ends a completion but its length
    seconds: dict[str, float] = defaultdict(float)
    turns = Turns(seconds, lambda: {"reward": trainer._metrics["train"]["reward"][-1]})
    given_lengths(trainer, turns)
    timed(trainer, seconds)
    prompt_ids, *_ = trainer._tokenize_prompts(settings["prompts"])
    answer({"ready": True, "prompts": prompt_ids})
    if settings["task"] == "gradients":
        gradients(trainer, settings, json.loads(sys.stdin.readline()))
    else:
        trainer.add_callback(turns)
        trainer.train()


def given_lengths(trainer: GRPOTrainer, turns: Turns) -> None:
    """Completions get the lengths that the order asks for."""
    generate, single_turn = trainer.model.generate, trainer._generate_single_turn

    def ended(**inputs: Any) -> Any:
        ends = EndAt(inputs["input_ids"].shape[1], turns.order["lengths"])
        return generate(**inputs, stopping_criteria=StoppingCriteriaList([ends]))

    def cut(*args: Any, **kwargs: Any) -> Any:
        ids, logprobs = single_turn(*args, **kwargs)
        return [row[:n] for row, n in zip(ids, turns.order["lengths"], strict=True)], logprobs

    trainer.model.generate, trainer._generate_single_turn = ended, cut


def timed(trainer: GRPOTrainer, seconds: dict[str, float]) -> None:
    """Time the phases: generation, reward, the reference's pass, and all before the optimizer."""

    def wrap(name: str, phase: str, only: Callable[[], bool] = lambda: True) -> None:
        method = getattr(trainer, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            counts = only()
            began = now()
            result = method(*args, **kwargs)
            if counts:
                seconds[phase] += now() - began
            return result

        setattr(trainer, name, run)

    wrap("_generate", "generate")
    wrap("_calculate_rewards", "reward")
    wrap("_get_per_token_logps_and_entropies", "score", only=lambda: not torch.is_grad_enabled())
    wrap("training_step", "step")


def gradients(trainer: GRPOTrainer, settings: dict[str, Any], order: dict[str, Any]) -> None:
    """The gradient of TRL's loss on given completions, with TRL's own rewards, advantages and
    reference, saved to a file.
    """
    model = trainer.model
    model.load_state_dict(load_file(order["policy"]), strict=False)
    model.train()
    trainer._generate_single_turn = lambda *_, **__: (order["completions"], None)
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": p} for p in settings["prompts"] for _ in range(settings["group"])]
    inputs = trainer._generate_and_score_completions(rows)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    save_file({n: p.grad for n, p in model.named_parameters()}, order["save"])
    answer({"loss": float(loss)})


def sft(settings: dict[str, Any]) -> None:
    config = SFTConfig(**QUIET, **settings["config"], max_length=settings["max_length"])
    rows = [{"input_ids": ids, "completion_mask": mask} for ids, mask in settings["rows"]]
    seconds: dict[str, float] = defaultdict(float)
    tokens = {"tokens": 0}
    trainer = SFTTrainer(settings["model"], args=config, train_dataset=Dataset.from_list(rows))
    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        began = now()
        loss = step(model, inputs, *args)
        seconds["step"] += now() - began
        return loss

    trainer.training_step = training_step
    trainer.add_callback(Turns(seconds, lambda: tokens))
    answer({"ready": True})
    trainer.train()


def now() -> float:
    """Seconds of a clock, when the GPU, where one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def answer(figures: dict[str, Any]) -> None:
    if torch.cuda.is_initialized():
        gib = torch.cuda.max_memory_allocated() / 2**30
    else:
        with open("/proc/self/status", encoding="ascii") as status:  # rusage counts the parent's in
            [peak] = [line for line in status if line.startswith("VmHWM")]
        gib = int(peak.split()[1]) / 1024**2
    print(json.dumps({**figures, "peak_gib": gib}), flush=True)


if __name__ == "__main__":
    main()
