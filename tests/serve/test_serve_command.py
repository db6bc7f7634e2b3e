"""`gearshift serve` finds what the user names, says what it takes, and serves until a signal."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gearshift.cli.label import labels_beside
from gearshift.cli.main import main
from gearshift.cli.serve import panel_of, settings_of
from gearshift.cli.served_models import Named, _loaded, load_all, models_of, print_memory
from gearshift.errors import ConfigError, DataError
from gearshift.models.load import ModelConfig, load_classifier
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.serve.metrics import Metrics
from gearshift.serve.policies import Policies
from gearshift.serve.task_panel import Panel
from gearshift.tasks.voice.task import VoiceConfig
from gearshift.types import SamplingParams
from tests.models.test_shared_base import saved_adapter, saved_base

TINY = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GEARSHIFT_")}
    command = [sys.executable, "-m", "gearshift", "serve", *words, "--port", "0"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=plain)
    assert server.stdout
    try:
        yield server, server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


def asked(url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json", "X-Gearshift": "1"}
    sent = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(sent, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def folder_of(place: Path, seed: int = 0) -> Path:
    tiny_model(seed=seed).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.mark.slow
def test_two_policies_and_a_reward_model_are_served_until_a_signal(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one"), folder_of(tmp_path / "other", seed=1)
    load_classifier(ModelConfig(name="tiny")).save_pretrained(one / "reward")
    tiny_tokenizer().save_pretrained(one / "reward")
    with started(str(one), "--against", str(other)) as (server, url):
        assert url.endswith("/")
        models = asked(f"{url}v1/models")["data"]
        assert isinstance(models, list) and [m["id"] for m in models] == ["policy", "other"]
        body: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "seed": 1}
        body |= {"max_tokens": 16}
        answers = [
            asked(f"{url}v1/chat/completions", {**body, "model": name})["choices"]
            for name in ("policy", "other", "policy")
        ]
        assert answers[0] == answers[2] != answers[1]
        sample = {"prompts": [[{"role": "user", "content": "q"}]], "completions": ["abc"]}
        assert asked(f"{url}score", sample)["rewards"]
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM
    assert "GiB of weights" in err and err.endswith("gearshift: stopped.\n")


def test_names_of_what_is_served(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one"), folder_of(tmp_path / "other")
    found = models_of(str(one), [str(other), "tiny"])
    assert [(each.name, each.source) for each in found] == [
        ("policy", str(one)), ("other", str(other)), ("tiny", "tiny")]  # fmt: skip
    with pytest.raises(ConfigError, match="Two models would be called other"):
        models_of(str(one), [str(other), str(other)])


def test_memory_is_said_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = folder_of(tmp_path / "one")
    print_memory([Named("policy", str(one), None)])
    assert f"policy: {one}, 0.00 GiB of weights" in capsys.readouterr().err
    monkeypatch.setattr("gearshift.runtime.free_memory.free_bytes", lambda _: 10.0)
    with pytest.raises(ConfigError, match="name fewer models with --against"):
        print_memory([Named("policy", str(one), None)])


def test_an_adapter_takes_the_memory_of_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone; beside its base, or another adapter of it, only its own."""
    base = saved_base(tmp_path / "base")
    adapters = [saved_adapter(tmp_path / f"{seed}", base, seed) for seed in (1, 2)]
    [weights] = base.glob("*.safetensors")
    assert _loaded("tiny") == [] and [path.suffix for path in _loaded("embedded")]
    assert _loaded(str(adapters[0])) == _loaded(str(base)) == [weights]
    monkeypatch.setattr("gearshift.cli.served_models.GIB", 1)

    def sizes(*sources: Path) -> list[float]:
        print_memory([Named(str(i), str(source), None) for i, source in enumerate(sources)])
        lines = capsys.readouterr().err.splitlines()
        return [float(re.search(r", ([\d.]+) GiB of", x)[1]) for x in lines if "of weights" in x]  # type: ignore[index]

    whole, own = (float(p.stat().st_size) for p in (weights, *adapters[0].glob("*.safetensors")))
    assert sizes(adapters[0]) == [whole]
    assert sizes(*adapters) == [whole + own, own] and sizes(base, *adapters) == [whole, own, own]


def test_adapters_and_their_base_are_served_from_one_copy_of_its_weights(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    places = [base, *(saved_adapter(tmp_path / f"{seed}", base, seed) for seed in (1, 2)), base]
    config = Namespace(model=ModelConfig(dtype="float32", device="cpu"), task=None)
    named = [Named(str(i), str(place), config) for i, place in enumerate(places)]  # type: ignore[arg-type]
    policies = Policies()
    with ExitStack() as stack:
        load_all(named, 0, policies, Metrics(), stack)
        models = [policies.get(each.name).service._engine.model for each in named]
        ends = {model.get_input_embeddings().weight.data_ptr() for model in models}
        assert len({*map(id, models)}) == 4 and len(ends) == 1

        async def answers() -> list[Any]:
            params = SamplingParams(max_new_tokens=8, temperature=0.0)
            asked = (policies.get(each.name).service.generate([5, 6], params, 0) for each in named)
            return [done.token_ids for done in await asyncio.gather(*asked)]

        plain, one, two, again = asyncio.run(answers())
    assert plain == again and len({*map(tuple, (plain, one, two))}) == 3


def test_what_the_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Namespace(host="::1", port=1, allow_host=["a.b"], allow_origin=["https://a.b"])
    monkeypatch.setenv("GEARSHIFT_KEY", "k")
    settings = settings_of(given)
    assert (settings.host, settings.port, settings.key) == ("::1", 1, "k")
    assert settings.allow_origin == ("https://a.b",) and "'k'" not in repr(settings)
    for origin in ("*", "a.b", "https://a.b/"):
        given.allow_origin = [origin]
        with pytest.raises(ConfigError, match="is no origin"):
            settings_of(given)


def test_the_panel_is_that_of_the_runs_task(tmp_path: Path) -> None:
    def panel(task: object, recogniser: str | None = None) -> Panel | None:
        recipe = SimpleNamespace(task=task, run=SimpleNamespace(dir=str(tmp_path)))
        return panel_of(recipe, recogniser)  # type: ignore[arg-type]

    mine = tmp_path / "mine.py"
    mine.write_text("def hear(path): return path[-5:]\n")
    wav = tmp_path / "a.wav"
    wav.touch()
    voice = panel(VoiceConfig(), f"{mine}:hear")
    assert voice and voice.single and (voice.folder / "panel.js").is_file()
    assert voice.hear(str(wav)) == "a.wav" and voice.state([])["rooms"]
    with pytest.raises(DataError, match=r"train\.jsonl"):
        panel(VoiceConfig()).hear(str(wav))  # type: ignore[union-attr]
    assert panel(None) is None and panel(SimpleNamespace(name="gym")) is None
    assert panel_of(None) is None


def metrics_of(run: Path) -> list[dict[str, object]]:
    lines = (run / "rl" / "metrics.jsonl").read_text().splitlines()
    kept = ("reward", "loss", "step", "completion_tokens")
    return [{k: v for k, v in json.loads(line).items() if k in kept} for line in lines]


@pytest.mark.slow
def test_a_run_is_asked_while_it_learns_and_learns_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def one(prompts, completions, **_):\n    return [*map(len, completions)]\n")

    def words(name: str) -> list[str]:
        given = [TINY, f"run.dir={tmp_path / name}", "sft=null", "reward=null", "rl.steps=8"]
        return [*given, "eval.limit=2", f"rl.rewards=[{{source: '{rewards}:one'}}]"]

    main(["run", *words("alone")])
    capsys.readouterr()
    port = free_port()
    answers: list[dict[str, object]] = []
    done = threading.Event()

    def ask() -> None:
        body = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
        while not done.is_set():
            try:
                url = f"http://127.0.0.1:{port}/v1/chat/completions"
                answers.append(asked(url, {**body, "max_tokens": 8}))
            except OSError:  # not yet, or no policy samples now
                done.wait(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        main(["run", "--serve", str(port), *words("served")])
    finally:
        done.set()
        asking.join(30)
    assert "the run's page and policy: http://127.0.0.1:" in capsys.readouterr().err
    assert answers and all(a["choices"] for a in answers)
    assert metrics_of(tmp_path / "served") == metrics_of(tmp_path / "alone")
    same = "rl/model.safetensors"
    assert (tmp_path / "served" / same).read_bytes() == (tmp_path / "alone" / same).read_bytes()


def test_labels_of_a_run_open_before_its_policies_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gearshift.cli.label._rows_of_run", lambda run: [{"prompt": "hi"}])
    with ExitStack() as stack:
        assert labels_beside(tmp_path, Policies(), [Named("policy", "x", None)], stack)


@pytest.mark.slow
def test_a_run_is_served_with_its_pages_and_its_labels(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["run", TINY, f"run.dir={run}", "reward=null", "rl=null", "eval.limit=2"])
    with started(str(run), "--against", "base") as (_, url):
        until = time.monotonic() + 60
        while True:
            with suppress(OSError):
                served = asked(f"{url}api/served")
                break
            assert time.monotonic() < until
            time.sleep(0.2)
        assert served["pages"] == {"chat": "/", "labels": "/labels", "runs": "/runs"}
        found = asked(f"{url}api/labels/next", {"who": "Ada", "tab": "t", "count": 1})
        while not found["items"]:
            time.sleep(0.1)
            found = asked(f"{url}api/labels/next", {"who": "Ada", "tab": "t", "count": 1})
        items = found["items"]
        assert isinstance(items, list) and len(items[0]["answers"]) == 2
        # The run's system message is there, and the policy and its base answered.
        assert items[0]["prompt"][0]["role"] == "system"
    lines = (run / "labels" / "events.jsonl").read_text().splitlines()
    models = {source["model"] for source in json.loads(lines[0])["source"]}
    assert models == {"run/sft", "tiny"}
