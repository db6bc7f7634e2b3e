"""How far both gears are from each other and from Hugging Face's own forward, for any checkpoint on
this machine: `gearshift parity`. It is the check of the engine's creation, made visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, cycle, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gearshift.batch import pack_groups
from gearshift.engine import Engine
from gearshift.engine.block_cache import KVCache
from gearshift.engine.cached_forward import CachedForward
from gearshift.engine.probe import blocks_of, decode_given
from gearshift.errors import CapacityError, ModelError
from gearshift.kernels.dispatch import kernels_of
from gearshift.models.attention import ATTENTION
from gearshift.models.check import alone, tolerated
from gearshift.models.layer_gaps import LayerGap, layer_gaps
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.models.runner import ModelRunner
from gearshift.types import SamplingParams

_PROMPTS = 3, 17, 48, 96
"""Tokens of the prompts, where the context has room for them."""
_SAMPLES, _NEW, _USER = 2, 24, 9
"""Completions of a prompt, their tokens, and the tokens of the user between two turns."""

_TEXT = (
    "The ferry leaves at noon, and nobody on the quay knows why it waits. A woman asks the sailor "
    "what he has in his sacks: flour, he says, and letters for 27 people. How would you answer a "
    "child who wants to know where the wind sleeps? She laughs. Then she counts the gulls on the "
    "roof of the old harbour office, writes the number down and begins once more from the left. "
)


@dataclass(frozen=True)
class Gap:
    """The distance of two computations of the same tokens' log-probabilities."""

    turns: int
    """Completions in each conversation."""
    between: str
    tokens: int
    mean: float
    """Nats."""
    max: float
    """Nats."""
    over_bound: float
    """The worst sequence, over what is tolerated; above 1 is too far."""


@dataclass(frozen=True)
class Parity:
    """What `parity` measured."""

    model: str
    form: str
    """Whether the model runs by its description or through Hugging Face's modules, and why."""
    dtype: str
    device: str
    refused: str | None
    """Why the engine refuses the model, or None."""
    gaps: list[Gap]
    layers: list[LayerGap]
    """The gap of each layer; empty if nothing is over the bound."""

    @property
    def ok(self) -> bool:
        """Whether nothing is over the bound."""
        return self.refused is None and all(gap.over_bound <= 1 for gap in self.gaps)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        layers = [layer._asdict() for layer in self.layers]
        return {**asdict(self), "layers": layers, "ok": self.ok}

    def table(self) -> str:
        """The same as text."""
        lines = [f"{self.model} in {self.dtype} on {self.device}", self.form]
        if self.refused:
            lines.append(f"refused: {self.refused}")
        if self.gaps:
            lines.append(
                f"{'turns  gap of log-probs between':44}tokens  mean nat   max nat   / bound"
            )
        lines += [
            f"{gap.turns:5}  {gap.between:37}{gap.tokens:6}  {gap.mean:.2e}  {gap.max:.2e}  "
            f"{gap.over_bound:8.3f}"
            for gap in self.gaps
        ]
        if self.layers:
            lines.append("layer  training / bound  generation / bound")
        for layer in self.layers:
            written = "-" if layer.generation is None else f"{layer.generation:.3f}"
            lines.append(f"{layer.layer:5}  {layer.training:16.3f}  {written:>18}")
        return "\n".join(lines)


@torch.no_grad()
def parity(config: ModelConfig, name: str | None = None) -> Parity:
    """Measure a model that is loaded anew; `name` names another one than the config.

    The model samples conversations of one turn and of two. Their log-probabilities come from the
    generation gear as it sampled, from the training gear over packed trees, and from Hugging
    Face's eager forward of each sequence alone. A gap is divided by the standard deviation of the
    token's logits. The bound is that of the check at the engine's creation: in fp32 1e-3 of that
    for the worst token, in bf16 0.1 of it for the median of a sequence. Where it is exceeded,
    every layer is compared.

    Raises `ModelError` where the model cannot be loaded, `CapacityError` where its context is too
    short.
    """
    model = load_policy(config, name)
    gaps: list[Gap] = []
    refused, line = None, ""
    try:
        engine = Engine(model, load_tokenizer(config, name))
        line = engine.runner.form_line("form")
        gaps = [gap for turns in (1, 2) for gap in _gaps(engine, turns)]
    except ModelError as error:
        refused = str(error)
    layers: list[LayerGap] = []
    if refused:
        with suppress(Exception):  # a refused model may fail in any way; the reason is known
            line, layers = _layers(model)
    elif any(not gap.over_bound <= 1 for gap in gaps):
        line, layers = _layers(model)
    dtype = str(model.dtype).removeprefix("torch.")
    device = str(model.device)
    return Parity(name or config.name, line, dtype, device, refused, gaps, layers)


def _gaps(engine: Engine, turns: int) -> list[Gap]:
    rows, prompts = _conversations(engine, turns)
    groups = [
        (row.tokens[:start], [(row.tokens[start:], row.mask[start:])])
        for row, start in zip(rows, prompts, strict=True)
    ]
    merged = [
        (pair[0][0], [piece for _, pieces in pair for piece in pieces])
        for pair in (groups[i : i + _SAMPLES] for i in range(0, len(groups), _SAMPLES))
    ]
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(pack_groups(merged).to(engine.device)).logprobs.cpu()
    trained = scored.split([sum(row.mask) for row in rows])
    written = [torch.tensor(row.logprobs) for row in rows]
    exact, spread = zip(*(_hugging_face(engine.model, row) for row in rows), strict=True)
    compare = partial(_gap, engine.model, turns, spread)
    return [
        compare("generation and training", written, trained),
        compare("training and Hugging Face", trained, exact),
        compare("generation and Hugging Face", written, exact),
    ]


def _gap(
    model: PreTrainedModel,
    turns: int,
    spread: Sequence[Tensor],
    between: str,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
) -> Gap:
    pairs = list(zip(ours, theirs, strict=True))
    nats = torch.cat([(mine - exact).abs() for mine, exact in pairs])
    worst = [
        tolerated(model, (mine - exact).abs() / wide)
        for (mine, exact), wide in zip(pairs, spread, strict=True)
    ]
    over = max(worst) if nats.isfinite().all() else float("inf")
    return Gap(turns, between, len(nats), float(nats.mean()), float(nats.max()), over)


class _Row:
    """A conversation: its tokens, which of them the model wrote, and how likely it found those."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens = list(prompt)
        self.mask = [0] * len(prompt)
        self.logprobs: list[float] = []

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Add a turn: of the model, with its log-probabilities, or of the user."""
        self.tokens += tokens
        self.mask += [int(logprobs is not None)] * len(tokens)
        self.logprobs += logprobs or []


def _conversations(engine: Engine, turns: int) -> tuple[list[_Row], list[int]]:
    """Conversations that the model samples, and the tokens of their prompts."""
    new = min(_NEW, (engine.max_length // turns - _USER) // 2)
    if new < 1:
        raise CapacityError(
            f"The model has a context of {engine.max_length} tokens, which is too short to compare "
            f"{turns} turns; name a model with a longer one."
        )
    text = cycle(engine.tokenizer.encode(_TEXT, add_special_tokens=False))

    def words(count: int) -> list[int]:
        return list(islice(text, count))

    room = engine.max_length - turns * (new + _USER)
    starts = [min(length, room) for length in _PROMPTS]
    prompts = [words(length) for length in starts]
    rows = [_Row(prompt) for prompt in prompts for _ in range(_SAMPLES)]
    first = SamplingParams(n=_SAMPLES, max_new_tokens=new)
    with engine.generating():
        written = list(chain.from_iterable(engine.generate(prompts, first)))
        for turn in range(turns):
            if turn:
                for row in rows:
                    row.add(words(_USER))
                after = SamplingParams(max_new_tokens=new)
                conversations = [row.tokens for row in rows]
                written = [one for [one] in engine.generate(conversations, after)]
            for row, completion in zip(rows, written, strict=True):
                row.add(completion.token_ids, completion.logprobs)
    return rows, [start for start in starts for _ in range(_SAMPLES)]


def _hugging_face(model: PreTrainedModel, row: _Row) -> tuple[Tensor, Tensor]:
    """[M] log-probabilities of the tokens that the model wrote, by Hugging Face's forward of the
    conversation alone, and [M] standard deviations of the logits.
    """
    logits = alone(model, row.tokens, True).float()
    scored = torch.tensor(row.mask[1:], dtype=torch.bool)
    logits = logits[:-1][scored.to(logits.device)]
    targets = torch.tensor(row.tokens[1:])[scored].to(logits.device)
    found = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    return found.cpu(), logits.std(-1).clamp(min=1e-30).cpu()


def _layers(model: PreTrainedModel) -> tuple[str, list[LayerGap]]:
    """How the model runs, and the gap of each layer."""
    model.set_attn_implementation(ATTENTION)
    runner = ModelRunner(model.eval(), checked=False)
    return runner.form_line("form"), layer_gaps(
        model, runner.plan, runner.hidden, partial(_decode, runner)
    )


def _decode(runner: ModelRunner, tokens: list[list[int]]) -> list[Tensor]:
    cache = KVCache(blocks_of(tokens))
    longest = max(map(len, tokens))
    return decode_given(CachedForward(runner, kernels_of(runner.model), cache, longest), tokens)
