"""Named checks of `scale.strategy: fsdp`, each against what one process computes.

    torchrun --standalone --nproc-per-node=2 -m tests.scale.sharded FOLDER [NAME ...]

The main rank prints `NAME: same` after each.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PhiConfig,
    Qwen3MoeConfig,
)

from gearshift.batch import PackedBatch, pack_groups
from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.errors import DataError, ModelError, NumericalError
from gearshift.models import from_pretrained
from gearshift.models.attention import ATTENTION
from gearshift.models.load import ModelConfig, load_classifier, load_policy
from gearshift.models.read_in_parts import _fill, read_in_parts
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime import distributed
from gearshift.runtime.distributed import Part, World, joined, world
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.scale_config import ScaleConfig
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import update
from gearshift.types import SamplingParams
from tests.models.families import small_config
from tests.trainers.rl_runs import small, trainer
from tests.zoo import _COMMON, _GROUPED, CONFIGS, PROMPTS, random_model

# With a small eps, the last digits of a weight whose gradient is nearly 0 become a whole step.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-4, max_grad_norm=0.5)
OTHERS: dict[str, Any] = {
    "untied": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "phi": PhiConfig(**_COMMON),
    "qwen3_moe": Qwen3MoeConfig(
        **_GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "longcat_flash": small_config("longcat_flash"),
}
"""The last three run through Hugging Face's modules. An expert of the last one that a rank sends no
token to has no gradient there.
"""
TREES = [
    ([5, 6, 7, 8], [([9, 10, 11], [1, 1, 0]), ([12], [1])]),
    ([20] * 11, [([21, 22], [1, 1])]),
    ([3, 30], [([31, 32, 33, 34, 35], [1, 0, 1, 1, 1])]),
]


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one."""
    with patch.object(distributed, "_world", World()):
        yield


@contextmanager
def cut_for(ranks: int) -> Iterator[None]:
    """Inside, one process cuts micro-batches as for so many ranks. With these learning rates the
    cut alone moves a weight by 0.6e-6 (two ranks) or 0.9e-6 (four), which is rounding: what the
    ranks add is compared with the same cut where there are more than two.
    """
    split, groups = PackedBatch.split, PackedBatch.split_groups
    with (
        patch.object(PackedBatch, "split", lambda self, n, _=1: split(self, n, ranks)),
        patch.object(PackedBatch, "split_groups", lambda self, n, _=1: groups(self, n, ranks)),
    ):
        yield


def model_of(family: str) -> Any:
    if family in CONFIGS:
        return random_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(OTHERS[family], attn_implementation=ATTENTION)
    return model.eval()


def loss_of(runner: ModelRunner, micro: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    scores = runner.logprobs(micro)
    targets = micro.targets.float()
    loss = -(targets * scores.logprobs + 0.3 * scores.entropy).sum() / 100
    return loss, {"entropy": scores.entropy.sum()}


def learn(runner: ModelRunner, steps: int = 2) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Two updates of the three trees; metrics, and the gradients of the first one."""
    optimizer = MasterAdamW(runner.trained_parameters(), OPTIMIZER, steps)
    found, grads = [], {}
    norm = optimizer.norm

    def noted() -> float:
        for name, p in runner.learner.model.named_parameters():
            if name not in grads and p.grad is not None:
                grads[name] = whole(p.grad).clone()
        return norm()

    batch = pack_groups(TREES)
    with patch.object(optimizer, "norm", noted):
        for _ in range(steps):
            size = MicroBatchSize(8)  # three of them, which no number of ranks here divides
            found.append(update(batch.split, size, partial(loss_of, runner), optimizer))
            runner.weights_changed()
    return found, grads


def whole(x: Any) -> Any:
    if isinstance(x, Part):
        return torch.cat(world().gather(x.own, "rows"))
    return x.full_tensor() if isinstance(x, DTensor) else x


def near(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    scale = float(theirs.float().abs().max().clamp(min=1e-6))
    gap = float((ours.float() - theirs.float()).abs().max()) / scale
    assert gap <= tolerance, (what, gap)


def alike(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float) -> None:
    for step, known in zip(ours, theirs, strict=True):
        for name, value in known.items():
            assert abs(step[name] - value) <= tolerance * max(1.0, abs(value)), (name, step, known)


def gradients(
    folder: Path,
    family: str,
    dtype: str = "float32",
    recompute: bool = False,
    tolerance: float = 2e-6,
) -> None:
    """Gradients, norms, metrics, weights and samples."""
    kind = getattr(torch, dtype)
    with alone():
        one = Engine(model_of(family).to(kind), tiny_tokenizer())
        wanted, theirs = learn(one.runner)
    many = Engine(model_of(family).to(kind), tiny_tokenizer())
    many.runner.recompute = recompute
    places = [p.data_ptr() for p in many.model.parameters()]
    metrics, ours = learn(many.runner)
    many.weights_changed()
    rows = many.runner.learner.model
    assert all(isinstance(p, DTensor) for p in rows.parameters())
    assert [p.data_ptr() for p in many.model.parameters()] == places
    assert list(rows.state_dict()) == list(many.model.state_dict())
    alike(metrics, wanted, tolerance)
    # One process adds up gradients in bf16 elsewhere: their norm is among the metrics.
    assert not theirs or ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        near(ours[name], grad, tolerance, name)
    for (name, p), q in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
        near(q.data, p.data, tolerance, name)
    with torch.no_grad():
        plain = one.runner.logprobs(pack_groups(TREES)).logprobs
        near(many.runner.logprobs(pack_groups(TREES)).logprobs, plain, tolerance, "log-probs")
    if dtype == "float32":
        params = SamplingParams(n=2, max_new_tokens=5)
        written = []
        for engine in (one, many):
            with engine.generating():
                groups = engine.generate(PROMPTS, params)
            written.append([[c.token_ids for c in group] for group in groups])
        assert written[0] == written[1]


def sft(folder: Path) -> None:
    """Sixteen rows of several lengths, in micro-batches that no number of ranks divides."""
    ids = [[1, 5 + i, 9, 7 + 2 * i, 11, 3, 8 + i, 30 + i][: 4 + 5 * i % 5] for i in range(16)]
    rows = [(row, [0, *[1] * (len(row) - 1)]) for row in ids]
    settings = {"batch_size": 5, "micro_batch_tokens": 12, "optimizer": OPTIMIZER, "save_every": 0}

    def train() -> nn.Module:
        engine = Engine(tiny_model(), tiny_tokenizer())
        config = SFTConfig.model_validate(settings)
        place = Path(tempfile.mkdtemp()) if world().size == 1 else folder
        train_sft(config, engine, Mixture([rows], [1.0], 0), Stage("sft", place, 3, 0, config))
        return engine.model

    compare(train)


def rl(folder: Path, **changes: Any) -> None:
    """Weights, and the episodes token by token."""
    episodes = []

    def train() -> nn.Module:
        place = Path(tempfile.mkdtemp()) if world().size == 1 else folder
        # The figures of tokens are rounded, and a value between two of them falls to either.
        settings = {"steps": 3, "rollout": {"prompts": 3}, "record_figures": False, **changes}
        sizes = {"micro_batch_tokens": 64, "optimizer": OPTIMIZER, "ema": 0.5}
        settings["update"] = {**sizes, **changes.get("update", {})}
        run = trainer(small(**settings), place)
        run.train()
        if world().main:
            lines = (place / "rollouts.jsonl").read_text()
            episodes.append(lines)
        found = nn.ModuleDict({"policy": run.engine.model})
        if run.models.critic:
            found.update(run.models.critic.modules)
        if run.models.head:
            found["head"] = run.models.head
        assert run.average is not None
        average = nn.ParameterList(run.average.average).requires_grad_(False)
        return nn.ModuleList([found, average])

    compare(train)
    assert len(set(episodes)) == (1 if world().main or not episodes else len(episodes))


def compare(train: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    many = train()
    ranks = world().size
    with alone(), cut_for(ranks if ranks > 2 else 1):
        torch.manual_seed(0)
        one = train()
    for name, p in one.state_dict().items():
        near(many.state_dict()[name], p, 1e-6, name)


def broken_loss(folder: Path) -> None:
    """A loss that is not finite on one rank is an error on both, and nothing is updated."""
    runner = ModelRunner(tiny_model())
    optimizer = MasterAdamW(runner.trained_parameters(), OPTIMIZER, 2)
    before = [p.clone() for p in runner.model.parameters()]

    def broken(micro: PackedBatch, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_of(runner, micro)
        return loss * (torch.nan if last and world().rank == world().size - 1 else 1.0), metrics

    batch = pack_groups(TREES)
    try:
        update(batch.split, MicroBatchSize(20), partial(broken, last=True), optimizer)
    except NumericalError as error:
        assert "The loss is nan" in str(error)
    else:
        raise AssertionError("no error")
    runner.weights_changed()
    for p, q in zip(before, runner.model.parameters(), strict=True):
        assert torch.equal(p, q)
    update(batch.split, MicroBatchSize(20), partial(broken, last=False), optimizer)


def one_rank_fails(folder: Path) -> None:
    """The others wait for it in a layer; it must end, and not wait for them."""
    runner = ModelRunner(tiny_model())
    optimizer = MasterAdamW(runner.trained_parameters(), OPTIMIZER, 2)

    def fails(micro: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if world().rank == world().size - 1:
            raise DataError("the row is broken")
        return loss_of(runner, micro)

    update(pack_groups(TREES).split, MicroBatchSize(20), fails, optimizer)


def cut_forward(folder: Path) -> None:
    """After an error in a layer, the next update is as if nothing had been."""
    with alone():
        wanted, _ = learn(ModelRunner(tiny_model()))
    runner = ModelRunner(tiny_model())
    runner.trained_parameters()
    weights: Any = runner.learner.weights

    def fails(*given: Any) -> Any:
        raise RuntimeError("the layer failed")

    with patch.object(weights, "down", [weights.down[0], fails]):
        try:
            runner.logprobs(pack_groups(TREES))
        except RuntimeError as error:
            assert "the layer failed" in str(error)
        else:
            raise AssertionError("no error")
    found, _ = learn(runner)
    alike(found, wanted, 1e-6)


def state(folder: Path) -> None:
    """A saved state goes on: each rank's rows, the whole tensors, and those on one process."""

    def one_step(runner: ModelRunner, optimizer: MasterAdamW) -> dict[str, float]:
        cut = pack_groups(TREES).split
        return update(cut, MicroBatchSize(20), partial(loss_of, runner), optimizer)

    def fresh(saved: Any, weights: Any) -> tuple[ModelRunner, MasterAdamW]:
        runner = ModelRunner(tiny_model())
        optimizer = MasterAdamW(runner.trained_parameters(), OPTIMIZER, 4)
        optimizer.load_state_dict(saved)
        runner.weights_changed()
        for p, q in zip(runner.model.parameters(), weights, strict=True):
            near(p.data, q, 1e-6, "weights")
        return runner, optimizer

    runner = ModelRunner(tiny_model())
    optimizer = MasterAdamW(runner.trained_parameters(), OPTIMIZER, 4)
    for _ in range(2):
        one_step(runner, optimizer)
    runner.weights_changed()
    weights = [p.detach().clone() for p in runner.model.parameters()]
    rows = copy.deepcopy(optimizer.state_dict())
    all_of_it = tree_map(whole, rows)
    wanted = one_step(runner, optimizer)
    for saved in (rows, all_of_it):
        assert one_step(*fresh(saved, weights)) == wanted
    with alone():
        alike([one_step(*fresh(all_of_it, weights))], [wanted], 1e-6)


def refused(folder: Path) -> None:
    model = tiny_model()
    model.model.norm.to(torch.bfloat16)  # type: ignore[operator]
    runner = ModelRunner(model, checked=False)
    try:
        runner.trained_parameters()
    except ModelError as error:
        assert "weights of several precisions (bfloat16, float32)" in str(error)
    else:
        raise AssertionError("no error")


def read(folder: Path) -> None:
    """Each rank reads its rows of the files, and has the model that one process loads; also where a
    tensor has fewer rows than there are ranks. A tied model is loaded whole.
    """
    config = {"dtype": "bfloat16", "device": "cpu"}
    for family, whole in (("untied", False), ("llama", True)):
        saved = folder / family
        if world().main:
            model_of(family).save_pretrained(saved, max_shard_size="20KB")
            (saved / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
        world().gather(None, "a saved model")
        load = partial(load_policy, ModelConfig(name=str(saved), **config))
        with alone():
            one = load()
        with patch.object(from_pretrained, "read_in_parts", wraps=read_in_parts) as reads:
            many = load()
        assert reads.called != whole
        ours, theirs = many.state_dict(), one.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in theirs)
        pairs = zip(many.buffers(), one.buffers(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        assert many.generation_config.eos_token_id == [5, 7]  # type: ignore[union-attr]
        assert many.config.to_diff_dict() == one.config.to_diff_dict()
    saved = folder / "untied"
    classifier = LlamaForSequenceClassification(LlamaConfig(**_GROUPED, num_labels=1))
    if world().main:
        classifier.save_pretrained(folder / "scores")
    world().gather(None, "a saved classifier")
    scores = partial(load_classifier, ModelConfig(name=str(folder / "scores"), **config))
    with alone():
        theirs = scores().state_dict()
    with patch.object(from_pretrained, "read_in_parts", wraps=read_in_parts) as reads:
        ours = scores().state_dict()
    assert reads.called and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    settings, cpu = AutoConfig.from_pretrained(saved), torch.device("cpu")
    _, bytes_read = read_in_parts(
        AutoModelForCausalLM, settings, saved, torch.float32, cpu, False, None
    )
    files = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert bytes_read < files / world().size, (bytes_read, files)
    if world().main:
        save_file({"row": torch.ones(1, 3), "one": torch.ones(())}, folder / "few.safetensors")
    world().gather(None, "a saved row")
    with safe_open(str(folder / "few.safetensors"), "pt") as file:
        for name, target in (("row", torch.zeros(1, 3)), ("one", torch.zeros(()))):
            _fill(target, file.get_slice(name))
            assert bool((target == 1).all())


def nodes(folder: Path) -> None:
    """Four ranks on two nodes: a node has all rows, and a rank half of them."""
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        gradients(folder, "llama")
        runner = ModelRunner(tiny_model())
        rows: Any = runner.trained_parameters()
    total = sum(p.numel() for p in rows)
    assert abs(sum(p.to_local().numel() for p in rows) / total - 0.5) < 0.1
    assert rows[0].device_mesh.mesh.tolist() == [[0, 1], [2, 3]]


CRITIC = {"kind": "critic", "optimizer": OPTIMIZER, "warmup": 1}
GAE = {"advantage": {"name": "gae"}, "kl": {"beta": 0.05}}
QUICK: dict[str, Callable[[Path], None]] = {
    "llama": partial(gradients, family="llama"),
    "gpt2": partial(gradients, family="gpt2"),
    "phi": partial(gradients, family="phi"),
    "untied": partial(gradients, family="untied"),
    "recompute": partial(gradients, family="llama", recompute=True),
    "bf16": partial(gradients, family="llama", dtype="bfloat16", tolerance=2e-2),
    "sft": sft,
    "rl": partial(rl, advantage={"name": "grpo"}, kl={"beta": 0.05}, update={"minibatches": 2}),
    "a loss that is not finite": broken_loss,
    "a forward pass that was cut": cut_forward,
    "a saved state": state,
    "several precisions": refused,
    "files that are read in parts": read,
}
REST: dict[str, Callable[[Path], None]] = {
    **{family: partial(gradients, family=family) for family in (*CONFIGS, *OTHERS)},
    "longcat_flash": partial(gradients, family="longcat_flash", tolerance=1e-5),
    "recompute of gpt2": partial(gradients, family="gpt2", recompute=True),
    "value head": partial(rl, **GAE, value={"optimizer": OPTIMIZER, "warmup": 1}),
    "critic": partial(rl, **GAE, value=CRITIC),
    "two nodes": nodes,
    "one rank fails": one_rank_fails,
}


def main(folder: Path, *names: str) -> None:
    """Do the checks of these names; those that are quick if none is given."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from tests.scale.split_only import CHECKS  # it compares by this file's functions

    known = QUICK | {name: check for name, check in (REST | CHECKS).items() if name not in QUICK}
    with joined(ScaleConfig(strategy="fsdp", timeout=300), folder):
        for name in names or QUICK:
            known[name](folder / name.replace(" ", "_"))
            world().gather(None, name)
            if world().main:
                os.write(1, f"{name}: same\n".encode())  # the ranks' own lines are not printed


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
