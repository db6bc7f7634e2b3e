"""What runs on a GPU leaves nothing on the CPU, and the GPU nothing that it could do without: on a
fake GPU, which every machine has.
"""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from gearshift.batch import pack_groups
from gearshift.cli.main import main
from gearshift.engine import Engine, EngineConfig, stats
from gearshift.kernels.chunked import ChunkedKernels
from gearshift.kernels.cuda_graphs import HostWaits
from gearshift.models.adapters import merged_state
from gearshift.models.load import ModelConfig, load_classifier, load_policy
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.context import Context
from gearshift.runtime.free_memory import free_bytes
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.trainers.ema import MovingAverage
from gearshift.trainers.needs import MemoryNeeds, Tree
from gearshift.types import SamplingParams
from tests import fake_gpu
from tests.trainers.rl_runs import small, trainer
from tests.zoo import FAMILIES, random_model

RECIPE = str(Path(__file__).parent / "smoke" / "tiny.yaml")
PAIRS = 'data.sources=[{path: "task:pairs"}]'
NO_RL = ("reward=null", "sft=null")
FEW = ("task.labelled=8", "task.validation=2", "task.test=2",
       "eval.max_new_tokens=2")  # fmt: skip
ON_GPU = ModelConfig(name="tiny", dtype="float32", device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with fake_gpu.fake_gpu(monkeypatch) as device:
        yield device


@pytest.mark.parametrize(
    "keys",
    [
        ("rl.value.kind=critic", "rl.value.init_from=reward", "rl.kl.beta=0.1"),
        (*NO_RL, "algorithm=grpo", "model.lora.rank=2", "model.dtype=bfloat16", "rl.kl.beta=0.1",
         "rl.update.micro_batch_tokens=60", "rl.update.ema=0.9", "rl.update.epochs=2"),
        (*NO_RL, "rl.advantage.name=remax", "engine.recompute=true",
         "rl.update.micro_batch_tokens=0"),
        (*NO_RL, "algorithm=dpo", f"preference.{PAIRS}"),
        (*NO_RL, "algorithm=kto", f"preference.{PAIRS}", "preference.reference=each_step"),
    ],
    ids=["critic", "adapters", "recompute", "dpo", "kto"],
)  # fmt: skip
def test_a_recipe_computes_on_one_device(
    keys: tuple[str, ...], gpu: torch.device, tmp_path: Path
) -> None:
    main(["run", RECIPE, f"run.dir={tmp_path}", f"model.device={gpu}", *FEW, *keys])
    assert (tmp_path / "report.html").exists()


def test_a_tensor_that_is_left_on_the_cpu_is_an_error(gpu: torch.device) -> None:
    engine = Engine(load_policy(ON_GPU), tiny_tokenizer(), EngineConfig())
    batch = pack_groups([([3, 4], [([5, 6], [1, 1])])])
    with engine.training(), pytest.raises(AssertionError, match="on the CPU"):
        engine.logprobs(batch)
    with engine.training():
        engine.logprobs(batch.to(gpu)).logprobs.sum().backward()
    assert all(p.grad is not None and fake_gpu.on_gpu(p.grad) for p in engine.model.parameters())


class NoAttention(ChunkedKernels):
    """The kernels of a GPU, whose attention is Triton's and stays on it. They capture nothing, and
    look at what a capture would hold.
    """

    def attend(self, query: Tensor, store: Tensor, metadata: Any, options: Any) -> Tensor:
        assert metadata.common.dtype == torch.int64
        return query.contiguous()

    def capture(self, prepare: Any, run: Any) -> None:
        with HostWaits() as waits:
            fake_gpu.moves.clear()
            prepare()
            logits = run()
        assert waits.found is None and not fake_gpu.moves and fake_gpu.on_gpu(logits)
        self.captured = True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_can_be_captured(family: str, gpu: torch.device) -> None:
    """It waits for nothing, and nothing is copied from the host or to it."""
    engine = Engine(random_model(family).to(gpu), tiny_tokenizer(), EngineConfig(max_num_seqs=4))
    kernels = engine.runner.kernels = NoAttention()
    engine.end_tokens = frozenset()
    with engine.generating():
        engine.generate([[3, 4, 5]], SamplingParams(n=3, max_new_tokens=4))
    assert kernels.captured


@pytest.mark.parametrize("head", ["logprobs", "scores", "token_logits"])
def test_the_memory_of_a_micro_batch_is_measured(head: Any, gpu: torch.device) -> None:
    needs = MemoryNeeds(OptimizerConfig(), 64, 64, Tree(8, 2, 8), head=head)
    plan = Activations(tiny_model().config, needs, torch.float32, gpu)
    plan.bytes(64, False)
    assert plan.unknown == ""


def test_a_full_gpu_is_not_measured_and_trains(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stats.measure.cache_clear()
    monkeypatch.setattr(stats, "_bytes_per_second", full)
    run = trainer(small(steps=1, kl={"beta": 0}), tmp_path, model=load_policy(ON_GPU))
    run.train()
    assert math.isnan(stats.peak_flops(gpu, torch.float32))
    stats.measure.cache_clear()


def test_what_the_allocator_keeps_is_free(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert free_bytes(gpu) == 45


def test_copies_of_the_weights_are_on_the_host(gpu: torch.device) -> None:
    model = load_policy(ON_GPU)
    average, before = MovingAverage(model, 0.9), fake_gpu.gpu_bytes()
    with average.applied():
        assert fake_gpu.gpu_bytes() == before
    state = merged_state(model)
    assert fake_gpu.gpu_bytes() == before and not any(map(fake_gpu.on_gpu, state.values()))


def test_a_described_reward_model_scores_where_it_is(gpu: torch.device) -> None:
    runner = ModelRunner(load_classifier(ON_GPU, fresh_head=True))
    assert runner.form == "described" and len(runner.score_all([[3, 4, 5], [6, 7]])) == 2


def test_the_first_evaluation_holds_no_memory_in_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[ref[Engine]] = []
    make, open_policy = Engine.__init__, Context.open_policy

    def noted(self: Engine, *args: Any, **kwargs: Any) -> None:
        engines.append(ref(self))
        make(self, *args, **kwargs)

    def checked(*args: Any) -> Any:
        assert engines and not any(engine() for engine in engines)
        engines.clear()
        return open_policy(*args)

    monkeypatch.setattr(Engine, "__init__", noted)
    monkeypatch.setattr(Context, "open_policy", checked)
    gc.disable()
    try:
        main(["run", RECIPE, f"run.dir={tmp_path}", *FEW, "reward=null", "rl=null"])
    finally:
        gc.enable()
