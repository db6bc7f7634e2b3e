"""The memory of a micro-batch, measured on two small models, is that of the whole model."""

from collections.abc import Callable

import pytest
import torch

from gearshift.engine import EngineConfig
from gearshift.kernels.build import kernels_left_out
from gearshift.models.load import ModelConfig, load_classifier
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_model
from gearshift.pipeline.activations import Activations, _batch
from gearshift.pipeline.memory import micro_batch
from gearshift.runtime.allocator import resident_bytes
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.peak_memory import Counted, peak_memory
from gearshift.trainers.needs import MemoryNeeds, Tree
from tests.models.families import random_model, small_config

CPU = torch.device("cpu")
ROWS, SHORT, LONG = Tree(0, 1, 64), Tree(16, 4, 32), Tree(128, 8, 32)
"""Rows of supervised examples; completions of short prompts and of long ones."""


def peak_bytes(run: Callable[[], object]) -> float:
    with peak_memory(CPU) as peak:
        run()
        return peak()


def needs(tree: Tree, tokens: int) -> MemoryNeeds:
    return MemoryNeeds(OptimizerConfig(), tokens, tokens, tree)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tree", [ROWS, SHORT, LONG])
@pytest.mark.parametrize("vocabulary", [259, 4000])
def test_two_small_models_tell_the_peak_of_a_deep_one(
    tree: Tree, dtype: torch.dtype, again: bool, vocabulary: int
) -> None:
    """Also where a shallow model has its peak at its embedding's gradient."""
    model = tiny_model(hidden_size=64, layers=24, vocab_size=vocabulary).to(dtype)
    told = Activations(model.config, needs(tree, 512), dtype, CPU).bytes(512, again)
    model.set_attn_implementation("gearshift")
    runner = ModelRunner(model, recompute=again)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = _batch(tree, 512, True)
    whole = peak_bytes(lambda: runner.logprobs(batch).logprobs.sum().backward())
    assert told == pytest.approx(whole, rel=0.03)


def test_an_embedding_with_a_part_for_each_layer_grows_with_the_layers() -> None:
    more = {"num_hidden_layers": 10, "num_kv_shared_layers": 0, "layer_types": None,
            "vocab_size_per_layer_input": 60_000}  # fmt: skip
    model = random_model(small_config("gemma3n_text", **more))
    told = Activations(model.config, needs(ROWS, 256), torch.float32, CPU).bytes(256, False)
    model.set_attn_implementation("gearshift")
    runner = ModelRunner(model)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = _batch(ROWS, 256, True)
    whole = peak_bytes(lambda: runner.logprobs(batch).logprobs.sum().backward())
    assert told == pytest.approx(whole, rel=0.1)


def test_it_is_the_same_count_where_everything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(), _batch(SHORT, 1024, True)
    model.set_attn_implementation("gearshift")
    runner = ModelRunner(model)

    def run() -> None:
        runner.logprobs(batch).logprobs.sum().backward()
        model.zero_grad()

    with kernels_left_out():
        quick = peak_bytes(run)
    monkeypatch.setattr("gearshift.runtime.peak_memory._LARGE", 1 << 40)
    assert quick == peak_bytes(run) == peak_bytes(run)


def test_memory_counts_until_the_last_view_of_it_is_gone() -> None:
    with Counted() as counted:
        whole = torch.zeros(1000)
        view, other = whole[:10], torch.ones(50, dtype=torch.int64)
        del whole
        assert counted.live == counted.peak == 4400
        del view
        assert (counted.live, counted.peak) == (400, 4400)
    assert int(other.sum()) == 50


def test_equal_arguments_of_other_types_are_other_operations() -> None:
    """What an operation gives is asked once for each form of its arguments; 1.0 and 1 are equal."""
    whole = torch.ones(1 << 16, dtype=torch.int64)
    with Counted() as counted:
        made = whole * 1.0, whole * 1
        assert [x.dtype for x in made] == [torch.float32, torch.int64]
        assert counted.live == (4 + 8) << 16


def test_padded_classifiers_and_long_rows_are_measured() -> None:
    """A row that is longer than the micro-batch is not cut, and one that the model cannot read is
    as long as it can.
    """
    config = load_classifier(ModelConfig(name="tiny", dtype="float32", device="cpu")).config
    for head in ("scores", "token_logits"):
        asked = MemoryNeeds(OptimizerConfig(), 64, 4096, Tree(0, 1, 100), head=head)  # type: ignore[arg-type]
        plan = Activations(config, asked, torch.float32, CPU)
        assert plan.bytes(64, False) == pytest.approx(plan.bytes(100, False), rel=0.01)
        assert 0 < 1.5 * plan.bytes(100, False) < plan.bytes(400, False)
    endless = Activations(config, needs(Tree(400, 2, 1 << 20), 4096), torch.float32, CPU)
    assert endless.bytes(4096, False) > 0


def test_a_batch_has_so_many_tokens() -> None:
    for tree in (ROWS, SHORT, LONG):
        for tokens in (300, 512, 1000):
            batch = _batch(tree, tokens, True)
            assert tokens - tree.prompt - 2 <= len(batch) <= tokens
            assert batch.longest <= tree.prompt + tree.length
    assert len(_batch(Tree(0, 1, 100), 64, True)) == 100


def test_a_model_that_cannot_be_measured_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Activations(tiny_model().config, needs(ROWS, 64), torch.float32, CPU)
    monkeypatch.setattr(Activations, "_runner", lambda *_: 1 / 0)
    assert plan.bytes(64, False) == 0 and "ZeroDivisionError" in plan.unknown
    left_open = MemoryNeeds(OptimizerConfig(), 0, 64, ROWS)
    assert micro_batch(left_open, EngineConfig(), plan, {}, 1e12) == (64, False)


def test_weights_of_a_model_larger_than_this_host_take_no_memory() -> None:
    """They are never written: neither drawn, nor read by the check of the model."""
    config = tiny_model().config
    config.vocab_size, config.hidden_size, config.tie_word_embeddings = 1_000_000, 512, False
    before = resident_bytes()
    runner = Activations(config, needs(ROWS, 64), torch.float32, CPU)._runner(2, False)
    weights = sum(p.nbytes for p in runner.model.parameters())
    assert resident_bytes() - before < 0.1 * weights and weights > 4e9
