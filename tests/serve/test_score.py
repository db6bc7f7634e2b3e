"""What a client sends wrongly to the score server is answered with a 4xx, and it goes on."""

import json
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gearshift.errors import CapacityError, ConfigError
from gearshift.models.load import ModelConfig, load_classifier
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rewards.http import HttpReward
from gearshift.rewards.models import ModelReward
from gearshift.serve import score_request
from gearshift.serve.app import Server, ServerSettings, make_app
from gearshift.serve.exchange import LARGE
from gearshift.serve.score import score_routes
from tests.serve.raw import request, send, serving

GOOD = {"prompts": [[{"role": "user", "content": "q"}]], "completions": ["abc"]}


def reward(prompts: Any, completions: list[str], **_: Any) -> list[float | None]:
    if completions == ["too long"]:
        raise CapacityError("A sequence of 9 tokens is longer than the reward model's 8.")
    if completions == ["broken"]:
        raise RuntimeError("no memory for /home/weights\x1b")
    return [float(len(c)) for c in completions]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(score_routes(reward), patience=0.3) as server:
        yield server


def of(**changes: Any) -> bytes:
    return request(json.dumps({**GOOD, **changes}).encode())


BODY = json.dumps(GOOD).encode()
MESSAGE = GOOD["prompts"][0][0]
CASES: dict[str, tuple[bytes, int]] = {
    "no length": (request(BODY, "none:"), 411),
    "chunked": (request(b"5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked", "none:"), 411),
    "chunked with a length": (request(BODY, "Transfer-Encoding: chunked"), 411),
    "length no number": (request(BODY, "Content-Length: many"), 400),
    "length negative": (request(BODY, "Content-Length: -1"), 400),
    "length signed": (request(BODY, f"Content-Length: +{len(BODY)}"), 400),
    "length a fraction": (request(BODY, "Content-Length: 1.5"), 400),
    "length empty": (request(BODY, "Content-Length:"), 400),
    "lengths differ": (request(BODY, "Content-Length: 3", f"Content-Length: {len(BODY)}"), 400),
    "length too small": (request(BODY, "Content-Length: 5"), 400),
    "length too large": (request(BODY, f"Content-Length: {len(BODY) + 5}"), 408),
    "huge": (request(BODY, f"Content-Length: {LARGE['/score'] + 1}"), 413),
    "more than huge": (request(BODY, "Content-Length: " + "9" * 5000), 400),
    "huge and sent": (request(b" " * (4 << 20), f"Content-Length: {1 << 40}"), 413),
    "nothing": (request(b""), 400),
    "not JSON": (request(b"prompts=1"), 400),
    "half JSON": (request(BODY[:-2]), 400),
    "not UTF-8": (request(b'{"prompts": "\xff\xfe"}'), 400),
    "NaN": (request(BODY.replace(b'"abc"', b"NaN")), 400),
    "NaN beside": (request(BODY[:-1] + b', "gold": [NaN]}'), 400),
    "deep": (request(b'{"prompts": ' + b"[" * 200_000), 400),
    "deep and whole": (request(b"[" * 900 + b"]" * 900), 400),
    "a number of many digits": (request(b"[" + b"1" * 5000 + b"]"), 400),
    "a list": (request(b"[]"), 400),
    "null": (request(b"null"), 400),
    "a text": (request(b'"prompts"'), 400),
    "no prompts": (request(b'{"completions": ["a"]}'), 400),
    "no completions": (request(b'{"prompts": [[]]}'), 400),
    "empty": (of(prompts=[], completions=[]), 400),
    "one more prompt": (of(prompts=GOOD["prompts"] * 2), 400),
    "prompts a text": (of(prompts="q"), 400),
    "prompts a mapping": (of(prompts={"0": []}), 400),
    "a prompt a text": (of(prompts=["q"]), 400),
    "a prompt of token ids": (of(prompts=[[1, 2, 10**9]]), 400),
    "a message null": (of(prompts=[[None]]), 400),
    "a message without a role": (of(prompts=[[{"content": "q"}]]), 400),
    "a message with a number": (of(prompts=[[{"role": "user", "content": 3}]]), 400),
    "a message in parts": (of(prompts=[[{"role": "user", "content": [{"text": "q"}]}]]), 400),
    "a completion of token ids": (of(completions=[[1, -5, 10**9]]), 400),
    "a completion null": (of(completions=[None]), 400),
    "a completion a number": (of(completions=[3]), 400),
    "half a character": (of(completions=["\ud800"]), 400),
    "half a character in a prompt": (of(prompts=[[{**MESSAGE, "content": "\udfff"}]]), 400),
    "half a character in a name": (of(prompts=[[{**MESSAGE, "\ud800": ""}]]), 400),
    "ended a number": (of(ended=[1]), 400),
    "ended of another": (of(ended=[True, False]), 400),
    "too long for the model": (of(completions=["too long"]), 400),
    "another path": (request(BODY, line="POST /elsewhere HTTP/1.1"), 404),
    "a path that is none": (request(BODY, line="POST //[ HTTP/1.1"), 404),
    **{f"{m}": (request(b"", line=f"{m} /score HTTP/1.1"), 405)
       for m in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE", "score")},
    "GET elsewhere": (request(b"", line="GET /scores HTTP/1.1"), 404),
    "another version": (request(BODY, line="POST /score HTTP/9.9"), 400),
    "no version": (b"POST /score\r\n\r\n", 400),
    "the oldest version": (b"GET /score\r\n\r\n", 400),
    "a line of noise": (b"\x00\xff\x16\x03\x01 hello there you\r\n\r\n", 400),
    "an empty line": (b"\r\n\r\n", 400),
    "a long line": (request(BODY, line="POST /" + "a" * 70_000 + " HTTP/1.1"), 431),
    "a long header": (request(BODY, "X: " + "a" * 70_000), 431),
    "a header line that is none": (request(BODY, f"Content-Length : {len(BODY)}", "none:"), 400),
    "no host": (request(BODY, "host:"), 400),
    "two hosts": (request(BODY, "Host: localhost", "Host: example.org"), 400),
    "another host": (request(BODY, "Host: example.org"), 403),
    "another host with a port": (request(BODY, "Host: 127.0.0.1.example.org:80"), 403),
    "another host in the line": (request(BODY, line="POST http://a.b/score HTTP/1.1"), 403),
    "a page in a browser": (request(BODY, "Origin: http://localhost"), 403),
    "a form": (request(BODY, "Content-Type: text/plain"), 415),
    "no type": (request(BODY, "content-type:"), 415),
    "another expectation": (request(BODY, "Expect: 200-ok"), 417),
    "a key twice": (request(BODY[:-1] + b', "completions": ["b"]}'), 400),
    "a key of a message twice": (request(BODY.replace(b'"role"', b'"role": "a", "role"')), 400),
    "many rows": (of(prompts=GOOD["prompts"] * 1025, completions=["a"] * 1025), 413),
    "many messages": (of(prompts=[GOOD["prompts"][0] * (score_request.MAX_MESSAGES + 1)]), 413),
    "huge ended": (of(ended=[True] * 100_000), 400),
    "null bytes": (b"POST /score\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "many headers": (request(BODY, *(f"X-{i}: 1" for i in range(200))), 431),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_request_is_told(
    server: Server, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, wanted = CASES[name]
    status, head, body = send(server, data)
    assert status == wanted and 400 <= status < 500
    assert b"application/json" in head and b"Traceback" not in body and len(body) < 400
    assert b"connection: close" in head.lower() and b"Python" not in head
    if not data.startswith(b"HEAD"):
        assert json.loads(body)["error"]
    if status == 405:
        assert b"allow: POST" in head
    assert send(server, request(BODY))[0] == 200  # one bad request does not stop the server
    assert capsys.readouterr().err == ""


def test_good_requests_of_other_shapes(server: Server) -> None:
    for data in (
        request(BODY), request(BODY, line="POST /score HTTP/1.0"),
        request(BODY, line="POST /score/?a=1 HTTP/1.1"),
        request(BODY, line="POST http://127.0.0.1:1/score HTTP/1.1"), of(gold=[3]),
        request(BODY, "Host: LOCALHOST:8000"), request(BODY, "Host: [::1]:8000"),
        request(BODY, "Content-Type: Application/JSON; charset=utf-8"),
        request(BODY, "host:", line="POST /score HTTP/1.0"), 
        request(BODY, f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY)}"),
        of(prompts=[[{**MESSAGE, "name": "A"}]]), request(json.dumps(GOOD).encode("utf-16")),
    ):  # fmt: skip
        status, _, body = send(server, data)
        assert status == 200 and json.loads(body) == {"rewards": [3.0]}


def test_a_body_may_wait_until_it_is_wanted(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(request(BODY, "Expect: 100-continue").removesuffix(BODY))
        assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")
        client.sendall(BODY)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    refused = send(server, request(b"", f"Content-Length: {1 << 30}", "Expect: 100-continue"))
    assert refused[0] == 413  # before the body is sent


def test_a_reward_that_fails_may_be_asked_again(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    status, head, body = send(server, of(completions=["broken"]))
    assert status == 503 and b"retry-after" in head and b"RuntimeError" in body
    assert b"memory" not in body and b"/home" not in body
    assert capsys.readouterr().err == (
        "gearshift: a request failed: RuntimeError: no memory for /home/weights\\x1b\n"
    )
    assert send(server, of())[0] == 200


def test_no_client_holds_up_another() -> None:
    """While the model works, refusals come at once; one that waits too long may come again."""
    go, begun = threading.Event(), threading.Event()

    def slow(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        begun.set()
        assert go.wait(30)
        return [1.0]

    key = "Authorization: Bearer k"
    answers: list[int] = []
    with serving(score_routes(slow), key="k", patience=0.3) as server:
        first = threading.Thread(target=lambda: answers.append(send(server, request(BODY, key))[0]))
        first.start()
        try:
            assert begun.wait(30)
            assert send(server, request(BODY))[0] == 401
            assert send(server, request(b"", f"Content-Length: {1 << 40}"))[0] == 401
            assert send(server, request(BODY, key, line="POST / HTTP/1.1"))[0] == 405
            assert send(server, request(b"", key, line="GET /score HTTP/1.1"))[0] == 405
            status, head, _ = send(server, request(BODY, key))
            assert status == 503 and b"retry-after: 2" in head
            # it has the key
            assert send(server, request(BODY, key, "Host: behind.a.proxy"))[0] == 503
        finally:
            go.set()
            first.join(30)
    assert answers == [200]


def test_a_large_group_is_sent_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEARSHIFT_REWARD_KEY", raising=False)
    far = HttpReward(f"http://127.0.0.1:{server.port}/score")
    texts = ["a" * (i % 7) for i in range(2 * 1024 + 3)]
    prompts, ended = GOOD["prompts"] * len(texts), [True] * len(texts)
    assert far(prompts, texts, None, ended=ended, gold=None) == [float(len(t)) for t in texts]


def test_a_body_in_drops_is_no_request(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request(BODY).removesuffix(BODY))
        client.settimeout(0.02)
        for byte in b" " * 150:
            try:
                client.send(bytes([byte]))
                assert client.recv(12) == b"HTTP/1.1 408"
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("the server has waited")


def test_who_is_silent_or_leaves_holds_up_nobody(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    address = ("127.0.0.1", server.port)
    silent = socket.create_connection(address)
    with socket.create_connection(address) as gone:
        gone.sendall(request(BODY)[:-3])
    assert send(server, of())[0] == 200
    silent.settimeout(5)
    assert silent.recv(100) == b""  # closed
    silent.close()
    assert capsys.readouterr().err == ""


def test_a_model_is_asked_texts_of_any_length(tmp_path: Any) -> None:
    load_classifier(ModelConfig(name="tiny")).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with serving(score_routes(ModelReward(ModelConfig(), tmp_path))) as server:
        url = f"{server.url}/score"
        status, _, body = send(server, of(completions=["x" * 5000]))
        assert status == 422 and "completions[0] is too long" in json.loads(body)["error"]
        short, lost = HttpReward(url)(GOOD["prompts"] * 2, ["abc", "x" * 5000])
        assert [short] == HttpReward(url)(GOOD["prompts"], ["abc"])
        assert lost is not None and math.isnan(lost)
        status, _, body = send(server, of(completions=["\x00\u200b\U0010ffff <|im_end|>"]))
        assert status == 200 and isinstance(json.loads(body)["rewards"][0], float)


def test_where_nothing_can_listen_is_an_error(server: Server) -> None:
    for port in (server.port, 70_000):
        with pytest.raises(ConfigError, match=f"Nothing can listen on 127.0.0.1:{port}"):
            Server(make_app([], ServerSettings(port=port)))


def test_keys_go_to_the_host_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(url: str, key_env: str | None = None) -> str | None:
        return HttpReward(url, key_env=key_env).address.key

    monkeypatch.setenv("GEARSHIFT_KEY", "the server's")
    monkeypatch.setenv("MINE", "mine")
    monkeypatch.delenv("GEARSHIFT_REWARD_KEY", raising=False)
    near, far = "http://localhost:8000/score", "https://example.org/score"
    assert key(near) == key("http://[::1]/score") == "the server's"
    assert key(far) is None and key(far, "MINE") == "mine"
    monkeypatch.setenv("GEARSHIFT_REWARD_KEY", "rewards'")
    assert key(near) == key(far) == "rewards'"
    with pytest.raises(ConfigError, match="key_env names NONE"):
        key(far, "NONE")
    with pytest.raises(ConfigError, match="no address"):
        key("http://")
