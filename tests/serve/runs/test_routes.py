"""The routes of the run page read the files of a run as they are: while it runs, after it, of older
versions, torn or hostile.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gearshift.cli.main import main
from gearshift.runtime.curves import Columns
from gearshift.runtime.metrics import MetricsLog
from gearshift.serve.app import ServerSettings, make_app
from gearshift.serve.runs.episodes import Filter, by_token
from gearshift.serve.runs.files import RolloutFile
from gearshift.serve.runs.marks import marks
from gearshift.serve.runs.routes import _tail, names_of, run_routes
from tests.trainers.rl_runs import small, trainer

RESET = 'data: {"reset": true}'
HOSTILE = "</script><script>alert(1)</script> \u202e \ud800 \x1b[31m \x00"


def episode(i: int, **more: Any) -> dict[str, Any]:
    return {
        "group_id": i // 2,
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ],
        "token_ids": [5, 6, 7],
        "reward": i / 10,
        "finish_reason": "stop" if i % 2 else "length",
        **more,
    }


FULL = {
    "prompt_ids": [1, 2],
    "prompt_length": 2,
    "mask": [1, 0, 1],
    "logprobs": [-0.5, -0.25],
    "trained_logprobs": [-0.5, -0.75],
    "advantages": 0.5,
    "versions": [3, 4],
    "rewards": {"environment": 0.1, "style": None},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of five steps of four episodes, and an older one beside it."""
    for name in ("new", "old"):
        metrics = MetricsLog(tmp_path / name / "rl" / "metrics.jsonl")
        rollouts = MetricsLog(tmp_path / name / "rl" / "rollouts.jsonl")
        (tmp_path / name / "rl").mkdir(parents=True)
        for step in range(5):
            record: dict[str, Any] = {"reward": step / 10, "kl": float("nan"), "odd/name": 1.0}
            record |= {"seconds/generate": 1.0, "seconds/train": 0.5, "step_time": 2.0}
            if name == "new":
                record["phases"] = [["generate", 0.1, 1.1], ["train", 1.2, 1.7]]
            metrics.append(step, record)
            more = FULL if name == "new" else {}
            line: dict[str, Any] = {"episodes": [episode(4 * step + i, **more) for i in range(4)]}
            if name == "new":
                line["left_out"] = [{"group_id": 9, "left_out": "environment", "why": "it fell"}]
            rollouts.append(step, line)
    (tmp_path / "new" / "recipe.yaml").write_text("rl: {steps: 5, kl: {beta: 0.1}}\nrun: {dir: a}")
    (tmp_path / "old" / "recipe.yaml").write_text("rl: {steps: 5, kl: {beta: 0}}\nrun: {dir: b}")
    return tmp_path


@pytest.fixture
def client(run: Path) -> Iterator[TestClient]:
    routes = run_routes({name: run / name for name in ("new", "old")})
    with TestClient(make_app(routes, ServerSettings()), base_url="http://127.0.0.1:8000") as found:
        yield found


def test_runs_and_their_stages_are_listed(client: TestClient) -> None:
    found = client.get("/api/runs").json()
    assert [run["name"] for run in found["runs"]] == ["new", "old"]
    assert [s["name"] for s in found["runs"][0]["stages"]] == ["rl"]
    assert found["curves"][0][0] == "Reward"
    differences = client.get("/api/runs-differences").json()
    assert differences["keys"] == [{"key": "rl.kl.beta", "values": ["0.1", "0"]}]


def test_t25_no_answer_has_a_path_of_the_machine(client: TestClient, run: Path) -> None:
    for name in ("new", "old"):
        text = f"run: {{dir: {run}/{name}}}\nmodel: {{name: {run}/{name}/base-{name}}}"
        (run / name / "recipe.yaml").write_text(text)
    found = client.get("/api/runs-differences")
    assert found.json()["keys"][0]["values"] == ['"…/base-new"', '"…/base-old"']
    paths = ("runs", "runs/new/metrics", "runs/new/rollouts", "runs/no/metrics", "runs/new/heldout")
    for answer in (found, *(client.get(f"/api/{path}") for path in paths)):
        assert str(run) not in answer.text


def test_metrics_are_columns_with_gaps(client: TestClient, run: Path) -> None:
    with (run / "new" / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward": NaN, "kl": 0.5}\n[1]\nno json\n{"step": 6, "rew')
    found = client.get("/api/runs/new/metrics").json()
    assert found["columns"]["step"] == [0, 1, 2, 3, 4, 5]
    assert found["columns"]["reward"] == [0.0, 0.1, 0.2, 0.3, 0.4, None]
    assert found["columns"]["kl"] == [None] * 5 + [0.5]
    assert "odd/name" in found["names"] and "odd/name" not in found["columns"]
    more = client.get("/api/runs/new/metrics", params={"keys": "odd/*"}).json()
    assert list(more["columns"]) == ["step", "odd/name"]


@pytest.mark.parametrize("name", ["new", "old"])
def test_phases_of_a_step(client: TestClient, name: str) -> None:
    """An older run has seconds alone."""
    steps = client.get(f"/api/runs/{name}/phases").json()["steps"]
    new = [["generate", 0.1, 1.1], ["train", 1.2, 1.7]]
    old = [["generate", 0.0, 1.0], ["train", 1.0, 1.5]]
    assert len(steps) == 5 and steps[0]["phases"] == (new if name == "new" else old)


def test_a_step_s_table_and_an_episode_with_all_its_figures(client: TestClient) -> None:
    rows = client.get("/api/runs/new/rollouts", params={"step": 2}).json()["rows"]
    assert [row["reward"] for row in rows] == [0.8, 0.9, 1.0, 1.1, None]
    assert rows[0]["length"] == 2 and rows[0]["advantage"] == 0.5 and rows[0]["version"] == 3
    assert rows[4]["left_out"] == "environment" and rows[4]["answer"] == "it fell"
    found = client.get("/api/runs/new/episode", params={"step": 2, "episode": 1}).json()
    assert found["record"]["messages"][0]["content"] == "question 9"
    assert found["tokens"] == {
        "ids": [1, 2, 5, 6, 7],
        "mask": [0, 0, 1, 0, 1],
        "logprobs": [None, None, -0.5, None, -0.25],
        "trained_logprobs": [None, None, -0.5, None, -0.75],
        "advantages": [None, None, 0.5, None, 0.5],
        "versions": [None, None, 3, None, 4],
    }
    old = client.get("/api/runs/old/episode", params={"step": 2, "episode": 1}).json()
    assert old["tokens"] == {"ids": [5, 6, 7], "mask": [1, 1, 1]} and old["pieces"] is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", 25),
        ("reward<0.2", 2),
        ("reward<0.2 finish=length", 1),
        ('text~"question 1"', 11),
        ("ANSWER length=2 reward>=1.8", 2),
        ("left_out=environment", 5),
        ("left_out=none group!=0", 18),
        ("rewards.environment=0.1 rewards.style=none", 20),
        ("fell", 5),
        ("unknown=3", 0),
    ],
)
def test_filters_search_the_whole_run(client: TestClient, text: str, found: int) -> None:
    answer = client.get("/api/runs/new/rollouts", params={"filter": text}).json()
    assert (len(answer["rows"]), answer["next"], answer["share"]) == (found, None, 1.0)
    lines = client.get("/api/runs/new/export", params={"filter": text}).text.splitlines()
    assert len(lines) == found


def test_a_filter_that_is_not_clear_is_one_line(client: TestClient) -> None:
    for text in ("reward<", "reward<high", 'text~"open'):
        answer = client.get("/api/runs/new/rollouts", params={"filter": text})
        assert answer.status_code == 400 and answer.json()["error"]["param"] in ("filter", None)


def test_a_selection_is_exported(client: TestClient) -> None:
    params = [("pick", "1.0"), ("pick", "3.2")]
    lines = client.get("/api/runs/new/export", params=params).text.splitlines()
    assert [json.loads(x)["messages"][0]["content"] for x in lines] == ["question 4", "question 14"]


@pytest.mark.parametrize(
    "path",
    [
        "..", "%2e%2e", "..%2f..%2fetc", "%2fetc", "new%00", "other", "new%2f..", "NEW",
        "link",
    ],
)  # fmt: skip
def test_t24_only_runs_that_were_named_are_read(client: TestClient, path: str, run: Path) -> None:
    os.symlink("/etc", run / "link")
    for rest in ("metrics", "live", "rollouts", "episode", "heldout", "phases"):
        assert client.get(f"/api/runs/{path}/{rest}").status_code == 404


@pytest.mark.parametrize("stage", ["..", "../old/rl", "/etc", "rl/..", "out", "rl\0", "."])
def test_t24_only_stages_inside_the_run_are_read(client: TestClient, stage: str, run: Path) -> None:
    outside = run / "outside"
    outside.mkdir()
    (outside / "metrics.jsonl").write_text('{"step": 0, "secret": 1}\n')
    os.symlink(outside, run / "new" / "out")
    os.symlink(outside / "metrics.jsonl", run / "new" / "rl" / "rollouts.jsonl.x")
    for rest in ("metrics", "live", "rollouts", "phases", "export"):
        answer = client.get(f"/api/runs/new/{rest}", params={"stage": stage})
        assert answer.status_code == 404, rest


def test_a_folder_that_links_outside_gives_no_records(client: TestClient, run: Path) -> None:
    secret = run / "secret.json"
    secret.write_text(json.dumps({"metric": "secret", "samples": []}))
    (run / "new" / "validation").mkdir()
    os.symlink(secret, run / "new" / "validation" / "base.json")
    assert "secret" not in client.get("/api/runs/new/heldout").text


def test_t62_hostile_texts_come_as_texts(client: TestClient, run: Path) -> None:
    messages = [{"role": "user", "content": HOSTILE + "x" * (1 << 20)}]
    line = {"step": 5, "episodes": [episode(0, messages=messages, gold=HOSTILE)]}
    with (run / "new" / "rl" / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    found = client.get("/api/runs/new/episode", params={"step": 5, "episode": 0}).json()
    assert found["record"]["messages"][0]["content"].startswith(HOSTILE)
    rows = client.get("/api/runs/new/rollouts", params={"step": 5}).json()["rows"]
    assert len(rows[0]["prompt"]) < 200 and rows[0]["gold"] == HOSTILE
    assert client.get("/api/runs/new/rollouts", params={"filter": '"</script>"'}).json()["rows"]


def test_t63_files_that_are_torn_or_strange_show_what_they_have(run: Path) -> None:
    lines = [
        b'{"step": 0, "episodes": [{"reward": NaN, "token_ids": "x", "mask": "y"}, 7]}\n',
        b'{"episodes": [{"reward": 1}]}\n',
        b"\xff\xfe\n",
        b'{"step": 3, "episodes": null, "left_out": {}}\n',
        b'{"step": 4, "episodes": [{"messages": [1, {"role": 2}], "rewards": 5}]}\n',
        b'{"step": 5, "episodes": [{"rew',
    ]
    (run / "old" / "rl" / "rollouts.jsonl").write_bytes(b"".join(lines))
    (run / "old" / "validation").mkdir()
    (run / "old" / "validation" / "base.json").write_text('{"samples": [{"row": 1}, 5], "n": 1}')
    (run / "old" / "recipe.yaml").write_text("{")
    app = make_app(run_routes({"old": run / "old"}), ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        assert client.get("/api/runs/old/steps").json()["steps"] == [0, 1, 2, 3, 4]
        rows = client.get("/api/runs/old/rollouts").json()["rows"]
        assert [row["reward"] for row in rows] == [None, 1, None]
        for row in rows:
            params = {"step": row["step"], "episode": row["episode"]}
            assert client.get("/api/runs/old/episode", params=params).status_code == 200
        assert client.get("/api/runs/old/heldout").json()["count"] == 1
        assert client.get("/api/runs-differences").json()["keys"] == []


def test_heldout_rows_that_changed_come_first(client: TestClient, run: Path) -> None:
    (run / "new" / "validation").mkdir()
    for name, values in (("base", [0.0, 1.0, 0.5]), ("rl", [0.0, 0.25, 1.0])):
        samples = [
            {"row": i, "prompt": f"p{i}", "gold": "g", "completion": name, "reward": value}
            for i, value in enumerate(values)
        ]
        record = {"metric": "reward", "value": 0.5, "interval": [0.1, None], "samples": samples}
        (run / "new" / "validation" / f"{name}.json").write_text(json.dumps(record))
    found = client.get("/api/runs/new/heldout").json()
    assert list(found["policies"]) == ["base", "rl"]
    assert (found["better"], found["worse"]) == (1, 1)
    assert [row["change"] for row in found["rows"]] == [-0.75, 0.5, 0.0]


def events(path: Path, offset: int, act: Any, count: int) -> list[str]:
    """The events that a tail gives, while `act` changes the file."""

    acts = count - 1

    async def collect() -> list[str]:
        tail, found = _tail(path, offset), []
        try:
            for i in range(count):
                if i == acts:
                    await asyncio.to_thread(act)
                found.append(await asyncio.wait_for(anext(tail), 10))
        finally:
            await tail.aclose()
        return found

    return asyncio.run(collect())


def test_t60_a_line_comes_within_two_seconds_and_a_cut_file_begins_again(run: Path) -> None:
    path = run / "new" / "rl" / "metrics.jsonl"
    size = path.stat().st_size
    last = size - len(path.read_bytes().splitlines(keepends=True)[-1])
    began: list[float] = []

    def write() -> None:
        began.append(time.monotonic())
        with path.open("a") as file:
            file.write('{"step": 5, "reward": Infinity}\n{"step": 6')

    found = events(path, last, write, 3)
    assert time.monotonic() - began[0] < 2
    assert found[0] == f"id: {last}\ndata: {{}}\n\n"
    assert found[1].startswith(f"id: {size}\n") and '"step":4' in found[1]
    assert '"step":5,"reward":null' in found[2]
    assert RESET in events(path, last, lambda: os.truncate(path, 10), 4)[2:][-1]
    assert RESET in events(path, 5, lambda: None, 1)[0]
    assert RESET in events(path, 1 << 40, lambda: None, 1)[0]


def test_the_index_follows_a_file_that_grows_or_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    file = RolloutFile(path)
    assert file.lines() == []
    lines = [
        json.dumps({"step": i, "episodes": [episode(i)], "pad": "x" * 300_000}) for i in range(9)
    ]
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:100])
    assert [step for *_, step in file.lines()] == [0, 1, 2, 3, 4]
    path.write_text("\n".join(lines) + "\n")
    assert [step for *_, step in file.lines()] == list(range(9))
    assert [e["group_id"] for e in file.step(7)] == [3]
    changed = [lines[0], *[line.replace("question", "Question") for line in lines[1:]]]
    path.write_text("\n".join([*changed, lines[8]]) + "\n")
    assert len(file.lines()) == 10, "what was read is found anew where the file has changed"
    os.truncate(path, len(lines[0]) + 1)
    assert [step for *_, step in file.lines()] == [0]


def test_a_real_run_is_read(tmp_path: Path) -> None:
    trainer(small(steps=2), tmp_path / "run" / "rl").train()
    (tmp_path / "run" / "rl" / "tokenizer.json").write_text("{")
    app = make_app(run_routes({"run": tmp_path / "run"}), ServerSettings())
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        found = client.get("/api/runs/run/episode", params={"step": 1, "episode": 3}).json()
        assert found["record"]["row"] == 0 and found["count"] == 8
        gaps = [
            abs(a - b)
            for a, b in zip(
                found["tokens"]["logprobs"], found["tokens"]["trained_logprobs"], strict=True
            )
            if a is not None
        ]
        assert len(gaps) == found["length"] and max(gaps) < 1e-3


def test_names_of_runs_differ() -> None:
    assert list(names_of([Path("/a/x"), Path("/b/x"), Path("/a/x"), Path("/c/y")])) == [
        "x", "x-2", "y",
    ]  # fmt: skip


def test_t61_the_page_needs_no_torch() -> None:
    """It would take 200 MB and a second."""
    program = "import sys, gearshift.serve.runs.routes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_watch_names_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watch", "/nowhere/run"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().endswith("no folder /nowhere/run; name a run's folder.")


def test_t61_a_large_file_is_indexed_without_being_held(tmp_path: Path) -> None:
    """The server keeps three numbers a line."""
    path = tmp_path / "rollouts.jsonl"
    block = json.dumps(episode(1, **FULL)) + ", "
    with path.open("w") as file:
        for step in range(100):
            file.write(f'{{"step": {step}, "episodes": [{block * 200}{{}}]}}\n')
    index = RolloutFile(path)
    assert len(index.lines()) == 100 and len(index.step(99)) == 201
    assert Filter.of('text~"answer 1"').may_match(index.raw(index.lines()[50]))
    assert not Filter.of("text~nowhere").may_match(index.raw(index.lines()[50]))
    assert by_token({}) == {"ids": [], "mask": []}


def test_a_long_right_answer_is_whole_for_a_filter_and_cut_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.jsonl").write_text('{"step": 0}\n')
    line = {"step": 0, "episodes": [episode(1, gold="x" * 5000 + " end")]}
    (tmp_path / "rl" / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    routes = run_routes({"one": tmp_path})
    with TestClient(make_app(routes, ServerSettings()), base_url="http://127.0.0.1:8000") as client:
        found = client.get('/api/runs/one/rollouts?filter=gold~"end"').json()["rows"]
        assert [row["gold"] for row in found] == ["x" * 160]
        whole = client.get("/api/runs/one/episode?step=0&episode=0").json()
        assert whole["gold"].endswith(" end")


def test_a_group_has_its_episodes_alone(client: TestClient) -> None:
    found = client.get("/api/runs/new/group?step=1&group=3").json()["episodes"]
    assert [(e["episode"], e["messages"][1]["content"]) for e in found] == [
        (2, "answer 6"),
        (3, "answer 7"),
    ]
    assert client.get("/api/runs/new/group?step=1&group=99").status_code == 404


def test_marks_are_where_episodes_were_lost_and_where_a_rare_phase_ran() -> None:
    figures: Columns = {
        "step": [0.0, 1.0, 2.0, 3.0, 4.0],
        "left_out/alone": [0.0, 2.0, 2.0, None, 3.0],
        "environment/failures": [1.0] * 5,
        "seconds/train": [1.0] * 5,
        "seconds/save": [None, None, 1.0, None, None],
    }
    assert marks(figures, [2]) == {"checkpoint": [2], "lost": [0, 1, 4], "save": [2]}
    assert marks({}, []) == {}
