"""A server that answers as vLLM does, over an engine of this package; and the faults that real ones
have.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.models.load import ModelConfig, load_policy
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import tiny_model

_LOADING = threading.Lock()
"""transformers loads one model at a time."""


@dataclass
class FakeVLLM:
    """One server. `fault` names what is wrong with it, `times` for how many requests."""

    fault: str = ""
    times: int = 1 << 30
    seen: Counter[str] = field(default_factory=Counter)
    """How often each path was asked for."""
    keys: set[str | None] = field(default_factory=set)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        model = tiny_model()
        with torch.no_grad():  # the weights that it starts with are not the trainer's
            for parameter in model.parameters():
                parameter.mul_(0.5)
        self.engine = Engine(model, tiny_tokenizer(), EngineConfig())
        self.lock = threading.Lock()

    def faulty(self, fault: str) -> bool:
        """Whether this request meets the fault."""
        if self.fault != fault or self.times <= 0:
            return False
        self.times -= 1
        return True

    def reload(self, folder: str) -> None:
        """Take a saved model's weights, all of them unless this is the fault."""
        assert Path(folder, "config.json").exists()
        if self.faulty("stale"):
            return
        with _LOADING:
            model = load_policy(ModelConfig(name=folder, dtype="float32", device="cpu"))
        fresh = model.state_dict()
        if self.faulty("head"):  # as vLLM 0.32 leaves a tied head
            fresh = {k: v for k, v in fresh.items() if "lm_head" not in k and "embed" not in k}
        with torch.no_grad():
            for name, tensor in self.engine.model.state_dict().items():
                tensor.copy_(fresh.get(name, tensor))
        self.engine.weights_changed()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion as `/v1/completions` gives it."""
        taken = ("temperature", "top_p", "min_p", "seed", "repetition_penalty")
        params = SamplingParams(
            max_new_tokens=body["max_tokens"],
            min_new_tokens=body["min_tokens"],
            top_k=max(0, body["top_k"]),
            stop_token_ids=tuple(body["stop_token_ids"]),
            **{name: body[name] for name in taken},
        )
        assert body["ignore_eos"] and body["include_stop_str_in_output"]
        assert set(body["stop_token_ids"]) >= self.engine.end_tokens
        with self.engine.generating():
            [[one]] = self.engine.generate([body["prompt"]], params)
        tokens, logprobs, reason = one.token_ids, one.drawn_logprobs, one.finish_reason
        if self.faulty("raw"):  # without --logprobs-mode processed_logprobs
            logprobs = [x * (params.temperature or 1.0) for x in logprobs]
        if self.faulty("truncated"):
            tokens, logprobs, reason = tokens[:-1], logprobs[:-1], "length"
        if self.faulty("aborted"):
            reason = "abort"
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        return {"choices": [{**choice, "finish_reason": reason}]}


@contextmanager
def serving(*servers: FakeVLLM) -> Iterator[tuple[str, ...]]:
    """The addresses of these servers while they run."""
    running = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake)) for fake in servers]
    for fake, server in zip(servers, running, strict=True):
        fake.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield tuple(fake.url for fake in servers)
    finally:
        for fake, server in zip(servers, running, strict=True):
            fake.closing.set()
            server.shutdown()
            server.server_close()


def _handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            answer: Any = None
            with fake.lock:
                fake.seen[self.path] += 1
                fake.keys.add(self.headers["Authorization"])
                dead = fake.faulty("dead")
                status = 500 if fake.faulty("broken") else 200
                slow = self.path == "/v1/completions" and fake.faulty("slow")
                if self.path == "/v1/completions" and status == 200 and not dead:
                    answer = fake.complete(body)
                if self.path == "/collective_rpc" and status == 200 and not dead:
                    assert body["method"] == "reload_weights"
                    fake.reload(body["kwargs"]["weights_path"])
                    answer = {"results": [None]}
            if self.path == "/reset_prefix_cache":
                answer = {"success": not fake.faulty("busy")}
            if slow:
                fake.closing.wait(60)
            if dead:
                return self.connection.close()
            with suppress(BrokenPipeError):
                self.say(status, answer)

        def say(self, status: int, answer: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if answer else b"")

        def log_message(self, *args: Any) -> None: ...

    return Handler
