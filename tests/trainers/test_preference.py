"""Preference learning: the packed losses are those of plain sequences; it learns; what the
reference thinks does not depend on when it is asked.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.algorithms import preference_losses as losses
from gearshift.data import Mixture, PreferenceExample, UnpairedExample, to_stepwise, to_unpaired
from gearshift.engine import Engine
from gearshift.errors import ConfigError, DataError
from gearshift.models.load import load_classifier, load_policy
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.config import load
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.judged import Judged, render_judged
from gearshift.trainers.preference import PreferenceConfig, PreferenceLoss, train_preference
from gearshift.trainers.process_reward_model import (
    ProcessRewardConfig,
    render_steps,
    step_accuracy,
    train_process_reward_model,
)
from gearshift.trainers.stage import Stage
from tests.trainers.rl_runs import TINY

WORDS = ("apple", "river", "stone", "cloud", "light", "grass")


def pairs(count: int = 24) -> list[PreferenceExample]:
    """Answers that shout are better."""
    return [
        PreferenceExample(
            [{"role": "user", "content": f"say {WORDS[i % 6]} {i}"}],
            WORDS[(i + 1) % 6].upper(), WORDS[(i + 1) % 6],
        )
        for i in range(count)
    ]  # fmt: skip


def single(count: int = 24) -> list[UnpairedExample]:
    return [
        UnpairedExample(p.prompt, p.chosen if i % 3 else p.rejected, i % 3 > 0)
        for i, p in enumerate(pairs(count))
    ]


def settings(loss: str, **changes: Any) -> PreferenceConfig:
    return PreferenceConfig.model_validate(
        {"loss": loss, "batch_size": 8, "save_every": 0, "beta": 0.5, **changes}
    )


def moved_engine() -> Engine:
    """A policy that has left its reference, the tiny model."""
    model = tiny_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.std() * torch.randn_like(p)
    return Engine(model, tiny_tokenizer())


def slow_logprobs(model: Any, row: Judged, ids: list[int]) -> Tensor:
    """[A] of one completion, by the plain model on one padded-to-nothing sequence."""
    both = torch.tensor([[*row.prompt, *ids]])
    logprobs = model(both).logits[0, :-1].log_softmax(-1)
    start = len(row.prompt) - 1
    return logprobs[range(start, start + len(ids)), ids]


def slow_loss(config: PreferenceConfig, policy: Any, reference: Any, rows: list[Judged]) -> Tensor:
    """One sequence at a time."""
    total = torch.zeros(())
    known = [[float(slow_logprobs(reference, r, c).sum()) for c in r.completions] for r in rows]
    own = [[slow_logprobs(policy, r, c) for c in r.completions] for r in rows]
    if config.loss == "kto":
        z0 = torch.stack([
            slow_logprobs(policy, r, r.other).sum() - slow_logprobs(reference, r, r.other).sum()
            for r in rows
        ]).mean().clamp(min=0).detach()  # fmt: skip
        flat = [
            (lp.sum() - k, g)
            for lps, ks, r in zip(own, known, rows, strict=True)
            for lp, k, g in zip(lps, ks, r.good, strict=True)
        ]
        for ratio, good in flat:
            total = total + losses.kto(ratio[None], torch.tensor([good]), z0, config.beta).sum()
        return total / len(flat)
    for (c, r), (ck, rk) in zip(own, known, strict=True):
        if config.loss == "dpo":
            one = losses.dpo(c.sum() - ck, r.sum() - rk, config.beta, config.label_smoothing)
        elif config.loss == "ipo":
            one = losses.ipo(c.sum() - ck, r.sum() - rk, config.beta)
        elif config.loss == "orpo":
            one = losses.orpo(c.mean(), r.mean(), config.beta) - c.mean()
        else:
            one = losses.simpo(c.mean(), r.mean(), config.beta, config.margin)
        total = total + one
    return total / len(rows)


@pytest.mark.parametrize("micro_batch_tokens", [4096, 60])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_packed_is_one_by_one(loss: str, micro_batch_tokens: int) -> None:
    """Loss and gradient, in one micro-batch and in many."""
    own = {"dpo": {"label_smoothing": 0.1}, "simpo": {"margin": 0.3}}.get(loss, {})
    config = settings(loss, micro_batch_tokens=micro_batch_tokens, **own)
    engine, reference = moved_engine(), load_policy(TINY)
    examples = single(8) if loss == "kto" else pairs(8)
    rows = render_judged(examples, engine.tokenizer, 512)
    trainer = PreferenceLoss(config, engine, ModelRunner(reference))
    trainer.ask_reference(rows)
    with engine.training():
        baseline = trainer.kl(rows) if loss == "kto" else torch.zeros(())
        ours = 0.0
        for micro in trainer.micros(rows, micro_batch_tokens):
            part, _ = trainer.loss_of(micro, rows, baseline)
            part.backward()
            ours += float(part)
    found = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
    engine.model.zero_grad()
    plain = moved_engine().model
    plain.set_attn_implementation("eager")
    reference.set_attn_implementation("eager")
    slow = slow_loss(config, plain, reference, rows)
    slow.backward()
    wanted = [p.grad for p in plain.parameters() if p.grad is not None]
    assert ours == pytest.approx(float(slow), rel=1e-4)
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (found, wanted))
    assert (a - b).norm() <= 1e-4 * b.norm()


def run(tmp_path: Path, loss: str, examples: Any, **changes: Any) -> tuple[Any, list[Judged]]:
    engine = Engine(tiny_model(), tiny_tokenizer())
    changes = {"optimizer": {"lr": 5e-3}, "epochs": 8, **changes}
    config = settings(loss, **changes)
    rows = render_judged(examples, engine.tokenizer, 512)
    each_step = config.reference == "each_step"
    reference = ModelRunner(load_policy(TINY)) if each_step else None
    mixture = Mixture([rows], [1.0], seed=0)
    stage = Stage("preference", tmp_path, config.steps(len(rows)), 0, config)
    train_preference(config, engine, mixture, stage, reference)
    return PreferenceLoss(config, engine, reference), rows


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_it_learns_what_is_preferred(tmp_path: Path, loss: str) -> None:
    beta = 0.1 if loss == "ipo" else 0.5  # its margin to reach is 1 / (2 beta)
    trainer, _ = run(tmp_path, loss, single() if loss == "kto" else pairs(), beta=beta)
    heldout = render_judged(pairs(36)[24:], trainer.engine.tokenizer, 512)
    before = PreferenceLoss(trainer.config, Engine(tiny_model(), tiny_tokenizer()))
    before.precompute(heldout)
    assert trainer.accuracy(heldout) > 0.9
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"]


def test_the_first_loss_of_dpo_is_a_coin(tmp_path: Path) -> None:
    run(tmp_path, "dpo", pairs(8), epochs=1)
    [first] = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_it_does_not_matter_when_the_reference_is_asked(tmp_path: Path, loss: str) -> None:
    ends = []
    for reference in ("precompute", "each_step"):
        trainer, _ = run(tmp_path / reference, loss, pairs(16), reference=reference, epochs=2)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.engine.model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-3 * ends[0].norm()


def test_rows_and_what_is_wrong_with_them() -> None:
    good = to_unpaired({"prompt": "q", "completion": "a", "label": True})
    assert isinstance(good, UnpairedExample) and good.good and good.completion == "a"
    pair = to_unpaired({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2})
    assert isinstance(pair, PreferenceExample) and pair.margin == 2.0
    steps = to_stepwise({"prompt": "q", "completions": ["1", "2"], "labels": [True, False]})
    assert steps.steps == ["1", "2"] and steps.labels == [True, False]
    for convert, row, said in (
        (to_unpaired, {"prompt": "q", "completion": "a", "label": "yes"}, "`label` is 'yes'"),
        (to_unpaired, {"prompt": "q", "label": True}, "accepted are: prompt, completion and label"),
        (to_unpaired, {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, "`margin`"),
        (to_stepwise, {"prompt": "q", "completions": ["1"], "labels": []}, "the same length"),
        (to_stepwise, {"prompt": "q", "completions": ["1"], "labels": [3]}, "true or false"),
    ):
        with pytest.raises(DataError, match=said):
            convert(row)  # type: ignore[operator]


def test_too_long_a_row_is_told() -> None:
    with pytest.raises(DataError, match=r"Row 1: .* over max_length=8"):
        render_judged(pairs(1), tiny_tokenizer(), 8)


def test_a_process_model_learns_which_steps_are_right(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    examples = [
        to_stepwise({
            "prompt": f"count {i}",
            "completions": [f"{i} is even" if (i + k) % 2 else f"{i} is ODD" for k in range(3)],
            "labels": [bool((i + k) % 2) for k in range(3)],
        })
        for i in range(40)
    ]  # fmt: skip
    config = ProcessRewardConfig.model_validate(
        {"epochs": 6, "batch_size": 8, "save_every": 0, "optimizer": {"lr": 3e-3}}
    )
    rows = render_steps(examples, tokenizer, config.separator, 256)
    for row in rows:
        assert len(row.ends) == 3 and row.ends[-1] == len(row.ids) - 1
        assert all(tokenizer.decode([row.ids[e]]) == "\n" for e in row.ends)
    runner = ModelRunner(load_classifier(TINY, of_tokens=True), undescribed=OF_TOKENS)
    stage = Stage("process", tmp_path, config.steps(32), 0, config)
    train_process_reward_model(config, runner, Mixture([rows[:32]], [1.0], seed=0), stage)
    assert step_accuracy(runner, rows[32:]) > 0.9


def test_kto_needs_more_than_one_row() -> None:
    with pytest.raises(ConfigError, match="batch_size must be 2"):
        load(PreferenceConfig, None, ["loss=kto", "batch_size=1"])
