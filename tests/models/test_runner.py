"""One runner for every role: its two forms give the same, and it knows which it has, and why."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from gearshift.batch import pack_groups
from gearshift.errors import CapacityError, DataError, GearshiftError
from gearshift.models.attention import ATTENTION
from gearshift.models.classifier import leaves, whole_sequences
from gearshift.models.heads import ValueHead
from gearshift.models.runner import EXACT, ModelRunner
from tests.models.families import random_model, small_config
from tests.zoo import CONFIGS, FAMILIES
from tests.zoo import random_model as zoo_model

BATCH = pack_groups([
    ([5, 6, 7, 8], [([9, 10, 11], [1, 1, 0]), ([12], [1])]),
    ([20] * 11, [([21, 22], [1, 1])]),
])  # fmt: skip
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 12], [*[20] * 11, 21, 22]]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_give_the_same(family: str) -> None:
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight)
    ours = ModelRunner(zoo_model(family), value_head=head)
    theirs = ModelRunner(zoo_model(family), value_head=head, undescribed="it is compared")
    assert (ours.form, theirs.form) == ("described", "hugging_face")
    for name in ("hidden", "values"):
        pair = [getattr(runner, name)(BATCH) for runner in (ours, theirs)]
        assert torch.allclose(*pair, atol=1e-4), name
    for a, b in zip(*(r.logprobs(BATCH, 0.7, head) for r in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def classifier() -> Any:
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForSequenceClassification.from_config(config).eval()


def test_scores_are_those_of_each_whole_sequence() -> None:
    assert leaves(BATCH) == [1, 2, 4] and whole_sequences(BATCH) == SEQUENCES
    ours, theirs = ModelRunner(classifier()), ModelRunner(classifier(), undescribed=EXACT)
    assert ours.shares_prompts and not theirs.shares_prompts
    model = classifier()
    with torch.no_grad():
        wanted = [float(model(torch.tensor([ids])).logits) for ids in SEQUENCES]
        for runner in (ours, theirs):
            assert runner.scores(BATCH).tolist() == pytest.approx(wanted, abs=1e-5)
            assert runner.score_all(SEQUENCES) == pytest.approx(wanted, abs=1e-5)
            assert runner.score_all(SEQUENCES, 8) == pytest.approx(wanted, abs=1e-5)
    assert ours.score_all([]) == []


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("mixtral", {}, "its family (mixtral) is not described"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu' is not described"),
        ("opt", {"do_layer_norm_before": False}, "a norm after each layer is not described"),
    ],
)
def test_a_runner_says_why_it_is_not_described(
    kind: str, options: dict[str, Any], why: str
) -> None:
    model = random_model(small_config(kind, **options))
    model.set_attn_implementation(ATTENTION)
    runner = ModelRunner(model)
    assert runner.form == "hugging_face" and runner.why is not None and why in runner.why
    line = runner.form_line("critic")
    assert line.startswith("critic: Hugging Face's modules, about 2 times slower, because ")
    assert why in line and "\n" not in line
    assert runner.logprobs(BATCH).logprobs.isfinite().all()


def test_a_described_runner_says_so() -> None:
    runner = ModelRunner(zoo_model("llama"))
    assert runner.why is None
    assert runner.form_line("policy") == "policy: described layers (llama)"


def test_dropout_runs_through_hugging_faces_modules() -> None:
    model = zoo_model("gpt2")
    runner = ModelRunner(model)
    assert "where its dropout is on" in runner.form_line("policy")
    quiet = runner.hidden(BATCH)
    assert torch.equal(runner.hidden(BATCH), quiet)
    model.train()
    assert not torch.equal(runner.hidden(BATCH), runner.hidden(BATCH))
    runner.recompute = True
    with pytest.raises(GearshiftError, match=r"engine\.recompute is built for described"):
        runner.hidden(BATCH)


@pytest.mark.parametrize("undescribed", [None, "it is compared"])
def test_a_token_that_the_model_lacks_is_refused(undescribed: str | None) -> None:
    runner = ModelRunner(zoo_model("llama"), undescribed=undescribed)
    with pytest.raises(DataError, match="the token 259 and the model 259 tokens"):
        runner.hidden(pack_groups([([5, 259], [([6], [1])])]))


def test_a_sequence_that_a_classifier_cannot_read_is_refused() -> None:
    model = classifier()
    model.config.max_position_embeddings = 12
    runner = ModelRunner(model, undescribed=EXACT)
    with pytest.raises(CapacityError, match="13 tokens is longer"):
        runner.scores(BATCH)
