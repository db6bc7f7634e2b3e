"""The table of docs/scale.md: which model fits on which cards, by the plan that `--dry-run` prints.

    python -m benchmarks.scale_table [MODEL ...]

It needs no weights and no network: shapes come from the models' public configs, written down here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gearshift.engine import EngineConfig
from gearshift.models.adapters import AdapterConfig
from gearshift.models.load import ModelConfig
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.forms import shapes
from gearshift.pipeline.machine import GIB, Machine
from gearshift.pipeline.memory import Shape, fit
from gearshift.pipeline.plan import adapter_size
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.trainers.rl.config import RLConfig

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
    "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": {
        **_QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "intermediate_size": 12288,
    },
    "Qwen/Qwen3-32B": {
        **_QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
        "intermediate_size": 25600,
    },
    "Qwen/Qwen3-30B-A3B": {
        **_QWEN3, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip
"""The public configs, as far as memory depends on them."""
MACHINES = ("1x1x44", "1x1x79", "1x8x79", "1x8x139", "8x8x79", "8x8x139")
STRATEGIES = (
    "replicate", "fsdp", "fsdp, scale.split=64", "fsdp, vLLM samples",
    "fsdp, scale.split=64, vLLM samples", "replicate, model.lora",
)  # fmt: skip
ENGINE = EngineConfig(max_num_seqs=64, max_length=3072, free_cache_while_training=True)
STAGE = RLConfig(
    algorithm="dapo",
    rollout={"prompts": 64, "group_size": 16, "max_new_tokens": 2048},
    update={"minibatches": 4, "micro_batch_tokens": 8192},
)
"""Reinforcement learning without a KL: 1,024 completions a step, at most 2,048 tokens each."""


def write_config(name: str, folder: Path) -> Path:
    """Write the config of a public model into the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return folder


def sizes(folder: Path, described: bool) -> dict[str, list[float]]:
    """GiB of one rank at the peak on each of `MACHINES`, by strategy."""
    model, dtype, lora = shapes(ModelConfig(name=str(folder))), torch.bfloat16, AdapterConfig()
    shape, whole = Shape.of(model, dtype), STAGE.memory_needs()
    engine = ENGINE.model_copy(update={"recompute": described})
    found = {}
    for name in STRATEGIES:
        needs = replace(whole, rollout=None, keep_whole=False) if "vLLM" in name else whole
        adapters = lora if "lora" in name else None
        trained = adapter_size(shape, lora) if adapters else shape.parameters
        activations = Activations(model.config, needs, dtype, torch.device("cpu"), adapters)
        split = 64 if "split=64" in name else None
        scale = ScaleConfig.model_validate({"strategy": name.split(",")[0], "split": split})
        found[name] = [
            fit(
                needs, engine, shape, trained, Machine.named(on, scale), activations,
                adapters is not None,
            ).parts["total"] / GIB
            for on in MACHINES
        ]  # fmt: skip
    return found


def main() -> None:
    """Print the table in Markdown."""
    print("| model | strategy |", " | ".join(MACHINES), "|")
    print("|---|---|" + "---|" * len(MACHINES))
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or CONFIGS:
            rows = sizes(write_config(name, Path(folder) / name), "A3B" not in name)
            for strategy, row in rows.items():
                cells = [
                    f"**{size:.0f}**" if size * GIB <= Machine.named(on, ScaleConfig()).free
                    else f"{size:.0f}"
                    for size, on in zip(row, MACHINES, strict=True)
                ]  # fmt: skip
                short = name.partition("/")[2]
                print(f"| {short} | `{strategy}` |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
