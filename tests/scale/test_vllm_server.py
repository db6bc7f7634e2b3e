"""A real vLLM server on a CPU (`make test-vllm` installs it): it samples from the trainer's weights
after each push, and the probe says where it does not.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import ServerError
from gearshift.models.load import save_model
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.vllm import GenerationConfig
from gearshift.trainers.push import PolicyOnServers
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.stage import Stage
from tests.gyms import SayLetters
from tests.trainers.rl_runs import OwnReward, small

PYTHON = os.environ.get("GEARSHIFT_TEST_VLLM", "")
"""The interpreter of an environment that has vLLM."""
PORT = 8137

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM in an environment of its own"),
]


def engine(tied: bool) -> Engine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return Engine(LlamaForCausalLM(config), tiny_tokenizer(), EngineConfig(max_num_seqs=16))


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server of the model in this folder, as docs/scale.md says how to start one."""
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(PORT), "--max-model-len", "256"),
        *("--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--enforce-eager"),
    ]
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    outer = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, env={**outer, **own}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 400
        while time.monotonic() < until and server.poll() is None:
            try:
                urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_a_policy_learns_from_vllm_and_the_gap_stays_at_rounding(tmp_path: Path) -> None:
    own = engine(tied=False)
    save_model(tmp_path / "model", own.model, own.tokenizer, "")
    with serving(tmp_path / "model") as url:
        config = GenerationConfig(backend="vllm", servers=(url,))
        policy = PolicyOnServers(config, own, tmp_path)
        recipe = small(
            steps=12,
            rollout={"prompts": 8, "group_size": 8, "max_new_tokens": 8},
            advantage={"name": "rloo"},
            kl={"beta": 0.0},
            importance={"mode": "token_truncate"},
            update={"optimizer": {"lr": 3e-3, "warmup": 0}},
        )
        stage = Stage("rl", tmp_path / "rl", recipe.steps, 0, recipe)
        collector = Collector(SayLetters, own.tokenizer, policy)
        RLTrainer(recipe, own, collector, rows=None, score=OwnReward(), stage=stage).train()
    metrics = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").open()]
    print([round(m["reward"], 2) for m in metrics])
    gaps = [m["sampling/sampling_logp_difference/mean"] for m in metrics]
    print(gaps, [m["engine/push_seconds"] for m in metrics])
    assert metrics[-1]["reward"] > metrics[0]["reward"] + 0.2
    assert max(gaps) < 1e-5


def test_the_probe_says_whether_a_tied_head_is_reloaded(tmp_path: Path) -> None:
    """vLLM 0.32 for CPUs leaves the packed head as it was, and answers 200."""
    own = engine(tied=True)
    save_model(tmp_path / "model", own.model, own.tokenizer, "")
    with serving(tmp_path / "model") as url:
        policy = PolicyOnServers(GenerationConfig(backend="vllm", servers=(url,)), own, tmp_path)
        with policy.generating():
            pass
        with torch.no_grad():
            for parameter in own.model.parameters():
                parameter.mul_(1.1)
        own.weights_changed()
        with pytest.raises(ServerError, match="tied head") as raised, policy.generating():
            pass
    print(raised.value)
