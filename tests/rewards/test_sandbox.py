"""Hostile programs stay in, use up nothing, and pass no test that they do not pass honestly."""

import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import ConfigError
from gearshift.rewards import sandbox, sandbox_child
from gearshift.rewards.code_rewards import code_reward, code_share
from gearshift.rewards.sandbox import Outcome, SandboxLimits, check_sandboxed, run_sandboxed
from tests.rewards.hostile import CHEATS, HARMFUL, HARMLESS

BARE = ["bwrap", "--unshare-user", "--unshare-net", "--ro-bind", "/", "/", "true"]
if shutil.which("bwrap") is None or subprocess.run(BARE, capture_output=True).returncode:
    pytestmark = pytest.mark.skip(reason="bubblewrap is missing, or may not make namespaces here")

# The odd size distinguishes this process's sandboxes from those of tests that run beside it.
SHORT = SandboxLimits(seconds=1.0, memory_mib=128 + os.getpid() % 64, output_kib=64)
PROMPT: list[Any] = [[]]


class World:
    """What a program may want: a secret in a file and in a process's environment, listeners, places
    to write, descriptors that a child would inherit.
    """

    def __init__(self, folder: Path) -> None:
        self.secret, self.folder = "top-secret " + secrets.token_hex(8), folder
        secret_file = folder / "secret.txt"
        secret_file.write_text(self.secret)
        self.leak = folder / "leak.txt"
        self.descriptors = [
            os.open(secret_file, os.O_RDONLY),
            os.open(self.leak, os.O_WRONLY | os.O_CREAT),
        ]
        for fd in self.descriptors:
            os.set_inheritable(fd, True)
        self.bystander = subprocess.Popen(["sleep", "600"], env={"SECRET": self.secret})
        self.reached: list[str] = []
        abstract = f"gearshift-{os.getpid()}"
        self.sockets = {
            "port": self.listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": self.listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "unix": self.listen(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "s")),
            "abstract": self.listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
        }
        self.known = {
            "secret_file": str(secret_file),
            "folder": str(folder),
            "marker": str(folder / "marker"),
            "name": f"marker-{os.getpid()}",
            "checkout": str(Path(__file__).parents[2]),
            "pid": self.bystander.pid,
            "parent": os.getpid(),
            "port": self.sockets["port"].getsockname()[1],
            "udp": self.sockets["udp"].getsockname()[1],
            "unix": str(folder / "s"),
            "abstract": abstract,
        }
        self.files = sorted(os.listdir(folder))

    def listen(self, family: int, kind: int, address: Any) -> socket.socket:
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen(64)
        threading.Thread(target=self.serve, args=(listener,), daemon=True).start()
        return listener

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(10)
            except OSError:
                return
            self.reached.append(str(listener))

    def given_to(self, program: str) -> str:
        return f"W = {self.known!r}\n{program}"

    def damage(self, printed: str) -> list[str]:
        """What a program has got at, in words."""
        found = []
        if self.secret in printed or "[tool.ruff" in printed:
            found.append("it read a secret")
        if "ESCAPED" in printed:
            found.append("it escaped")
        if sorted(os.listdir(self.folder)) != self.files or self.leak.read_bytes():
            found.append("it wrote")
        if self.bystander.poll() is not None:
            found.append("it killed")
        if self.reached:
            found.append("it connected")
        if any((Path(p) / self.known["name"]).exists() for p in ("/tmp", "/dev/shm", "/etc")):  # type: ignore[operator]
            found.append("it wrote elsewhere")
        return found

    def clean(self) -> None:
        time.sleep(0.05)  # a listener may get it later
        self.reached.clear()
        os.truncate(self.leak, 0)
        for name in set(os.listdir(self.folder)) - set(self.files):
            (self.folder / name).unlink()

    def close(self) -> None:
        self.bystander.kill()
        self.bystander.wait()
        for listener in self.sockets.values():
            listener.close()
        for fd in self.descriptors:
            os.close(fd)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def outcomes(world: World) -> dict[str, Outcome]:
    """The outcomes of all programs. Several run at the same time, since some wait for their limit.

    Some of them would end every process of this user, or fill its table, if there were no sandbox.
    So two harmless programs test the sandbox first.
    """
    own = run_sandboxed("import os\nprint(os.getpid())\nos.fork()", "", SHORT)
    assert int(own.stdout) < 10 and own.status == "error", own
    programs = {**HARMLESS, **HARMFUL}
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda p: run_sandboxed(world.given_to(p), "", SHORT), programs.values())
        return dict(zip(programs, runs, strict=True))


def left_over() -> list[str]:
    """Processes that come from a sandbox of these tests."""
    size = str(SHORT.memory_mib << 20)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [
        line
        for line in listed.splitlines()
        if "gearshift.rewards.sandbox_child" in line and size in line
    ]


@pytest.mark.parametrize("name", HARMLESS)
def test_the_control_without_a_sandbox_they_get_there(world: World, name: str) -> None:
    """So what is asserted below can fail."""
    done = subprocess.run(
        [sys.executable, "-c", world.given_to(HARMLESS[name])],
        capture_output=True, text=True, errors="replace", close_fds=False, cwd=world.folder,
        timeout=60,
    )  # fmt: skip
    time.sleep(0.05)
    assert world.damage(done.stdout), done
    world.clean()


@pytest.mark.parametrize("name", [*HARMLESS, *HARMFUL])
def test_none_gets_out(world: World, outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert not world.damage(outcome.stdout), outcome
    assert (outcome.status, outcome.stdout.strip()) != ("ok", "9")
    assert len(outcome.stdout) <= SHORT.output_kib * 1024
    deadline = time.monotonic() + 2
    while left_over() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over()


def test_those_that_do_not_end_are_ended(outcomes: dict[str, Outcome]) -> None:
    for name in ("sleep_for_ever", "deaf_to_signals", "fork_bomb_that_goes_on", "infinite_loop"):
        assert outcomes[name].status == "timeout", name
    assert outcomes["output_flood"].status == "output"
    for name in ("fork_bomb", "thread_bomb", "memory_bomb", "memory_bomb_in_steps"):
        assert outcomes[name].status != "ok", name


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str) -> None:
    assert check_sandboxed(CHEATS[name], "assert f(3) == 9", SHORT).status in ("error", "timeout")
    outcome = run_sandboxed(CHEATS[name] + "\ntry: print(f(3))\nexcept Exception: 1", "3\n", SHORT)
    assert (outcome.status, outcome.stdout.strip()) != ("ok", "9")


SQUARE = """
def f(x):
    return x * x
if __name__ == "__main__":
    print(f(int(input())))
"""
PLAIN = "[(1, 'a'), {2}, {'k': None}, b'x', 1.5]"


DEEPER = """
import sys, threading
from functools import lru_cache
sys.setrecursionlimit(10**6)
threading.stack_size(2**27)
@lru_cache(None)
def f(n): return 1 + f(n - 1) if n else 0
def main():
    print(f(int(input())))
    exit()
t = threading.Thread(target=main)
t.start()
t.join()
"""


def test_deep_recursion_in_a_thread() -> None:
    """The usual ways of programs written for contests."""
    assert run_sandboxed(DEEPER, "50000") == Outcome("ok", "50000\n")


def test_honest_programs_run() -> None:
    assert run_sandboxed(SQUARE, "3\n") == Outcome("ok", "9\n")
    assert run_sandboxed("import sys\nsys.exit(1)").status == "error"
    assert run_sandboxed("1 / 0").status == "error"
    hushed = (
        "import os, sys\nsys.stdout = open(os.devnull, 'w')\nprint(1)\nsys.stdout = sys.__stdout__"
    )
    assert run_sandboxed(f"{hushed}\nprint(2)") == Outcome("ok", "2\n")
    useful = "import collections, dataclasses, datetime, decimal, functools, hashlib, heapq, random"
    assert run_sandboxed(f"{useful}, re, itertools, json\nprint('é')") == Outcome("ok", "é\n")


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(3) == 9",
        "def check(g):\n    for x in (2, 3):\n        assert g(x) == x**2\ncheck(f)",
        "import math\nassert math.isclose(f(0.1), 0.01)",
        f"assert same({PLAIN}) == {PLAIN}",
        "assert type(same((1,))) is tuple and same(10**40) == 10**40",
        "try:\n    bad()\n    assert False\nexcept ValueError as e:\n    assert 'why' in str(e)",
    ],
)
def test_assertions_of_the_usual_kinds(tests: str) -> None:
    code = SQUARE + "\ndef same(x): return x\ndef bad(): raise ValueError('why')"
    assert check_sandboxed(code, tests).status == "ok"
    wrong = code.replace("x * x", "x + x + 1").replace("return x\n", "return 0\n")
    assert check_sandboxed(wrong.replace("ValueError", "KeyError"), tests).status == "error"


def test_a_row_that_cannot_be_judged_is_lost_and_named() -> None:
    """A 0 would say that the program is wrong, and one row never ends a run."""
    for tests, why in (
        ("assert f(", "not Python"),
        ("import numpy as np\nassert np.all(f(3))", "numpy"),
        ("def check(candidate):\n    assert candidate(2) == 4", "never ask"),
        (7, "must be a list"),
        ([["f"]], "must be texts"),
    ):
        rows: dict[str, Any] = {"assertions": [tests, ["assert f(3) == 9"]]}
        lost, right = code_reward(PROMPT * 2, [SQUARE] * 2, **rows)
        assert lost is not None and math.isnan(lost) and right == 1.0
        assert why in code_reward.last_failure  # type: ignore[attr-defined]
    for pair in (["3"], {"stdin": "3"}, {"stdin": {}, "stdout": "9"}, "3"):
        [lost] = code_share(PROMPT, [SQUARE], tests=[[pair]])
        assert lost is not None and math.isnan(lost)
        assert "stdin" in code_share.last_failure  # type: ignore[attr-defined]


def test_what_is_printed_is_compared_line_by_line() -> None:
    for printed, wanted, same in (
        (r"'a\r\nb  \r\n\r\n'", "a\nb", True),
        (r"'a\tb '", "a\tb\n\n", True),
        (r"'a\x0cb'", "a\nb", False),
        (r"'a\u2028b'", "a\nb", False),
        (r"'a\xa0'", "a", False),
        (r"'\na'", "a", False),
        ("'3'", 3, True),
        (r"'1\n2'", ["1", 2], True),
        ("''", None, True),
    ):
        program = f"print(end={printed})"
        [reward] = code_reward(PROMPT, [program], tests=[[{"stdin": None, "stdout": wanted}]])
        assert reward == float(same), (printed, wanted)
    program = "import os\nos.write(1, b'\\xff')"
    assert code_reward(PROMPT, [program], tests=[[{"stdin": "", "stdout": "\ufffd"}]]) == [0.0]
    given = [[{"stdin": ["1", "2"], "stdout": "3"}]]
    assert code_reward(PROMPT, ["print(int(input()) + int(input()))"], tests=given) == [1.0]


def test_the_entry_point_is_what_check_is_called_with() -> None:
    tests = "def check(candidate):\n    assert candidate(2) == 4"
    rows = {"assertions": [tests], "entry_point": ["f"]}
    assert code_reward(PROMPT, [SQUARE], **rows) == [1.0]
    assert code_reward(PROMPT, [SQUARE.replace("x * x", "x")], **rows) == [0.0]


def test_rewards_by_rows() -> None:
    good, bad = f"Here:\n```python\n{SQUARE}\n```\nDone.", "```\nprint(4)\n```"
    pairs = [{"stdin": "2", "stdout": "4"}, {"stdin": "3", "stdout": "9\n\n"}]
    rows: dict[str, Any] = {
        "tests": [pairs, pairs, None, None],
        "assertions": [None, None, ["assert f(2) == 4", "assert f(2) == 5"], ""],
    }
    completions = [good, bad, good, good]
    assert code_reward(PROMPT * 4, completions, **rows) == [1.0, 0.0, 0.0, None]
    assert code_share(PROMPT * 4, completions, **rows) == [1.0, 0.5, 0.5, None]
    shell = f"{good}\n```bash\npython square.py\n```\nThat is all."
    assert code_reward(PROMPT, [shell], tests=[pairs]) == [1.0]


def test_what_runs_inside_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sandbox would spend most of its time on that."""
    folder = Path(sandbox_child.__file__).parent
    ours = shutil.copytree(
        folder, tmp_path / "sandbox_child", ignore=shutil.ignore_patterns("*.pyc")
    )
    monkeypatch.setattr(sandbox_child, "__file__", str(ours / "__init__.py"))
    sandbox._check_sandbox_works.cache_clear()
    check_sandboxed("def f(x): return x", "assert f(1) == 1")
    assert all(Path(cache_from_source(str(path))).exists() for path in ours.glob("*.py"))


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    for cached in (sandbox._bwrap_path, sandbox._check_sandbox_works):
        cached.cache_clear()
    try:
        with pytest.raises(ConfigError, match="apt install bubblewrap"):
            code_reward(PROMPT, ["print(1)"], tests=[[{"stdin": "", "stdout": "1"}]])
    finally:
        sandbox._bwrap_path.cache_clear()


def test_a_sandbox_that_does_not_come_up_is_lost_and_no_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sandbox._check_sandbox_works()
    monkeypatch.setattr(sandbox, "_bwrap_arguments", lambda: ["--ro-bind", "/nowhere", "/usr"])
    for row in ({"tests": [[{"stdin": "", "stdout": "1"}]]}, {"assertions": ["assert f(1)"]}):
        [reward] = code_reward(PROMPT, ["print(1)"], **row)  # type: ignore[arg-type]
        assert reward is not None and reward != reward
    sandbox._check_sandbox_works.cache_clear()
    with pytest.raises(ConfigError, match="user namespaces"):
        run_sandboxed("print(1)")
    sandbox._check_sandbox_works.cache_clear()
