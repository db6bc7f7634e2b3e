"""lm-evaluation-harness reads every output folder, and computes the log-likelihoods that we do.

Runs where `lm-eval` is installed (`pip install 'lm-eval[hf]'`); it is no part of the development
extra.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from gearshift.cli.main import main

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: home
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{request}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
ROWS = [
    {"request": "turn on the light", "choices": ["on", "off"], "label": 0},
    {"request": "close the door", "choices": ["open", "closed"], "label": 1},
]


def test_every_stage_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    run, tasks = tmp_path / "run", tmp_path / "tasks"
    recipe = str(Path(__file__).parent / "tiny.yaml")
    main(["run", recipe, f"run.dir={run}", "reward=null"])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tasks.mkdir()
    rows = tasks / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tasks / "home.yaml").write_text(TASK.format(rows=rows))
    for stage in ("sft", "rl"):
        done = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(run / stage), "dtype": "float32"},
            tasks=["home"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            device="cpu",
            log_samples=True,
        )
        assert 0 <= done["results"]["home"]["acc,none"] <= 1
        [sample, _] = sorted(done["samples"]["home"], key=lambda s: s["doc_id"])
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        ours = [loglikelihood(run / stage, ROWS[0]["request"], f" {c}") for c in ("on", "off")]
        assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(theirs, ours, strict=True))


@torch.no_grad()
def loglikelihood(folder: Path, text: str, after: str) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    begun = tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([[*begun, *tokenizer.encode(after, add_special_tokens=False)]])
    logprobs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[0, i]]) for i in range(len(begun), ids.shape[1]))
