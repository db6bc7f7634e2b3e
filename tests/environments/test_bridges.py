"""Environments of verifiers and of OpenEnv through the bridges: they say and pay what the packages
themselves do, several at a time, and one clear line names what cannot work.

What needs a package runs where it is installed, best in an environment of its own:
`pip install 'verifiers[ta]>=0.4'` (with its TextArena games) or `pip install openenv`.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import math
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from pydantic import BaseModel

from gearshift.cli.main import main
from gearshift.environments import openenv as from_openenv
from gearshift.environments import verifiers as from_verifiers
from gearshift.environments.base import TextEnvironment
from gearshift.environments.registry import make_environment
from gearshift.errors import ConfigError, NumericalError
from gearshift.models.tiny import tiny_model, tiny_tokenizer

PLUGINS = str(Path(__file__).parent / "plugins")
Turn = tuple[list[dict[str, str]], float, bool, bool, dict[str, float]]


def verifiers(taskset: str, **kwargs: Any) -> TextEnvironment:
    return make_environment("gearshift/Verifiers-v0", taskset=taskset, **kwargs)


def openenv(**kwargs: Any) -> TextEnvironment:
    return make_environment("gearshift/OpenEnv-v0", **kwargs)


def play(env: TextEnvironment, replies: Sequence[str], row: int | None = None) -> list[Turn]:
    """What is said, the reward, whether it ended or was cut, and the metrics, turn by turn; the
    first is the reset.
    """
    said, info = env.reset(seed=0, options={} if row is None else {"row": row})
    turns: list[Turn] = [(info["messages"], 0.0, False, False, {})]
    for reply in replies:
        said, reward, ended, cut, info = env.step(reply)
        messages = info.get("messages") or [{"role": "user", "content": said}]
        turns.append(([] if ended else messages, reward, ended, cut, info.get("metrics", {})))
        if ended or cut:
            break
    return turns


def two_steps_of_rl(folder: Path, task: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of two steps of the loop with a model of a few thousand weights, which has room
    for games with long rules.
    """
    model = tiny_model()
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    recipe = {
        "run": {"dir": str(folder / "run")},
        "model": {"name": str(folder / "model"), "dtype": "float32", "device": "cpu", "threads": 1},
        "task": {"name": "gym", "validation": 2, "metric": "reward", **task},
        "sft": None,
        "reward": None,
        "rl": {
            "steps": 2,
            "rollout": {"prompts": 2, "group_size": 2, "max_new_tokens": 6},
            "kl": {"beta": 0},
        },
        "eval": {"max_new_tokens": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    main(["run", str(path)])
    lines = (folder / "run" / "rl" / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "reward" in m]


# Without the packages


def test_without_the_packages_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    from_verifiers._load.cache_clear()
    with pytest.raises(ConfigError, match=r"run: pip install 'verifiers>=0\.4'"):
        verifiers("anything")
    with pytest.raises(ConfigError, match="run: pip install openenv"):
        openenv(url="http://127.0.0.1:9")


class Word(BaseModel):
    word: str
    loud: bool = False


class Heard(BaseModel):
    text: str
    reward: float | None = None
    done: bool = False


class Parrot:
    """As OpenEnv's environments are, without the package."""

    def __init__(self) -> None:
        self.closed = False

    def reset(self, seed: int | None = None, **options: Any) -> Heard:
        return Heard(text=f"seed {seed}, {options}")

    def step(self, action: Word) -> Heard:
        reward = {"nothing": None, "nan": math.nan}.get(action.word, len(action.word))
        text = action.word.upper() if action.loud else action.word
        return Heard(text=text, reward=reward, done=action.word == "bye")

    def close(self) -> None:
        self.closed = True


class Mute:
    def reset(self) -> Heard:
        return Heard(text="")

    def step(self, action):  # type: ignore[no-untyped-def]
        return Heard(text="")


def test_a_class_of_this_process_needs_no_package() -> None:
    env = openenv(environment=f"{__name__}:Parrot", action="word", observation="text", turns=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("hi")
    assert env.reset(seed=4, options={"level": 2})[0] == "seed 4, {'level': 2}"
    assert env.step("hi") == ("hi", 2.0, False, False, {})
    assert env.step("nothing")[1] == 0.0
    assert env.step("bye")[1:4] == (3.0, True, False)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("hi")
    assert [t[1:4] for t in play(env, ["a", "bb", "ccc"])[1:]] == [
        (1.0, False, False), (2.0, False, False), (3.0, False, True),
    ]  # fmt: skip
    env.reset()
    with pytest.raises(NumericalError, match="reward nan"):
        env.step("nan")
    env.close()
    env.close()
    assert env.unwrapped._inner._env.closed  # type: ignore[attr-defined]


def test_other_fields_and_the_whole_observation() -> None:
    env = openenv(environment=f"{__name__}:Parrot", action="word", also={"loud": True})
    env.reset(seed=1)
    assert json.loads(env.step("hi")[0]) == {"text": "HI"}


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "either `url` or `environment`"),
        ({"url": "http://x", "environment": "x:X"}, "either `url` or"),
        ({"environment": f"{__name__}:Parrot", "turns": 0}, "at least one turn"),
        ({"environment": "no_such_module:X"}, "no_such_module"),
        ({"environment": ":X"}, "cannot be made: Empty module name"),
        ({"environment": f"{__name__}:Parot"}, "Parot"),
        ({"environment": f"{__name__}:Heard"}, "cannot be made: 1 validation error"),
        ({"environment": f"{__name__}:ThreadPoolExecutor"}, "ThreadPoolExecutor cannot be made"),
        ({"environment": f"{__name__}:Mute"}, "has no annotation for its action"),
        ({"environment": f"{__name__}:Parrot"}, "has no message; it has word, loud"),
        ({"environment": f"{__name__}:Parrot", "action": "word", "also": {"lod": 1}}, "no lod"),
    ],
)
def test_bad_names_of_openenv(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        openenv(**kwargs)
    assert "\n" not in str(caught.value)


def test_an_observation_that_is_not_there() -> None:
    env = openenv(environment=f"{__name__}:Parrot", action="word", observation="txt")
    with pytest.raises(ConfigError, match="no `txt`; it has text, reward, done"):
        env.reset()


# verifiers


@pytest.fixture
def vf(monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(PLUGINS)
    from_verifiers._load.cache_clear()
    return package


@pytest.fixture(scope="module")
def hangman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """TextArena's game, with a word list of its own: its words come from a network else."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path_factory.mktemp("nltk")
    (folder / "corpora" / "words").mkdir(parents=True)
    for name in ("en", "en-basic", "README"):
        text = "light\nbread\nbutton\nwindow\nriver\nhouse\nletter\n"
        (folder / "corpora" / "words" / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_, **__: True)
        patch.setattr(nltk.data, "path", [str(folder), *nltk.data.path])
        pytest.importorskip("textarena")
        yield {"taskset": "textarena", "limit": 6, "config": {"game": "Hangman-v0"}}


def word(seed: int) -> str:
    """The word that is looked for, from the game itself."""
    textarena = importlib.import_module("textarena")
    random.seed(seed)
    game = textarena.make(env_id="Hangman-v0")
    game.reset(num_players=1)
    return game.state.game_state["target_word"]


class Scripted(BaseHTTPRequestHandler):
    """A model: its nth reply is the nth of the server's."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = sum(message["role"] == "assistant" for message in asked["messages"])
        reply = {"role": "assistant", "content": self.server.replies[n]}  # type: ignore[attr-defined]
        choice = {"index": 0, "message": reply, "finish_reason": "stop"}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        body = json.dumps({**answer, "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def episode(
    vf: Any,
    role: str,
    taskset: dict[str, Any],
    row: int,
    replies: Sequence[str],
    **agent: Any,
) -> Any:
    """The trace of one episode as the package itself plays it: its agent, its interception, its
    scoring, and a model on the other side of HTTP that replies as the test says.
    """
    from verifiers.v1.utils import loaders

    agent |= {"harness": {"id": "vf_sums"}, "runtime": {"type": "subprocess"}}
    env = loaders.load_environment(loaders.resolve_env_config({"taskset": taskset, role: agent}))
    [task] = [t for i, t in zip(range(row + 1), env.taskset, strict=False) if i == row]
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        server.replies = replies  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = vf.EvalClientConfig(
            base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key_var="NONE"
        )
        done = asyncio.run(env.run_episode(task, vf.ModelContext("m", client)))
        server.shutdown()
    assert done.ok, done.errors
    [trace] = done.traces
    return trace


def same(turns: list[Turn], trace: Any) -> None:
    """Both say the same, pay the same and measure the same."""
    said = [(m.role, m.content) for m in trace.messages if m.role != "assistant"]
    assert [(m["role"], m["content"]) for t in turns for m in t[0]] == said
    assert len(turns) - 1 == trace.num_turns
    *before, last = turns
    assert all(t[1:3] == (0.0, False) for t in before) and last[2]
    assert last[1] == pytest.approx(trace.reward)
    scores = {name: reward.score for name, reward in trace.rewards.items()}
    assert last[4] == {**scores, **trace.metrics}


@pytest.mark.parametrize("letters", ["right", "zqxjkv", "zq", "eeee", "no move"])
def test_a_game_pays_what_the_package_pays(vf: Any, hangman: Any, letters: str) -> None:
    for row in (0, 5):
        replies = [f"[{word(row)}]"] if letters == "right" else [f"[{x}]" for x in letters]
        taskset = {"id": hangman["taskset"], **hangman["config"]}
        trace = episode(vf, "player", taskset, row, replies, max_turns=len(replies))
        turns = play(verifiers(**hangman, turns=len(replies)), replies, row)
        same(turns, trace)
        if letters == "right":
            assert turns[-1][1] == 1.0


@pytest.mark.parametrize("reply", ["the answer", "the answer, at some length", "0", ""])
def test_one_question_pays_what_the_package_pays(vf: Any, reply: str) -> None:
    env = verifiers("vf_sums")
    assert len(env.unwrapped.tasks) == 8  # type: ignore[attr-defined]
    answer = env.unwrapped.tasks[3].data.entry["answer"]  # type: ignore[attr-defined]
    reply = reply.replace("the answer", answer)
    turns = play(env, [reply], 3)
    same(turns, episode(vf, "agent", {"id": "vf_sums"}, 3, [reply]))
    assert turns[0][0][0] == {"role": "system", "content": "Add."}
    if reply == answer:
        assert turns[-1][1] == 2.5


@pytest.mark.parametrize(
    ("replies", "reward"),
    [
        (["answer"], 2.75),
        (["1", "answer"], 2.75),
        (["1", "2", "3"], 0.75),  # its max_turns
        (["I give up"], 0.25),  # a stop at the response
        (["1", "x" * 50], 0.25),  # a stop at the trace
    ],
)
def test_turns_stops_and_finalize_are_the_packages(
    vf: Any, replies: list[str], reward: float
) -> None:
    env = verifiers("vf_quiz")
    answer = env.unwrapped.tasks[2].data.entry["answer"]  # type: ignore[attr-defined]
    replies = [answer if reply == "answer" else reply for reply in replies]
    turns = play(env, replies, 2)
    same(turns, episode(vf, "pupil", {"id": "vf_quiz"}, 2, replies))
    assert turns[-1][1] == pytest.approx(reward, abs=0.02)


def test_copies_at_a_time_play_their_own_game(vf: Any, hangman: Any) -> None:
    words = [word(row) for row in range(6)]

    def won(copy: int) -> list[bool]:
        env = verifiers(**hangman)
        turns = [play(env, [f"[{words[row]}]"], row)[-1] for row in [0, 1, 2, 3, 4, 5] * 3]
        env.close()
        return [turn[1:3] == (1.0, True) for turn in turns]

    with ThreadPoolExecutor(8) as pool:
        played = list(pool.map(won, range(8)))
    assert played == [[True] * 18] * 8


def test_copies_take_turns_in_the_middle_of_a_game(vf: Any, hangman: Any) -> None:
    envs = [verifiers(**hangman) for _ in range(4)]
    for row, env in enumerate(envs):
        env.reset(options={"row": row})
    for letter in "zq":
        for env in reversed(envs):
            assert env.step(f"[{letter}]")[1:4] == (0.0, False, False)
    for row, env in enumerate(envs):
        assert env.step(f"[{word(row)}]")[1:3] == (1.0, True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_no_fault_with_verifiers(vf: Any, hangman: Any) -> None:
    for kwargs in (hangman, {"taskset": "vf_sums"}, {"taskset": "vf_quiz"}):
        check_env(verifiers(**kwargs), skip_render_check=True)


def test_the_order_of_calls(vf: Any, hangman: Any) -> None:
    env = verifiers(**hangman)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("[a]")
    env.reset(options={"row": 0})
    env.step("[z]")
    said, _ = env.reset(options={"row": 1})
    assert "You have 6 tries left" in said
    assert env.step(f"[{word(1)}]")[1:3] == (1.0, True)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("[a]")
    env.reset(options={"row": 1})
    env.close()
    env.close()
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("[a]")
    with pytest.raises(ConfigError, match="no row 6; its rows are 0 to 5"):
        env.reset(options={"row": 6})


FAULTY = """
import verifiers.v1 as vf

class ATask(vf.Task[vf.TaskData]):
    {task}

class ATaskset(vf.Taskset[ATask, vf.TasksetConfig]):
    def load(self):
        {load}

{more}
"""
FINE = "return [ATask(vf.TaskData(prompt='Hi'), self.config.task)]"
ENV = """
class AConfig(vf.EnvConfig):
    a: vf.AgentConfig = vf.AgentConfig()
    {role}

class AnEnv(vf.Env[AConfig]):
    async def run(self, task, agents):
        {run}

__all__ = ["ATaskset", "AnEnv"]
"""
ONE = '__all__ = ["ATaskset"]'
TOOLS = """
class Tools(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def echo(self, text: str) -> str: return text
__all__ = ["ATaskset"]
"""


def faulty(folder: Path, task: str = "pass", load: str = FINE, more: str = ONE) -> str:
    """A taskset, in a module of its own -> its id."""
    name = f"vf_faulty_{abs(hash((task, load, more)))}"
    (folder / f"{name}.py").write_text(FAULTY.format(task=task, load=load, more=more))
    return name


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"load": "return []"}, "has no tasks"),
        ({"load": "raise OSError('no such\\nfile')"}, "cannot be loaded: no such file"),
        ({"load": "return open('/no/such/file')"}, "cannot be loaded: .*No such file"),
        ({"load": "return [{}['key']]"}, "cannot be loaded: 'key'"),
        ({"task": "NEEDS_CONTAINER = True"}, "needs a container or tool servers"),
        ({"task": "toolsets = lambda config: [Tools(vf.ToolsetConfig())]", "more": TOOLS}, "tool"),
        (
            {"task": "@vf.reward\n    async def r(self, trace, runtime) -> float: return 1.0"},
            "scores in a sandbox",
        ),
        (
            {"task": "@vf.intercept\n    async def r(self, q: vf.Request): return None"},
            "rewrites messages",
        ),
        (
            {"more": ENV.format(role="b: vf.AgentConfig = vf.AgentConfig()", run="pass")},
            "has the roles a, b; a policy can play only one",
        ),
        ({"more": ""}, "defines no `__all__`"),
    ],
)
def test_what_cannot_be_played_is_one_line(
    vf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: Any, match: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=match) as caught:
        verifiers(faulty(tmp_path, **kwargs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"taskset": "no-such-taskset"}, "no-such-taskset.* not found"),
        ({"taskset": "json"}, "json cannot be loaded: .*exports no Taskset"),
        ({"taskset": "no.such"}, "no.such cannot be loaded"),
        ({"taskset": "vf_sums", "config": {"colour": "red"}}, "colour"),
        ({"taskset": "textarena", "config": {"game": "Chess-v0"}}, "game"),
        ({"taskset": "textarena"}, "game"),
        ({"taskset": "vf_sums", "limit": 0}, "has no tasks"),
        ({"taskset": "vf_sums", "limits": 0}, "cannot be made with"),
    ],
)
def test_bad_names_of_verifiers(vf: Any, hangman: Any, kwargs: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        verifiers(**kwargs)
    assert "\n" not in str(caught.value)


def test_what_an_environment_raises_is_raised(
    vf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    env = verifiers(faulty(tmp_path, more=ENV.format(role="", run="1 / 0")))
    with pytest.raises(ZeroDivisionError):
        env.reset(seed=0)
    env = verifiers(faulty(tmp_path, more=ENV.format(role="", run="pass")))
    with pytest.raises(ConfigError, match="ended before it asked"):
        env.reset(seed=0)
    reward = "@vf.reward\n    async def r(self, trace) -> float: return float(trace.last_reply)"
    env = verifiers(faulty(tmp_path, task=reward))
    env.reset(seed=0)
    with pytest.raises(Exception, match="could not convert string to float: 'one'"):
        env.step("one")
    env.reset(seed=0)
    assert env.step("1.5")[1:3] == (1.5, True)


def test_the_loop_learns_from_a_game_of_verifiers(vf: Any, hangman: Any, tmp_path: Path) -> None:
    kwargs = {**hangman, "turns": 2}
    steps = two_steps_of_rl(tmp_path, {"id": "gearshift/Verifiers-v0", "kwargs": kwargs})
    assert len(steps) == 2 and all(step["environment/failures"] == 0 for step in steps)


# OpenEnv


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The environment that `openenv init` writes, from the package's own template; its package."""
    pytest.importorskip("openenv.core.env_server")
    import openenv.cli

    template = Path(openenv.cli.__file__).parent / "templates" / "openenv_env"
    names = {"__ENV_CLASS_NAME__": "Echo", "__ENV_TITLE_NAME__": "Echo", "__ENV_NAME__": "echo"}
    root = tmp_path_factory.mktemp("openenv")
    for source in template.rglob("*.py"):
        text, path = source.read_text(), str(source.relative_to(template))
        for mark, name in names.items():
            text, path = text.replace(mark, name), path.replace(mark, name)
        (root / "echo_of_openenv" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "echo_of_openenv" / path).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield "echo_of_openenv"


@pytest.fixture
def serve(echo: str) -> Iterator[Callable[[int], tuple[str, Callable[[], None]]]]:
    """Start a server of it for so many sessions, on the loopback -> (its URL, what stops it)."""
    from openenv.core.env_server import create_fastapi_app

    uvicorn = importlib.import_module("uvicorn")
    models = importlib.import_module(f"{echo}.models")
    environment = importlib.import_module(f"{echo}.server.echo_environment").EchoEnvironment
    stops: list[Callable[[], None]] = []

    def start(sessions: int) -> tuple[str, Callable[[], None]]:
        app = create_fastapi_app(
            environment, models.EchoAction, models.EchoObservation, max_concurrent_envs=sessions
        )
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            listener.close()

        stops.append(stop)
        return f"http://127.0.0.1:{listener.getsockname()[1]}", stop

    yield start
    for stop in stops:
        stop()


def wait_for(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


WORDS = ["hello", "", "a", "and so on"]


def test_it_pays_what_openenv_pays(echo: str, serve: Any) -> None:
    url, _ = serve(2)
    module = importlib.import_module(f"{echo}.server.echo_environment")
    models = importlib.import_module(f"{echo}.models")
    inside, action = module.EchoEnvironment(), models.EchoAction
    first = inside.reset()
    seen = [inside.step(action(message=w)) for w in WORDS]
    with importlib.import_module(f"{echo}.client").EchoEnv(base_url=url).sync() as client:
        assert client.reset().observation.echoed_message == first.echoed_message
        assert [client.step(action(message=w)).reward for w in WORDS] == [o.reward for o in seen]
    assert len({o.reward for o in seen}) == 4
    for kwargs in ({"url": url}, {"environment": f"{module.__name__}:EchoEnvironment"}):
        env = openenv(**kwargs, observation="echoed_message", turns=4)
        turns = play(env, [*WORDS, "one too many"])
        assert [t[0][0]["content"] for t in turns] == [first.echoed_message, *WORDS]
        assert [t[1] for t in turns] == [0.0, *(o.reward for o in seen)]
        assert [t[2:4] for t in turns] == [(False, False)] * 4 + [(False, True)]
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step("one too many")
        env = openenv(**kwargs)
        env.reset(seed=1)
        assert json.loads(env.step("hey")[0]) == {"echoed_message": "hey", "message_length": 3}


def test_copies_have_sessions_of_their_own(serve: Any) -> None:
    url, _ = serve(8)

    def heard(copy: int) -> list[str]:
        env = openenv(url=url, observation="echoed_message", turns=10)
        env.reset(seed=copy)
        said = [env.step(f"{copy}.{turn}")[0] for turn in range(10)]
        env.close()
        return said

    with ThreadPoolExecutor(8) as pool:
        for copy, said in enumerate(pool.map(heard, range(8))):
            assert said == [f"{copy}.{turn}" for turn in range(10)]


def test_a_full_server_says_so_and_is_freed_by_who_is_gone(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = serve(2)
    envs = [openenv(url=url) for _ in range(2)]
    monkeypatch.setattr(from_openenv, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="accepts no further session; raise its max_concurrent"):
        openenv(url=url)
    monkeypatch.undo()
    envs[0].reset()
    assert envs[0].step("still there")[1] > 0
    del envs
    gc.collect()
    for env in [openenv(url=url) for _ in range(2)]:
        env.reset()
        env.close()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_no_fault_with_openenv(echo: str, serve: Any) -> None:
    url, _ = serve(2)
    check_env(openenv(url=url), skip_render_check=True)
    path = f"{echo}.server.echo_environment:EchoEnvironment"
    check_env(openenv(environment=path), skip_render_check=True)


def test_a_server_that_is_not_there_or_goes(serve: Any) -> None:
    url, stop = serve(2)
    env = openenv(url=url)
    env.reset()
    wrong = openenv(url=url, action="code")
    wrong.reset()
    with pytest.raises(ConfigError, match="refuses an action with the fields code"):
        wrong.step("x")
    stop()
    with pytest.raises(Exception, match=r"1012|1006|no close frame|refused|connect"):
        env.step("hello?")
    for bad in (url, "nonsense"):
        with pytest.raises(ConfigError, match=f"no OpenEnv server at {bad}") as caught:
            openenv(url=bad)
        assert "\n" not in str(caught.value)
    env.close()


def test_bad_names_in_a_module_of_openenv(echo: str) -> None:
    path = f"{echo}.server.echo_environment:EchoEnvironment"
    with pytest.raises(ConfigError, match="action has no code; it has metadata, message"):
        openenv(environment=path, action="code")
    with pytest.raises(ConfigError, match="EchoEnv cannot be made"):
        openenv(environment=f"{echo}.client:EchoEnv")
    with pytest.raises(ConfigError, match="no `text`; it has done, reward, metadata, echoed_mess"):
        openenv(environment=path, observation="text").reset()


def test_the_loop_learns_from_a_server_of_openenv(serve: Any, tmp_path: Path) -> None:
    url, _ = serve(64)
    kwargs = {"url": url, "observation": "echoed_message", "turns": 2}
    steps = two_steps_of_rl(tmp_path, {"id": "gearshift/OpenEnv-v0", "kwargs": kwargs})
    assert len(steps) == 2 and all(step["environment/failures"] == 0 for step in steps)
    assert all(step["reward"] > 0 for step in steps)
