"""An episode's reward is the weighted sum, at the last token that the policy wrote; functions are
asked while others still write; models may be many, and far away.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig
from gearshift.rewards import build, http_client
from gearshift.rewards.composite import CompositeReward
from gearshift.rewards.config import RewardSource
from gearshift.rewards.functions import combine_rewards
from gearshift.rewards.http import HttpReward
from gearshift.rewards.models import Ensemble
from gearshift.rewards.running import RunningMeanStd
from gearshift.serve.score import score_routes
from gearshift.types import EpisodeInfo, Trajectory
from tests.serve import raw

TINY = ModelConfig(name="tiny", dtype="float32", device="cpu")


def source(name: str, weight: float = 1.0, normalize: bool = False) -> Any:
    return RewardSource(source=name, weight=weight, normalize=normalize)


def episode(group: int, text: str, reward: float) -> Trajectory:
    info = EpisodeInfo([{"role": "user", "content": "q"}, {}], text, columns={"gold": text})
    ids, mask = [5, 6, 7, 8, 9], [0, 1, 1, 0, 0]
    return Trajectory(ids, mask, [0.0] * 5, [0, 0, reward, 0, 0], group, 1, "stop", info)


def write(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(body)
    return f"{file}:f"


EPISODES = [episode(0, "a", 1.0), episode(0, "bb", 2.0), episode(4, "ccc", 3.0)]
EIGHT = [episode(group, "a", 1.0) for group in range(8)]


def test_the_sum_stands_at_the_last_token_that_the_policy_wrote(tmp_path: Path) -> None:
    f = write(tmp_path, "def f(completions, **_):\n    return [len(c) for c in completions]\n")
    totals, parts = CompositeReward([source("environment", 0.5), source(f, 2.0)], TINY, tmp_path)(
        EPISODES
    )
    rewards = [t.rewards for t in totals if t]
    assert rewards == [[0, 0, 2.5, 0, 0], [0, 0, 5.0, 0, 0], [0, 0, 7.5, 0, 0]]
    assert parts["environment"] == [1.0, 2.0, 3.0] and parts[f] == [1, 2, 3]


def test_functions_are_asked_by_group_and_once(tmp_path: Path) -> None:
    f = write(
        tmp_path,
        "calls = []\n"
        "def f(completions, gold, **_):\n"
        "    calls.append(list(gold))\n"
        "    return [len(c) for c in completions]\n",
    )
    total = CompositeReward([source(f)], TINY, tmp_path)
    total.begin(EPISODES[:2])
    scored, _ = total(EPISODES)
    assert [t.reward for t in scored if t] == [1, 2, 3]
    assert total.functions[0][1].__globals__["calls"] == [["a", "bb"], ["ccc"]]  # type: ignore[attr-defined]
    scored, _ = total([replace(t, group_id=9) for t in EPISODES])  # nothing is kept for the next
    assert [t.reward for t in scored if t] == [1, 2, 3]


@pytest.mark.parametrize(
    ("weight", "said", "wanted", "missing"),
    [
        (1.0, "[1, None, 1]", [2, 2, 4], 0),  # it does not apply: the others are the sum
        # lost: a sum without it would count it as 0
        (1.0, "[1, float('nan'), 1]", [2, None, 4], 1),
        (1.0, "[1, float('inf'), -1e30]", [2, None, None], 2),
        (0.0, "[1, float('nan'), None]", [1, 2, 3], 1),  # it is only logged
        (0.0, "[float('inf'), -1e30, float('-inf')]", [1, 2, 3], 3),
        (-1.0, "[1, None, 3]", [0, 2, 0], 0),
        (1e18, "[0, 2, 3]", [1, None, None], 0),  # beyond what training computes with
    ],
)
def test_what_does_not_apply_is_left_out_and_what_is_lost_leaves_the_episode_out(
    tmp_path: Path, weight: float, said: str, wanted: list[float | None], missing: int
) -> None:
    f = write(
        tmp_path,
        "def f(completions, **_):\n"
        f"    return [x for x, c in zip({said}, ['a', 'bb', 'ccc']) if c in completions]\n",
    )
    scorer = CompositeReward([source("environment"), source(f, weight)], TINY, tmp_path)
    scored, parts = scorer(EPISODES)
    assert [t and t.reward for t in scored] == wanted
    assert scorer.missing == {"environment": 0.0, f: pytest.approx(missing / 3)}
    assert all(v is None or abs(v) <= 3 for v in parts[f])


def test_where_only_the_environment_is_logged_what_applies_to_nothing_has_no_reward(
    tmp_path: Path,
) -> None:
    f = write(
        tmp_path, "def f(gold, **_):\n    return [None if g == 'bb' else 1.0 for g in gold]\n"
    )
    scored, _ = CompositeReward([source(f)], TINY, tmp_path)(EPISODES)
    assert [t and t.reward for t in scored] == [1.0, None, 1.0]
    nothing, _ = CompositeReward([source("environment", 0.0)], TINY, tmp_path)(EPISODES)
    assert [t and t.reward for t in nothing] == [0.0, 0.0, 0.0]  # nothing counts; a KL may
    nothing, _ = CompositeReward([source("environment", 0.0), source(f, 0.0)], TINY, tmp_path)(
        EPISODES
    )
    assert [t and t.reward for t in nothing] == [0.0, 0.0, 0.0]


def test_the_environments_own_reward_is_a_part_like_others(tmp_path: Path) -> None:
    """It may give none, or lose it."""
    f = write(tmp_path, "def f(completions, **_):\n    return [5.0 for _ in completions]\n")
    own = [replace(EPISODES[0], rewarded=(), rewards=[0.0] * 5), episode(0, "bb", math.nan)]
    for weight, wanted in ((1.0, [5.0, None]), (0.0, [5.0, 5.0])):
        scorer = CompositeReward([source("environment", weight), source(f)], TINY, tmp_path)
        scored, parts = scorer(own)
        assert [t and t.reward for t in scored] == wanted
        assert parts["environment"] == [None, None] and scorer.missing["environment"] == 0.5
        assert scored[0] and scored[0].rewarded == (2,)
    scored, _ = CompositeReward([source("environment")], TINY, tmp_path)(own)
    assert scored == [None, None]


def test_normalisation_is_not_poisoned(tmp_path: Path) -> None:
    """By what does not apply or is lost, at any weight."""
    said = "[None, float('nan'), 1.0, float('inf'), 1e30, 3.0]"
    f = write(
        tmp_path,
        f"def f(gold, **_):\n    return [{said}[int(g)] for g in gold]\n",
    )
    episodes = [episode(0, str(i), 10.0) for i in range(6)]
    for weight in (1.0, 0.0):
        sources = [source("environment"), source(f, weight, normalize=True)]
        scored, parts = CompositeReward(sources, TINY, tmp_path)(episodes)
        assert parts[f] == [None, None, -1.0, None, None, 1.0]
        kept = [10.0, None, 9.0, None, None, 11.0] if weight else [10.0] * 6
        assert [t and t.reward for t in scored] == kept


def test_nothing_is_scored_of_no_episodes(tmp_path: Path) -> None:
    f = write(tmp_path, "def f(completions, **_):\n    return []\n")
    scorer = CompositeReward([source("environment"), source(f)], TINY, tmp_path)
    assert scorer([]) == ([], {}) and scorer.missing == {}


SOME = """
def f(completions, **_):
    if "bad" in completions:
        raise SystemExit("no")
    return [float(len(c)) for c in completions]
"""


def test_a_function_that_raises_at_one_group_loses_that_group(tmp_path: Path) -> None:
    f = write(tmp_path, SOME)
    scorer = CompositeReward([source("environment"), source(f)], TINY, tmp_path)
    mixed = [episode(0, "bad", 1.0), episode(0, "a", 1.0), episode(1, "bb", 1.0)]
    scored, _ = scorer(mixed)
    assert [t and t.reward for t in scored] == [None, None, 3.0]
    assert scorer.missing[f] == pytest.approx(2 / 3) and "raised SystemExit" in scorer.last_failure
    scored, _ = scorer(mixed[:2])  # it has worked, so this is the group's fault
    assert scored == [None, None]
    resumed = CompositeReward([source("environment"), source(f)], TINY, tmp_path)
    resumed.load_state_dict(scorer.state_dict())
    assert resumed(mixed[:2])[0] == [None, None]
    logged = CompositeReward([source("environment"), source(f, 0.0)], TINY, tmp_path)
    assert [t and t.reward for t in logged(mixed)[0]] == [1.0, 1.0, 1.0]
    never = CompositeReward([source("environment"), source(f)], TINY, tmp_path)
    assert never([replace(mixed[0], group_id=i) for i in range(7)])[0] == [None] * 7
    with pytest.raises(ConfigError, match="raised SystemExit"):  # it never worked: a bug
        never(mixed[:2])


def test_an_error_begun_early_is_raised_in_the_end(tmp_path: Path) -> None:
    total = CompositeReward([source(write(tmp_path, "def f(**_):\n    1 / 0\n"))], TINY, tmp_path)
    total.begin(EIGHT[:1])
    with pytest.raises(ConfigError, match="f raised ZeroDivisionError"):
        total(EIGHT)


HANGS = """
import asyncio, os, threading, time
calls = []
def f(completions, **_):
    calls.append(completions)
    os.chdir("/")
    if "hang" in completions:
        while True: time.sleep(0.01)
    return [1.0] * len(completions)
async def later(completions, **_):
    calls.append(completions)
    if "hang" in completions:
        await asyncio.Event().wait()
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize("name", ["f", "later"])
def test_a_function_that_hangs_loses_its_group_and_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(build, "DEFAULT_TIMEOUT", 0.5)
    monkeypatch.chdir(tmp_path)
    threads = threading.active_count()
    f = write(tmp_path, HANGS)[:-1] + name
    total = CompositeReward([source("environment"), source(f)], TINY, tmp_path)
    calls = total.functions[0][1].__globals__["calls"]  # type: ignore[attr-defined]
    texts = ["a", "hang", "a", "hang", "hang", "hang", "a", "a"]
    episodes = [episode(i, text, 1.0) for i, text in enumerate(texts)]
    for group in episodes:
        total.begin([group])
    assert [t and t.reward for t in total(episodes)[0]] == [2, None, 2, *[None] * 5]
    assert total.missing[f] == 6 / 8
    assert total.last_failure == f"the reward function {f} took more than 0.5 s"
    assert len(calls) == 6  # of the last two it was not asked
    assert total(episodes[:1])[0] != [None]  # in the next rollout it is
    assert Path.cwd() == tmp_path
    deadline = time.monotonic() + 10
    while threading.active_count() > threads + 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == threads + 1


def test_the_projects_own_functions_end_by_themselves(tmp_path: Path) -> None:
    names = ["gearshift.rewards.code_rewards:code_share", "http://127.0.0.1:9/score"]
    names.append(write(tmp_path, "def f(**_): ..."))
    assert CompositeReward([source(n) for n in names], TINY, tmp_path)._limits == [
        math.inf,
        60,
        300,
    ]


def test_an_address_that_takes_its_whole_time_is_not_asked_for_ever(tmp_path: Path) -> None:
    asked: list[int] = []

    def wait_for_ever(handler: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        handler.wfile.flush()
        handler.rfile.read(1)  # until the other end is gone

    with serving(wait_for_ever) as url:
        wanted = RewardSource(source=url, timeout=0.05)
        total = CompositeReward([wanted], TINY, tmp_path)
        total.functions[0][1].tries = 2  # type: ignore[attr-defined]
        assert total(EIGHT)[0] == [None] * 8 and len(asked) == 6
        assert "it has not answered in full after 0.05 s, 2 times" in total.last_failure


def test_normalised_rewards_have_mean_0_and_variance_1_over_the_run(tmp_path: Path) -> None:
    running, seen = RunningMeanStd(), []
    for batch in ([3.0, 5.0, None], [10.0], [float("nan"), 4.0]):
        out = running(list(batch))
        seen += [x for x in batch if x is not None and x == x]
        for x, y in zip(batch, out, strict=True):
            if x is None:
                assert y is None
            elif x == x:
                assert y == pytest.approx((x - fmean(seen)) / (pstdev(seen) or 1.0))
    f = write(tmp_path, "def f(completions, **_):\n    return [len(c) for c in completions]\n")
    total = CompositeReward([source(f, normalize=True)], TINY, tmp_path)
    total(EPISODES)
    again = CompositeReward([source(f, normalize=True)], TINY, tmp_path)
    again.load_state_dict(total.state_dict())
    first, _ = total(EPISODES[:1])
    second, _ = again(EPISODES[:1])
    assert (
        first == second
        and first[0]
        and first[0].reward == pytest.approx((1 - fmean([1, 2, 3, 1])) / pstdev([1, 2, 3, 1]))
    )


@pytest.mark.parametrize(
    ("how", "wanted"),
    [("mean", [2.0, 1.0]), ("min", [1.0, 1.0]), ("mean_less_std", [1.0, 1.0])],
)
def test_an_ensemble(how: Any, wanted: list[float]) -> None:
    members: Any = [lambda p, c: [1.0, 1.0], lambda p, c: [3.0, 1.0]]
    assert Ensemble(members, how)([[], []], ["a", "b"]) == pytest.approx(wanted)
    members.append(lambda p, c: [None, math.nan])
    one, lost = Ensemble(members, how)([[], []], ["a", "b"])
    assert one == pytest.approx(wanted[0]) and lost is not None and math.isnan(lost)
    assert Ensemble([lambda p, c: [None]], how)([[]], ["a"]) == [None]  # type: ignore[list-item]


def test_several_folders_are_an_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ModelReward", lambda config, folder: folder.name)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    total = CompositeReward([source(f"model:{tmp_path}/a,{tmp_path}/b")], TINY, tmp_path)
    [(_, ensemble, _)] = total.models
    assert isinstance(ensemble, Ensemble) and ensemble.members == ["a", "b"]
    with pytest.raises(ConfigError, match="no reward model in"):
        CompositeReward([source(f"model:{tmp_path}/a,{tmp_path}/c")], TINY, tmp_path)


def test_a_model_alone_scores_without_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(config: Any, folder: Path) -> Any:
        return lambda prompts, completions, **_: [float(len(c)) for c in completions]

    monkeypatch.setattr(build, "ModelReward", load)
    (tmp_path / "reward").mkdir()
    total = CompositeReward(
        [source("model", 2.0), source("environment", 0.0)], TINY, tmp_path / "reward"
    )
    total.begin(EPISODES[:2])
    scored, parts = total(EPISODES)
    assert [t.reward for t in scored if t] == [2.0, 4.0, 6.0]
    assert parts["environment"] == [1.0, 2.0, 3.0]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    def reward(prompts: Any, completions: list[str]) -> list[float | None]:
        return [float(len(c)) if c else None for c in completions]

    monkeypatch.setenv("GEARSHIFT_KEY", "secret")
    with raw.serving(score_routes(reward), key="secret") as server:
        yield f"{server.url}/score"


def test_a_served_reward_is_a_function_like_others(address: str) -> None:
    prompts = [[{"role": "user", "content": "q"}]] * 2
    totals, _ = combine_rewards([("far", HttpReward(address), 2.0)], prompts, ["abc", ""], None, {})
    assert totals == [6.0, None]


def test_a_wrong_key_is_an_error_and_a_dead_address_is_lost(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEARSHIFT_KEY", "wrong")
    with pytest.raises(ConfigError, match="401"):
        HttpReward(address)([[]], ["a"])
    [lost] = HttpReward("http://127.0.0.1:9/score", tries=1)([[]], ["a"])
    assert lost is not None and math.isnan(lost)


def test_a_dead_address_leaves_the_episode_out_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client.time, "sleep", lambda seconds: None)
    far, near = "http://127.0.0.1:9/score", "gearshift.tasks.voice.commands:voice_reward"
    monkeypatch.setattr(build, "load_reward", lambda spec: lambda completions, **_: [None, 1])
    monkeypatch.setenv("TOKEN", "secret")
    asked = source(f"{far}?token=${{TOKEN}}")
    total = CompositeReward([source("environment"), asked, source(near)], TINY, tmp_path)
    episodes, parts = total(EPISODES[:2])  # whose names are metrics: without the query
    assert episodes == [None, None] and parts[far] == [None, None]
    assert total.missing == {"environment": 0.0, far: 1.0, near: 0.0}
    assert far in total.last_failure and "Connection refused, 3 times" in total.last_failure


@pytest.mark.parametrize(
    ("code", "answer", "said"),
    [
        (500, b"boom", "it answers 500 Internal Server Error, 3 times"),
        (200, b"<html>hi", "what was asked for is not in its answer '<html>hi', 3 times"),
        (200, b"[1.0]", r"is not in its answer '\[1.0\]'"),
        (200, b"[" * 9999, r"is not in its answer '\[\[\["),
        (200, b'{"rewards": [NaN]}', "gave no finite number"),
        (200, b'{"rewards": [1' + b"0" * 400 + b"]}", "gave no finite number"),
    ],
)
def test_why_an_address_gave_no_reward_is_named(
    code: int, answer: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client.time, "sleep", lambda seconds: None)
    with answering(code, answer) as url:
        total = CompositeReward([source(url)], TINY, tmp_path)
        assert total(EPISODES[:1])[0] == [None] and not total.state_dict()["worked"]
        assert url in total.last_failure and re.search(said, total.last_failure)
        logged = CompositeReward([source("environment"), source(url, 0.0)], TINY, tmp_path)
        assert logged(EPISODES[:1])[0] != [None] and not logged.last_failure


def test_a_redirect_is_refused_and_its_place_is_named(tmp_path: Path) -> None:
    with (
        answering(308, b"", Location="/score/") as url,
        pytest.raises(ConfigError, match=r"308 .*redirects to /score/; name that address"),
    ):
        CompositeReward([source(url)], TINY, tmp_path)(EIGHT)


@contextmanager
def answering(code: int, answer: bytes, **headers: str) -> Iterator[str]:
    """The address of a server that says this to everybody."""

    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(answer)

    with serving(say) as url:
        yield url


@contextmanager
def serving(say: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that answers so, once it has read what it was sent."""

    class Says(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with suppress(OSError):  # the other end is gone
                say(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Says) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
        server.shutdown()
