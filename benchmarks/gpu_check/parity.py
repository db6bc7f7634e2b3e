"""Step 4: every family is computed as Hugging Face computes it, in both gears."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu_check.families import FAMILIES, family_model
from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_of, engine_with, prompts_of, weighted
from benchmarks.gpu_check.probe import Probe
from gearshift.batch import PackedBatch, pack_groups
from gearshift.engine import Engine
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
            exact(probe, family)


def in_bf16(probe: Probe) -> None:
    """All families: the gears."""
    for family in probe.size(FAMILIES, FEW):
        with probe.case(family):
            engine = engine_with(family_model(probe, family, torch.bfloat16), max_length=128)
            mean, most = gap(engine, sampled(engine))
            probe.at_most(f"{family}: gears, bf16 (mean)", mean, CLOSE, "nat")
            probe.shows(f"{family}: gears, bf16 (largest)", most, "nat")


def real_shape(probe: Probe) -> None:
    """The gears of a model of 135M weights."""
    for dtype, pick, most in ((torch.bfloat16, 0, CLOSE), (torch.float32, 1, EXACT)):
        name = str(dtype).removeprefix("torch.")
        with probe.case(f"135M: gears, {name}"):
            engine = engine_of(probe, "135M", dtype, max_length=probe.size(1024, 128))
            prompts = prompts_of(engine, 8, probe.size(128, 9))
            groups = sampled(engine, prompts, n=8, new=probe.size(64, 8))
            found = gap(engine, groups, prompts)
            probe.at_most(f"135M: gears, {name}", found[pick], most, "nat")
            engine.model.to("cpu")


def exact(probe: Probe, family: str) -> None:
    """What must hold of a family in fp32."""
    engine = engine_with(family_model(probe, family, torch.float32), max_length=128)
    theirs = family_model(probe, family, torch.float32, "eager")
    groups = sampled(engine)
    probe.at_most(f"{family}: gears, fp32", gap(engine, groups)[1], EXACT, "nat")
    batch = batch_of(groups, PROMPTS).to(probe.device)
    alone = batch_of(groups, PROMPTS, share=False).to(probe.device)
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
    after = gap(engine, sampled(engine))[1]
    probe.at_most(f"{family}: gears after an update", after, EXACT, "nat")


def sampled(
    engine: Engine, prompts: list[list[int]] | None = None, n: int = 3, new: int = 24
) -> Groups:
    """Completions at temperature 1."""
    with engine.generating():
        return engine.generate(prompts or PROMPTS, SamplingParams(n=n, max_new_tokens=new))


def batch_of(groups: Groups, prompts: list[list[int]], share: bool = True) -> PackedBatch:
    """What was sampled, to be scored."""
    return pack_groups(
        [
            (prompt, [(c.token_ids, [1] * len(c.token_ids)) for c in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ],
        share=share,
    )


def gap(
    engine: Engine, groups: Groups, prompts: list[list[int]] | None = None
) -> tuple[float, float]:
    """The mean and the largest difference of the gears, in nats."""
    batch = batch_of(groups, prompts or PROMPTS).to(engine.device)
    with engine.training(), torch.no_grad():
        scored = engine.logprobs(batch).logprobs.cpu()
    drawn = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    gaps = (scored - drawn).abs()
    return float(gaps.mean()), float(gaps.max())


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
