"""The whole recipe on the tiny model: what it writes, and that a second run does nothing again."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gearshift.cli.main import main
from gearshift.models.load import ModelConfig, load_policy

RECIPE = str(Path(__file__).parent / "tiny.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    main(["run", RECIPE, f"run.dir={folder}"])
    return folder


def test_summary_has_what_is_promised(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["heldout"]) == {"base", "sft", "rl"}
    assert all(0 <= x <= 1 for x in summary["heldout"].values())
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    assert {"data", "sft", "reward", "rl", "heldout_rl"} <= set(summary["seconds"])
    assert 0 < summary["engine"]["logprob_gap"] <= 1e-5
    assert summary["engine"]["dtype"] == "float32"
    assert summary["heldout_detail"]["rl"]["episodes"] == 12
    assert 1 < summary["heldout_detail"]["rl"]["n"] <= 12
    low, high = summary["heldout_detail"]["rl"]["interval"]
    assert low <= summary["heldout"]["rl"] <= high
    compared = [(c["before"], c["after"]) for c in summary["heldout_compared"]]
    assert compared == [("base", "sft"), ("sft", "rl"), ("base", "rl")]


def test_every_stage_loads_with_transformers(run: Path) -> None:
    for stage in ("sft", "rl"):
        AutoModelForCausalLM.from_pretrained(run / stage)
        assert AutoTokenizer.from_pretrained(run / stage).chat_template
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id != AutoTokenizer.from_pretrained(run / "reward").eos_token_id
    assert not list(run.rglob("*.bin")) and not list(run.rglob("*.pt"))


def test_metrics_have_their_names(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    wanted = {"reward", "entropy", "completions/mean_length", "grad_norm", "seconds/generate"}
    assert wanted <= set(rows[0])
    for name in rows[0]:
        base = name.replace("rewards/environment", "rewards/NAME")
        parts = [base, f"/{base.rsplit('/', 1)[-1]}"]
        assert any(f"`{part}`" in documented for part in parts), f"{name} is not in docs/metrics.md"
    episodes = [json.loads(x) for x in (run / "rl" / "rollouts.jsonl").read_text().splitlines()]
    assert len(episodes[0]["episodes"]) == 4


def test_report_shows_the_run(run: Path) -> None:
    html = (run / "report.html").read_text()
    assert html.count("<svg") >= 3
    assert "http://" not in html.replace("http://www.w3.org", "") or "src=" not in html


def test_a_second_run_trains_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "rl" / "model.safetensors").stat().st_mtime_ns
    main(["run", RECIPE, f"run.dir={run}"])
    assert (run / "rl" / "model.safetensors").stat().st_mtime_ns == before
    assert "done before" in capsys.readouterr().out


def test_it_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "8", "--temperature", "1"]
    main(["generate", str(run), "turn on the light", *options])
    first = capsys.readouterr().out
    main(["generate", str(run / "rl"), "turn on the light", *options])
    assert first == capsys.readouterr().out and first.strip()


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", RECIPE, f"run.dir={tmp_path / 'none'}", "--dry-run"])
    out = capsys.readouterr().out
    assert "GiB  total" in out and "rl: 3 steps of 2 prompts x 2 completions" in out
    assert not (tmp_path / "none").exists()


def test_the_reward_model_can_be_the_reward(run: Path, tmp_path: Path) -> None:
    """A second recipe: the proxy alone is optimised, and the verifier's score is still logged."""
    folder = tmp_path / "proxy"
    main([
        "run", RECIPE, f"run.dir={folder}", "sft=null", "reward=null", "rl.advantage.name=rloo",
        f"rl.rewards=[{{source: 'model:{run / 'reward'}'}}]",
    ])  # fmt: skip
    rows = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/model/mean"])
        assert "rewards/environment/mean" in row


def test_a_recipe_with_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["run", RECIPE, f"run.dir={folder}", "reward=null", "model.lora.rank=4", "rl.kl.beta=0.1"])
    for stage in ("sft", "rl"):
        assert (folder / stage / "adapter" / "adapter_model.safetensors").exists()
        AutoModelForCausalLM.from_pretrained(folder / stage)
    first = json.loads((folder / "rl" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) <= 1e-6  # the reference is the policy before its adapter learns
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["engine"]["logprob_gap"] <= 1e-5


def test_preferences_in_place_of_reinforcement_learning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    pairs = "preference.data.sources=[{path: 'task:pairs'}]"
    heldout = "preference.heldout.sources=[{path: 'task:pairs_heldout'}]"
    main(["run", RECIPE, f"run.dir={folder}", "algorithm=dpo", "reward=null", pairs, heldout])
    done = json.loads((folder / "preference" / "done.json").read_text())
    assert 0 <= done["accuracy"] <= 1 and done["rows"] == 12
    AutoModelForCausalLM.from_pretrained(folder / "preference")
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["heldout"]) == {"base", "sft", "preference"}
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    first = json.loads((folder / "preference" / "metrics.jsonl").read_text().splitlines()[0])
    assert all(f"/{n.rsplit('/', 1)[-1]}`" in documented for n in first if n.startswith("rewards/"))
    capsys.readouterr()
    main(["generate", str(folder), "turn on the light", "--max-new-tokens", "4"])
    assert capsys.readouterr().out


def test_ppo_as_deepspeed_chat_runs_it(run: Path, tmp_path: Path) -> None:
    """A critic from the reward model, several mini-batches, ptx, and the policy's average."""
    folder = tmp_path / "ppo"
    main([
        "run", RECIPE, f"run.dir={folder}", "algorithm=ppo", "rl.value.init_from=reward",
        "rl.rewards=[{source: model, normalize: true}]", "rl.update={minibatches: 2, ema: 0.9}",
        "rl.kl.beta=0.1", "rl.sft_mix.data.sources=[{path: 'task:labelled'}]",
    ])  # fmt: skip
    first = json.loads((folder / "rl" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"value/loss", "clip_ratio/region_mean", "sft_mix/loss", "kl"} <= set(first)
    policy = AutoModelForCausalLM.from_pretrained(folder / "rl").state_dict()
    average = AutoModelForCausalLM.from_pretrained(folder / "rl" / "ema").state_dict()
    assert any(not policy[k].equal(average[k]) for k in policy)


def test_a_run_and_a_model_are_evaluated_on_a_recipe(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["eval", str(run)])
    out = capsys.readouterr().out
    assert "sft -> rl:" in out and "95%" in out and "rows better" in out
    main(["eval", str(run), "--recipe", RECIPE, "eval.limit=5"])
    there = (run / "eval" / "tiny" / "validation").glob("*.json")
    records = {p.stem: json.loads(p.read_text()) for p in there}
    assert set(records) == {"base", "sft", "rl"} and records["rl"]["episodes"] == 5
    own = json.loads((run / "validation" / "rl.json").read_text())
    assert records["rl"]["samples"] == own["samples"][:5], "the split is the run's"
    main(["eval", str(run / "rl"), "--recipe", RECIPE, "eval.limit=5", f"run.dir={run}/alone"])
    alone = json.loads((run / "alone" / "eval" / "alone" / "validation" / "rl.json").read_text())
    assert alone["samples"] == records["rl"]["samples"]
    for words, named in (
        (["eval", str(run / "rl")], "--recipe"),
        (["eval", str(run), "eval.limit=2"], "--recipe"),
        (["eval", str(run), "--recipe", RECIPE, "eval.limit=6"], "another recipe"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert named in capsys.readouterr().err


def test_perplexity_of_what_was_answered(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["run", RECIPE, f"run.dir={folder}", "reward=null", "eval.perplexity=true"])
    detail = json.loads((folder / "summary.json").read_text())["heldout_detail"]
    assert all(1 < row["perplexity"] < 1e4 for row in detail.values())
    # Under the policy that wrote them greedily, its own answers are the likeliest.
    assert detail["sft"]["perplexity"] <= detail["base"]["perplexity"]


def test_stages_and_commands_take_an_adapters_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [RECIPE, f"run.dir={tmp_path / 'run'}", "model.lora={rank: 2, save: adapter}"]
    words += ["rl=null", "eval.limit=2"]
    for command in ("sft", "reward"):
        main([command, *words])
    sft, reward = tmp_path / "run" / "sft", tmp_path / "run" / "reward"
    assert (sft / "adapter_model.safetensors").exists() and not (sft / "config.json").exists()
    assert not list(reward.glob("adapter*"))
    trained = AutoModelForSequenceClassification.from_pretrained(reward).base_model.state_dict()
    start = load_policy(ModelConfig(dtype="float32", device="cpu"), str(sft)).base_model
    moved = [not torch.equal(t, trained[name]) for name, t in start.state_dict().items()]
    assert all(moved)  # all of it was trained, from the policy on
    assert all((t - trained[name]).abs().max() < 0.01 for name, t in start.state_dict().items())
    for folder in (tmp_path / "run", sft):
        main(["generate", str(folder), "Hello", "--max-new-tokens", "2"])
    other = [RECIPE, f"run.dir={tmp_path / 'other'}", f"model.name={sft}", "sft=null"]
    other += ["reward=null", "eval.limit=2", "rl.steps=1", f"rl.kl={{beta: 0.1, reference: {sft}}}"]
    main(["run", *other, "--dry-run"])
    main(["run", *other])
    [first] = (tmp_path / "other" / "rl" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(first)["kl"]) <= 1e-6
    capsys.readouterr()
