"""A served reward model answers whoever asks rightly, whatever others do, and ends in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gearshift.models.load import ModelConfig, load_classifier
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rewards.http import HttpReward
from tests.serve.raw import request
from tests.serve.test_score import BODY

pytestmark = pytest.mark.slow
PROMPT = [{"role": "user", "content": "q"}]
SLOW = """
import sys, time
from gearshift.serve.app import Server, ServerSettings, make_app
from gearshift.serve.score import score_routes

def slow(prompts, completions, **_):
    print("working", flush=True)
    time.sleep(2)
    return [1.0] * len(completions)

server = Server(make_app(score_routes(slow), ServerSettings(port=0, drain=20.0)))
print(server.port, flush=True)
sys.exit(128 + server.run())
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], int]]:
    folder = tmp_path_factory.mktemp("model")
    load_classifier(ModelConfig(name="tiny")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-m", "gearshift", "serve", str(folder), "--port", "0"]
    server = started(command)
    assert server.stdout
    yield server, int(server.stdout.readline().removesuffix("/score\n").rpartition(":")[2])
    server.kill()
    server.communicate()


def started(command: list[str]) -> subprocess.Popen[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GEARSHIFT_")}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=plain)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def asked(port: int) -> tuple[int, bytes]:
    with connect(port) as client:
        client.sendall(request(BODY))
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


def test_a_hundred_at_once_are_answered(served: tuple[subprocess.Popen[str], int]) -> None:
    _, port = served
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(asked, [port] * 100))
    assert {status for status, _ in answers} == {200}
    assert len({body for _, body in answers}) == 1


def test_rude_clients_are_nobody_elses_matter(served: tuple[subprocess.Popen[str], int]) -> None:
    """Half of them say nothing, and half send a byte now and then, or more than they say."""
    server, port = served
    [wanted] = HttpReward(f"http://127.0.0.1:{port}/score")([PROMPT], ["abc"])
    rude = [connect(port) for _ in range(100)]
    stop = threading.Event()

    def drip() -> None:
        for byte in request(b" " * 10_000 + BODY):
            for client in rude[::2]:
                try:
                    client.send(bytes([byte]))
                except OSError:
                    continue
            if stop.wait(0.1):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        for deep in (b"[" * 1_000_000, b'{"prompts":' * 100_000, b"\x00\xff" * 100_000):
            with connect(port) as client:
                client.sendall(request(deep))
                assert client.recv(100).startswith(b"HTTP/1.1 400")
        reward = HttpReward(f"http://127.0.0.1:{port}/score")
        for _ in range(20):
            assert reward([PROMPT], ["abc"]) == [wanted]
    finally:
        stop.set()
        dripping.join()
        for client in rude:
            client.close()
    assert server.poll() is None and asked(port)[0] == 200


def test_threads_and_descriptors_are_given_back(served: tuple[subprocess.Popen[str], int]) -> None:
    server, port = served

    def held() -> tuple[int, int]:
        place = Path(f"/proc/{server.pid}")
        return len([*(place / "task").iterdir()]), len([*(place / "fd").iterdir()])

    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    asked(port)
    time.sleep(1)
    before = held()
    for _ in range(200):
        asked(port)
    for _ in range(100):
        if held() <= before:
            break
        time.sleep(0.1)
    assert held()[1] <= before[1] and held()[0] <= before[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_in_work_end(number: int) -> None:
    server = started([sys.executable, "-c", SLOW])
    assert server.stdout
    port = int(server.stdout.readline())
    with connect(port) as silent, connect(port) as client:
        client.sendall(request(BODY))
        assert server.stdout.readline() == "working\n"
        server.send_signal(number)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"rewards": [1.0]}
        _, err = server.communicate(timeout=60)
        assert server.returncode == 128 + number and "Traceback" not in err
        assert silent.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_a_model_that_does_not_end_is_left() -> None:
    script = SLOW.replace("    time.sleep(2)", "    import torch\n    " + "; ".join([
        "a = torch.ones(600, 600)",
        "[torch.matmul(a, a) for _ in range(10**6)]",
    ])).replace("import sys, time", "import sys").replace("20.0", "1.0")  # fmt: skip
    server = started([sys.executable, "-c", script])
    assert server.stdout
    with connect(int(server.stdout.readline())) as client:
        client.sendall(request(BODY))
        assert server.stdout.readline() == "working\n"
        time.sleep(1)
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM
    assert err == "gearshift: stopped before every request had an answer.\n"


def test_the_command_ends_with_a_word(served: tuple[subprocess.Popen[str], int]) -> None:
    server, _ = served
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM
    assert err == "gearshift: stopped.\n"
