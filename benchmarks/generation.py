"""Sampling with log-probs: our generation gear against Hugging Face `generate`, in turn, in one
process.

    make bench        # or: python -m benchmarks.generation --rows 32 --new 64 --rounds 5

Prints tokens per second of each and the ratio of medians; writes
benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from gearshift.engine import EngineConfig, HybridEngine
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.types import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    config = ModelConfig()
    tokenizer = load_tokenizer(config)
    engine = HybridEngine(load_policy(config), tokenizer, EngineConfig(max_rows=options.rows))
    engine.end_tokens = frozenset()  # fixed length: nobody stops early
    peer = load_policy(config)
    peer.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40000, (options.rows, options.prompt), generator=generator)
    prompts = prompts.to(engine.device)

    def ours() -> None:
        with engine.generating():
            engine.generate(prompts.tolist(), SamplingParams(max_new_tokens=options.new))

    @torch.no_grad()
    def theirs() -> None:
        out = peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=options.new,
            max_new_tokens=options.new,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for logits, token in zip(out.logits, out.sequences[:, options.prompt :].T, strict=True):
            torch.log_softmax(logits.float(), -1).gather(1, token[:, None])

    samples = measure({"gearshift": ours, "transformers": theirs}, options.rounds)
    tokens = options.rows * options.new
    rates = {name: tokens / statistics.median(times) for name, times in samples.items()}
    result = {
        "ratio": rates["gearshift"] / rates["transformers"],
        "tokens_per_second": rates,
        "seconds": samples,
        "settings": vars(options),
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    path = Path(__file__).parent / "results" / "generation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, rate in rates.items():
        print(f"{name:14} {rate:7.0f} tokens/s")
    print(f"ratio of medians {result['ratio']:.2f}; samples in {path}")


def measure(subjects: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject, in turn, after one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name, run in subjects.items():
            began = time.perf_counter()
            run()
            if round_:
                samples[name].append(time.perf_counter() - began)
    return samples


if __name__ == "__main__":
    main()
