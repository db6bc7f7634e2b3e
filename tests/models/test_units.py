"""Each decoder layer of Hugging Face is a unit: it runs inside its `run` method and touches its own
parameters alone, so that FSDP2 can gather them around it. State dicts keep Hugging Face's names.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gearshift.batch import PackedBatch, pack_groups
from gearshift.engine import Engine
from gearshift.models import units
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.models.sharded import shard
from tests.zoo import CONFIGS, FAMILIES, PROMPTS, random_model

BATCH = pack_groups([
    ([5, 6, 7, 8], [([9, 10, 11], [1, 1, 0]), ([12], [1])]),
    ([20] * 11, [([21, 22], [1, 1])]),
])  # fmt: skip


def scored(runner: ModelRunner, batch: PackedBatch = BATCH) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of their and the entropies' weighted sum."""
    runner.model.zero_grad()
    scores = runner.logprobs(batch)
    factor = torch.arange(1.0, 1 + len(scores.logprobs))
    (factor * scores.logprobs + 0.1 * scores.entropy).sum().backward()
    grads = {name: p.grad for name, p in runner.model.named_parameters() if p.grad is not None}
    full = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return scores.logprobs.detach(), {name: grad.clone() for name, grad in full.items()}


def poison(model: nn.Module, unit: Any, seen: list[str]) -> None:
    """While the unit runs, every parameter but its own is NaN."""
    own = {id(p) for p in unit.parameters()}
    [name] = [name for name, module in model.named_modules() if module is unit]

    def run(work: Any, *args: Any) -> Any:
        others = [p for p in model.parameters() if id(p) not in own]
        kept = [p.data.clone() for p in others]
        for p in others:
            p.data.fill_(torch.nan)
        try:
            seen.append(name)
            return work(*args)
        finally:
            for p, values in zip(others, kept, strict=True):
                p.data.copy_(values)

    vars(unit)["run"] = run


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_touches_its_own_parameters_alone(family: str, recompute: bool) -> None:
    wanted, grads = scored(ModelRunner(random_model(family), recompute=recompute))
    runner = ModelRunner(random_model(family), recompute=recompute)
    seen: list[str] = []
    for layer in runner.plan.layers:
        poison(runner.model, layer.unit, seen)
    ours, same = scored(runner)
    assert torch.equal(ours, wanted)
    for name, grad in grads.items():
        assert torch.equal(same[name], grad), name
    passes = 2 if recompute else 1
    assert len(seen) == passes * CONFIGS[family].num_hidden_layers and len(set(seen)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generating_layer_touches_its_own_parameters_alone(family: str) -> None:
    written, seen = [], []
    for poisoned in (False, True):
        engine = Engine(random_model(family), tiny_tokenizer(), seed=3)
        engine.runner.kernels.capture = lambda prepare, run: None  # every step is Python's
        for layer in engine.runner.plan.layers if poisoned else ():
            poison(engine.model, layer.unit, seen)
        with engine.generating():
            groups = engine.generate(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=5))
        written.append([[(c.token_ids, c.logprobs) for c in group] for group in groups])
    assert written[0] == written[1] and len(set(seen)) == 2


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_gathers_around_each_unit(family: str) -> None:
    wanted, grads = scored(ModelRunner(random_model(family)))
    names = list(random_model(family).state_dict())
    with one_process():
        model = random_model(family)
        runner = ModelRunner(model, fuse=False)
        whole: list[tuple[str, set[str]]] = []
        for layer in runner.plan.layers:
            note_what_is_whole(model, layer.unit, whole)
        shard(runner)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        ours, same = scored(runner)
        assert list(model.state_dict()) == names
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert same.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(same[name], grad, atol=1e-4 * float(grad.abs().max())), name
    inside = [name for name, _ in whole]
    assert len(inside) == CONFIGS[family].num_hidden_layers
    for name, held in whole:
        gathered = {unit for unit in inside if any(p.startswith(f"{unit}.") for p in held)}
        assert gathered == {name}


def note_what_is_whole(model: nn.Module, unit: Any, whole: list[tuple[str, set[str]]]) -> None:
    [name] = [name for name, module in model.named_modules() if module is unit]

    def run(work: Any, *args: Any) -> Any:
        plain = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        whole.append((name, plain))
        return work(*args)

    vars(unit)["run"] = run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_are_hugging_faces(family: str) -> None:
    plain = random_model(family)
    runner = ModelRunner(random_model(family))
    assert list(runner.model.state_dict()) == list(plain.state_dict())
    again = copy.deepcopy(runner.model)  # its units are its own
    assert list(again.state_dict()) == list(plain.state_dict())
    units.run_in(again, lambda: None)


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "tests.models.sharded", "llama", "qwen3", "gemma3", "gpt2", "gpt_neox",
        ],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 5
