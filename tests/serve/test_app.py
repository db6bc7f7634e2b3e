"""The app answers only who may ask, within its bounds, and ends in order."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gearshift.errors import ConfigError
from gearshift.serve.api_error import ApiError
from gearshift.serve.app import Server, ServerSettings, make_app
from gearshift.serve.body import json_object
from gearshift.serve.events import EventStream
from tests.serve.raw import error_of, request, send, serving

ended: list[str] = []
begun = threading.Event()


async def _echo(request: Request) -> Response:
    body = await json_object(request)
    if body.get("break"):
        raise RuntimeError("no memory for /home/weights")
    return JSONResponse(body)


async def _slow(_: Request) -> Response:
    begun.set()
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("slow")
    return Response()


async def _events(request: Request) -> Response:
    async def pieces() -> AsyncGenerator[str, None]:
        try:
            yield "data: 1\n\n"
            if request.query_params.get("fail"):
                raise ApiError(500, "server_error", "it failed")
            begun.set()
            await asyncio.sleep(60)
        finally:
            ended.append("events")

    return EventStream(pieces(), every=0.05)


ROUTES = [
    Route("/v1/echo", _echo, methods=["POST"]),
    Route("/api/echo", _echo, methods=["POST"]),
    Route("/v1/slow", _slow, methods=["POST"]),
    Route("/v1/events", _events, methods=["POST"]),
    Route("/v1/list", lambda _: JSONResponse([])),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ROUTES, patience=0.5, max_body=1000) as server:
        yield server


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    allowed = {"allow_host": ("my.host",), "allow_origin": ("https://a.example",)}
    with serving(ROUTES, key="k3y", **allowed) as server:
        yield server


@pytest.fixture(autouse=True)
def forget() -> None:
    ended.clear()
    begun.clear()


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    own = [] if any(h.lower().startswith("host:") for h in headers) else ["Host: localhost"]
    lines = [f"{method} {path} HTTP/1.1", *own, "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(path: str, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(data, *headers, line=f"POST {path} HTTP/1.1")


def test_answers_carry_an_id_and_no_name_of_a_library(server: Server) -> None:
    status, head, body = send(server, post("/v1/echo", {"a": 1}))
    assert (status, json.loads(body)) == (200, {"a": 1})
    assert b"x-request-id: req_" in head and b"\nrequest-id: req_" in head
    assert b"nosniff" in head and b"uvicorn" not in head.lower()
    assert send(server, get("/health"))[2] == b'{"status":"ok"}'
    assert send(server, get("/", method="HEAD"))[0] == 200


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (get("/v1/nothing"), 404, "not_found"),
        (get("/v1/echo"), 405, "method_not_allowed"),
        (get("/v1/../etc"), 404, "not_found"),
        (get("/v1/%2e%2e/etc"), 404, "not_found"),
        (get("/v1/a%00"), 404, "not_found"),
        (post("/v1/echo", b"{", "Content-Type: text/plain"), 415, "unsupported_media_type"),
        (post("/v1/echo", b"{"), 400, "invalid_json"),
        (post("/v1/echo", b'{"a": NaN}'), 400, "invalid_json"),
        (post("/v1/echo", b'{"a": 1, "a": 2}'), 400, "invalid_json"),
        (post("/v1/echo", b'{"a":' + b"[" * 900), 400, "invalid_json"),
        (post("/v1/echo", b"[]"), 400, "invalid_value"),
        (post("/v1/echo", b" " * 1001), 413, "request_too_large"),
        (post("/v1/echo", b"", "Content-Length: 1001"), 413, "request_too_large"),
        (post("/v1/echo", b"x", "Content-Length: 9"), 408, "request_timeout"),
        (post("/v1/echo", b"x", "Content-Encoding: gzip"), 415, "unsupported_encoding"),
        (post("/v1/echo", b"x", "Expect: all"), 417, "invalid_value"),
        (post("/v1/echo", {}, "Host: a.b", "Host: a.b"), 400, "http"),
        (post("/v1/echo", {}, *(f"X-{i}: 1" for i in range(200))), 431, "headers_too_large"),
        (post("/v1/echo", {}, "X: " + "a" * 40_000), 431, "headers_too_large"),
        (post("/v1/echo", {}, "X: " + "a" * 900_000), 431, "http"),
        (b"hello there\r\n\r\n", 400, "http"),
        (post("/v1/echo", {"break": 1}), 500, "server_error"),
    ],
)
def test_t27_what_is_wrong_gets_one_line_of_json(
    server: Server, data: bytes, status: int, code: str
) -> None:
    found, head, body = send(server, data)
    error = error_of(body)
    assert (found, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"} and b"application/json" in head
    assert b"Traceback" not in body and b"/home" not in body
    assert send(server, post("/v1/echo", {}))[0] == 200


def test_chunked_bodies_have_the_same_bound(server: Server) -> None:
    def chunked(size: int) -> bytes:
        data = b'{"a": "' + b"x" * (size - 9) + b'"}'
        parts = [data[i : i + 100] for i in range(0, size, 100)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
        return request(body, "none:", "Transfer-Encoding: chunked", line="POST /v1/echo HTTP/1.1")

    assert send(server, chunked(1000))[0] == 200
    assert send(server, chunked(1001))[0] == 413


def test_a_failure_is_printed_here_and_not_sent(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    send(server, post("/v1/echo", {"break": 1}))
    assert "a request failed: RuntimeError: no memory" in capsys.readouterr().err


def test_t21_the_key_opens_all_and_its_lack_nothing(keyed: Server) -> None:
    for path in ("/v1/list", "/v1/nothing", "/openapi.json", "/metrics", "/api/runs"):
        for headers in ((), ("Authorization: Bearer wrong",), ("X-Api-Key: k3",),
                        ("Authorization: Bearer ",), ("Authorization: k3y",)):  # fmt: skip
            status, head, body = send(keyed, get(path, *headers))
            assert status == 401 and error_of(body)["code"] == "invalid_api_key"
            assert b"www-authenticate: Bearer" in head
    for header in ("Authorization: Bearer k3y", "authorization: bearer k3y", "X-Api-Key: k3y"):
        assert send(keyed, get("/v1/list", header))[0] == 200
    assert send(keyed, get("/health"))[0] == send(keyed, get("/"))[0] == 200


def test_an_empty_key_is_ignored_where_there_is_none(server: Server) -> None:
    assert send(server, get("/v1/list", "Authorization: Bearer "))[0] == 200
    assert send(server, get("/v1/list", "Authorization: Bearer any"))[0] == 200


def test_beyond_loopback_a_key_is_needed() -> None:
    with pytest.raises(ConfigError, match="set GEARSHIFT_KEY"):
        Server(make_app([], ServerSettings(host="0.0.0.0", port=0)))


@pytest.mark.parametrize("path", ["/health", "/", "/v1/list", "/v1/nothing", "/web/a.js"])
def test_t22_only_names_of_this_machine_are_answered(
    server: Server, keyed: Server, path: str
) -> None:
    for host in (
        "example.org",
        "127.0.0.1.example.org",
        "localhost.example.org:80",
        "",
        "10.0.0.1",
    ):
        for one in (server, keyed):
            status, _, body = send(one, get(path, f"Host: {host}"))
            assert (status, error_of(body)["code"]) == (403, "forbidden_host")
    status, _, _ = send(server, get(f"http://example.org{path}"))
    assert status == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert send(server, get(path, f"Host: {host}"))[0] != 403
    assert send(keyed, get("/health", "Host: my.host:80"))[0] == 200
    # a page of another site does not know the key
    assert send(keyed, get("/v1/list", "Host: proxy", "X-Api-Key: k3y"))[0] == 200


def test_t22_pages_of_other_sites_change_nothing(server: Server) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://[", "file://"):
        status, _, body = send(server, post("/v1/echo", {}, f"Origin: {origin}"))
        assert (status, error_of(body)["code"]) == (403, "forbidden_origin")
    assert send(server, post("/v1/echo", {}, "Origin: http://localhost"))[0] == 200
    for site, mode, wanted in (
        ("cross-site", "cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "navigate", 200),
        ("same-origin", "cors", 200),
    ):
        headers = (f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}")
        assert send(server, get("/v1/list", *headers))[0] == wanted


def test_an_allowed_origin_may_read(keyed: Server) -> None:
    asks = ("Origin: https://a.example", "Sec-Fetch-Site: cross-site")
    status, head, _ = send(keyed, get("/v1/echo", *asks, method="OPTIONS"))
    assert status == 204 and b"access-control-allow-headers: Authorization" in head
    status, head, _ = send(keyed, post("/v1/echo", {}, *asks, "X-Api-Key: k3y"))
    assert status == 200 and b"access-control-allow-origin: https://a.example" in head
    assert send(keyed, post("/v1/echo", {}, *asks))[0] == 401
    status, head, _ = send(keyed, post("/v1/echo", {}, "Origin: https://b.example"))
    assert status == 403 and b"access-control" not in head


def test_t23_calls_of_pages_need_what_a_form_cannot_send(server: Server) -> None:
    good = ("Content-Type: application/json", "X-Gearshift: 1")
    assert send(server, post("/api/echo", {}, *good))[0] == 200
    assert send(server, post("/api/echo", {}, good[0]))[0] == 403
    assert send(server, post("/api/echo", {}, "Content-Type: text/plain", good[1]))[0] == 415


def test_t23_a_page_gets_a_cookie_for_the_key(keyed: Server) -> None:
    page = ("X-Gearshift: 1", "Origin: http://localhost")
    for wrong in ("no", None, 3):
        assert send(keyed, post("/api/key", {"key": wrong}, *page))[0] == 401
    assert send(keyed, post("/api/key?key=k3y", {}, *page))[0] == 401
    status, head, _ = send(keyed, post("/api/key", {"key": "k3y"}, *page))
    assert status == 204 and b"HttpOnly; SameSite=Strict" in head and b"k3y" not in head
    cookie = head.split(b"set-cookie: ")[1].split(b";")[0].decode()
    with_it = f"Cookie: other=1; {cookie}"
    assert send(keyed, get("/v1/list", with_it))[0] == 200
    assert send(keyed, get("/v1/list", with_it + "0"))[0] == 401
    assert send(keyed, get("/v1/list", with_it, "Host: example.org"))[0] == 403
    assert send(keyed, post("/v1/echo", {}, with_it))[0] == 403
    assert send(keyed, post("/v1/echo", {}, with_it, *page))[0] == 200


@pytest.mark.parametrize("path", ["/v1/slow", "/v1/events"])
def test_a_client_that_leaves_ends_its_work(
    server: Server, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gearshift.serve")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(post(path, {}))
        assert begun.wait(10)
    for _ in range(200):
        if ended and caplog.messages:
            break
        time.sleep(0.02)
    assert ended == [path.removeprefix("/v1/")]
    assert f"POST {path} 499" in caplog.messages[-1]


def test_an_error_in_a_stream_is_its_last_event(server: Server) -> None:
    status, _, body = send(server, post("/v1/events?fail=1", {}))
    events = [line for line in body.splitlines() if line.startswith(b"data: ")]
    assert status == 200 and events[0] == b"data: 1"
    assert json.loads(events[-1][6:])["error"]["message"] == "it failed"
    assert ended == ["events"]


def test_t27_one_client_too_many_is_refused() -> None:
    with serving(ROUTES, connections=2) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address), socket.create_connection(address):
            time.sleep(0.1)
            status, head, body = send(server, b"")
            assert status == 503 and b"Retry-After" in head and error_of(body)
        for _ in range(100):
            time.sleep(0.02)
            if (status := send(server, get("/health"))[0]) == 200:
                break
        assert status == 200


def test_a_head_in_drops_is_no_request(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(0.05)
        for byte in get("/health") * 3:
            try:
                client.send(bytes([byte]))
                assert client.recv(1) == b""
                break
            except TimeoutError:
                continue
            except OSError:  # the server has closed
                break
        else:
            pytest.fail("the server has waited")


def test_t14_a_client_that_does_not_read_is_dropped() -> None:
    async def endless(_: Request) -> Response:
        async def pieces() -> AsyncGenerator[str, None]:
            try:
                while True:
                    yield "x" * 10_000
            finally:
                ended.append("endless")

        return EventStream(pieces())

    with (
        serving([Route("/v1/endless", endless)], patience=0.3) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.sendall(get("/v1/endless"))
        for _ in range(200):
            if ended:
                break
            time.sleep(0.05)
        assert ended == ["endless"]
        assert send(server, get("/health"))[0] == 200


def test_while_loading_only_health_answers() -> None:
    with serving(ROUTES) as server:
        server.state.loading = True
        status, _, body = send(server, get("/health"))
        assert (status, body) == (503, b'{"status":"loading"}')
        status, head, body = send(server, get("/v1/list"))
        assert status == 503 and error_of(body)["code"] == "not_ready" and b"retry-after" in head
        server.state.loading = False
        assert send(server, get("/v1/list"))[0] == 200


def test_a_silent_stream_is_kept_alive(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(post("/v1/events", {}))
        got = b""
        while got.count(b": alive") < 2:
            part = client.recv(1000)
            assert part
            got += part
    assert b"cache-control: no-cache" in got and b"data: 1" in got


@pytest.mark.parametrize("path", ["/v1/slow", "/v1/events"])
def test_what_does_not_end_in_time_gets_one_error(path: str) -> None:
    with serving(ROUTES) as server:
        answers: list[tuple[int, bytes, bytes]] = []
        client = threading.Thread(target=lambda: answers.append(send(server, post(path, {}))))
        client.start()
        assert begun.wait(10)
        assert server.stop(drain=0.2)
        client.join(10)
    [(status, _, body)] = answers
    assert status == (503 if path == "/v1/slow" else 200) and ended
    assert b"the server is stopping" in body
