"""The reward model: packed and padded training are the same, loss and gradient; pairs that are too
long are named or left out before the first step.
"""

import json
from pathlib import Path

import pytest
import torch

from gearshift.cli.main import main
from gearshift.models.classifier import padded_scores
from gearshift.models.load import load_classifier
from gearshift.models.runner import ModelRunner
from gearshift.trainers.reward_model import Pair, micro_batches, score_pairs
from tests.trainers.rl_runs import TINY

PAIRS = [
    Pair([5, 6, 7, 8, 9], [5, 6, 7, 11]),
    Pair([20, 21, 22], [20, 21, 22, 23, 24]),  # one side is the other's beginning
    Pair([30, 31], [40, 41, 42]),  # nothing in common
]


@pytest.mark.parametrize("micro_batch_tokens", [4096, 8])
def test_packed_scores_are_padded_scores(micro_batch_tokens: int) -> None:
    model, plain = load_classifier(TINY), load_classifier(TINY)
    plain.config.pad_token_id = 0
    runner = ModelRunner(model)
    assert runner.form == "described"
    weights = {id(p): float(i + 1) for i, p in enumerate(PAIRS)}
    micros = micro_batches(runner, PAIRS, micro_batch_tokens)
    assert sorted(id(p) for m in micros for p in m) == sorted(weights)
    assert len(micros) > 1 or micro_batch_tokens > 8
    for micro in micros:
        scores = score_pairs(runner, micro)
        padded = padded_scores(plain, [side for pair in micro for side in pair.sides])
        assert torch.allclose(scores, padded, atol=1e-5)
        factor = torch.tensor([weights[id(p)] * s for p in micro for s in (1.0, -0.5)])
        (scores * factor).sum().backward()
        (padded * factor).sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


@pytest.mark.parametrize("stage", ["reward", "process", "dpo", "sft"])
@pytest.mark.parametrize("where", ["data", "heldout"])
def test_rows_longer_than_the_model_takes(
    stage: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model takes 512 tokens; the stage's own `max_length`, 1024, does not help."""
    if (stage, where) == ("sft", "heldout"):
        pytest.skip("it has no held-out rows")
    for name in ("data", "heldout"):
        long = "x" * 500 if name == where else "x"
        rows = [
            {
                "reward": {"prompt": "a", "chosen": text, "rejected": "c"},
                "dpo": {"prompt": "a", "chosen": text, "rejected": "c"},
                "process": {"prompt": "a", "completions": [text], "labels": [True]},
                "sft": {"prompt": "a", "completion": text},
            }[stage]
            for text in ("b", "bb", long, "bbb")
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"dpo": "preference"}.get(stage, stage)
    data = {"sources": [{"path": str(tmp_path / "data.jsonl")}]}
    held = {"sources": [{"path": str(tmp_path / "heldout.jsonl")}]}
    recipe = {
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu"},
        section: {"data": data, "batch_size": 2} | ({"heldout": held} if stage != "sft" else {}),
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = [stage, str(tmp_path / "r.yaml"), f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr().err
    assert f"{where}.jsonl, line 3: it has 5" in printed and "the 512 of the model" in printed
    assert not (tmp_path / "run" / section / "metrics.jsonl").exists()
    main([*words, f"{section}.{where}.overlong=drop", f"run.dir={tmp_path / 'other'}"])
    assert "1 of 4 rows left out, too long" in capsys.readouterr().out
    assert (tmp_path / "other" / section / "done.json").exists()
