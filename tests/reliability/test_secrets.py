"""No key of an address reaches a run's folder or a terminal, whatever the server says."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest

from gearshift.cli.main import main

pytestmark = pytest.mark.slow
TINY = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
TOKEN, KEY = "t0ken+of/mine=", "k3y-of-mine"
FORMS = [
    form.encode()
    for secret in (TOKEN, KEY)
    for form in (secret, quote(secret), quote(secret, safe=""),
                 base64.b64encode(secret.encode()).decode())
]  # fmt: skip


class Echo(BaseHTTPRequestHandler):
    """A server that repeats what it was sent, and sometimes gives scores."""

    statuses: ClassVar[list[int]] = []
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Echo.asked.append(f"{self.path} {self.headers['Authorization']}")
        status = Echo.statuses.pop(0) if Echo.statuses else 200
        said = f"\x1b[2J no: {self.path} {self.headers} {TOKEN} {self.headers['Authorization']}"
        count = len(body.get("completions", [1]))
        answer: Any = {"error": said} if status != 200 else {"rewards": [0.5] * count}
        self.send_response(status, f"no {KEY}")
        self.send_header("Location", f"http://{KEY}@127.0.0.1{self.path}")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SCORE_TOKEN", TOKEN)
    monkeypatch.setenv("SCORE_KEY", KEY)
    Echo.statuses, Echo.asked = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/score"
    server.shutdown()
    server.server_close()


def run(folder: Path, source: str, *more: str) -> None:
    kind = ", judge: {model: m}" if source.startswith("judge") else ""
    rewards = f"[{{source: '{source}', key_env: SCORE_KEY{kind}}}]"
    main([
        "run", TINY, f"run.dir={folder}", "sft=null", "reward=null", "rl.steps=1",
        f"rl.rewards={rewards}", *more,
    ])  # fmt: skip


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Nothing of the secrets is in the folder or was printed; returns what was printed."""
    out, err = capsys.readouterr()
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for place, text in {**written, "printed": (out + err).encode()}.items():
        assert not [form for form in FORMS if form in text], place
    assert "\x1b" not in out + err
    return out + err


def test_a_run_keeps_the_names_alone(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Echo.statuses = [500, 500, 500]  # a group is lost
    run(tmp_path / "run", f"{address}?token=${{SCORE_TOKEN}}")
    assert Echo.asked[0] == f"/score?token={quote(TOKEN, safe='')} Bearer {KEY}"
    check(tmp_path / "run", capsys)
    assert "?token=${SCORE_TOKEN}" in (tmp_path / "run" / "recipe.yaml").read_text()
    metrics = (tmp_path / "run" / "rl" / "metrics.jsonl").read_text()
    assert f'"rewards/{address}/mean"' in metrics and "SCORE_TOKEN" not in metrics


@pytest.mark.parametrize("status", [403, 302, 500])
@pytest.mark.parametrize("kind", ["", "judge:"])
def test_a_server_that_refuses_is_told_without_them(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, status: int, kind: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda _: None)
    Echo.statuses = [status] * 1000
    with pytest.raises(SystemExit):
        run(tmp_path / "run", f"{kind}{address}?token=${{SCORE_TOKEN}}")
    said = check(tmp_path / "run", capsys).splitlines()[-1]
    assert said.startswith("gearshift: ") and str(status) in said and len(said) < 600


@pytest.mark.parametrize("place", ["?token={}", "?{}", "#{}", "?a=${{SCORE_TOKEN}}&b={}"])
def test_an_address_that_holds_one_is_refused(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "run", address + place.format(KEY))
    said = check(tmp_path / "run", capsys)
    assert "`rl.rewards.0.source`" in said and "${NAME}" in said
    assert not (tmp_path / "run").exists() and not Echo.asked


def test_a_variable_that_is_not_set_is_told(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("SCORE_TOKEN")
    main(["run", TINY, "--dry-run", f"rl.rewards=[{{source: '{address}?t=${{SCORE_TOKEN}}'}}]"])
    with pytest.raises(SystemExit):
        run(tmp_path / "run", f"{address}?t=${{SCORE_TOKEN}}")
    assert "names ${SCORE_TOKEN}, which is not set; export it" in check(tmp_path / "run", capsys)
