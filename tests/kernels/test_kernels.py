"""The compiled kernels (on a GPU, its kernels) compute what the tensor functions do, in fp32 and in
bf16 to the bit or nearly; and the tensor functions' attention is plain attention.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gearshift.kernels.cpu import CPUKernels
from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import BLOCK, AttentionMetadata, AttentionOptions, Gate, Norm
from tests.device import ON_CPU, bits

pytestmark = pytest.mark.usefixtures("made_on_device")

DTYPES = [torch.float32, torch.bfloat16]
SLOW = Kernels()


def fast(dtype: torch.dtype) -> Kernels:
    kernels = kernels_for(torch.zeros(1, dtype=dtype))
    if ON_CPU and not isinstance(kernels, CPUKernels):
        pytest.skip("no C++ compiler here")
    return kernels


class RMS(torch.nn.Module):
    """Llama's (or, with an offset, Gemma's) norm, as Hugging Face writes it."""

    def __init__(self, size: int, offset: bool) -> None:
        super().__init__()
        self.weight, self.offset = torch.nn.Parameter(torch.randn(size)), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.offset:
            return (h * (1 + self.weight.float())).to(x.dtype)
        return self.weight * h.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 100, 576, 2048, 5000])
@pytest.mark.parametrize("kind", ["rms", "offset", "layer"])
@torch.no_grad()
def test_norms(kind: str, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    if kind == "layer":
        norm = Norm(torch.nn.LayerNorm(size).to(dtype), 1e-5, center=True)
        norm.module.weight.normal_()
        norm.module.bias.normal_()
    else:
        norm = Norm(RMS(size, kind == "offset").to(dtype), 1e-5, offset=kind == "offset")
    x, delta = torch.randn(2, 7, size).to(dtype).mul(3).unbind()
    ours, theirs = fast(dtype).add_norm(x.clone(), delta, norm), SLOW.add_norm(x, delta, norm)
    assert torch.equal(ours[0], theirs[0])
    if kind == "rms":  # to the bit: what is left of a gap between the gears is not the norms'
        assert torch.equal(ours[1], theirs[1])
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(ours[1], theirs[1], atol=tolerance, rtol=tolerance)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (7, 1), (5, 5)]),
    st.sampled_from([2, 8, 64, 80, 128]),
    st.sampled_from([None, 5, 20]),
    st.sampled_from([None, 3.0]),
    st.sampled_from(DTYPES),
)
@settings(max_examples=80, deadline=None)
@torch.no_grad()
def test_writing_and_attending(
    spans: list[tuple[int, int]],
    heads: tuple[int, int],
    D: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Sequences with some positions cached and some new, their blocks in any order."""
    torch.manual_seed(1)
    (H, K), options = heads, AttentionOptions(D**-0.5, window=window, softcap=softcap)
    width = max((old + new - 1) // BLOCK + 1 for old, new in spans)
    table = torch.randperm(len(spans) * width).view(len(spans), width)
    stores = [torch.zeros(len(spans) * width, 2, K, BLOCK * D, dtype=dtype) for _ in range(3)]
    keys = torch.randn(len(spans), width * BLOCK, H + 2 * K, D).to(dtype)

    def places(spans: list[tuple[int, int]]) -> AttentionMetadata:
        rows = [i for i, (_, new) in enumerate(spans) for _ in range(new)]
        positions = [p for old, new in spans for p in range(old, old + new)]
        return AttentionMetadata(torch.tensor(rows), torch.tensor(positions), table)

    def packed(spans: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([keys[i, old : old + new] for i, (old, new) in enumerate(spans)])

    def rotary(where: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        angle = where.positions[:, None] * torch.rand(1, D // 2 * 2).repeat(1, 1)
        angle = torch.cat([angle[:, : D // 2]] * 2, -1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    if any(old for old, _ in spans):
        old = [(0, max(1, old)) for old, _ in spans]
        torch.manual_seed(2)
        turn = rotary(places(old))
        for kernels, store in zip((fast(dtype), SLOW), stores, strict=False):
            kernels.apply_rotary_and_write(packed(old).clone(), turn, store, places(old))
        assert torch.equal(stores[0], stores[1])
    new, where = packed(spans), places(spans)
    turn = rotary(where)
    seen = []
    for kernels, store in zip((fast(dtype), SLOW), stores, strict=False):
        query = kernels.apply_rotary_and_write(new.clone(), turn, store, where)
        seen.append(kernels.attend(query, store, where, options))
    assert torch.equal(stores[0], stores[1])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(seen[0], seen[1], atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_the_tensor_functions_attention_is_plain_attention() -> None:
    H, K, D, lengths = 4, 2, 8, [5, 37, 16]
    store = torch.zeros(12, 2, K, BLOCK * D)
    table = torch.randperm(12).view(3, 4)
    qkv = torch.randn(sum(lengths), H + 2 * K, D)
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    where = AttentionMetadata(rows, positions, table)
    query = SLOW.apply_rotary_and_write(qkv, None, store, where)
    ours = SLOW.attend(query, store, where, AttentionOptions(0.3))
    for row in range(3):
        mine = qkv[rows == row]
        for h in range(H):
            q, k, v = mine[:, h], mine[:, H + h // 2], mine[:, H + K + h // 2]
            scores = (0.3 * q @ k.T).masked_fill(torch.ones(len(q), len(q)).triu(1) > 0, -1e9)
            assert torch.allclose(ours[rows == row][:, h], scores.softmax(-1) @ v, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@torch.no_grad()
def test_gates(act: str, dtype: torch.dtype) -> None:
    both = (torch.randn(9, 2 * 300) * 4).to(dtype)
    ours, theirs = fast(dtype).act_and_mul(both, act), SLOW.act_and_mul(both, act)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)
    assert torch.isfinite(fast(dtype).act_and_mul(torch.full((1, 4), -1e4, dtype=dtype), act)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
@torch.no_grad()
def test_draws(temperature: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(400, 1000) * 4).to(dtype)
    u, t = torch.rand(400, dtype=torch.float64), torch.full((400,), temperature)
    tokens, theirs = torch.empty(2, 400, dtype=torch.int64)
    logprobs, their_logprobs = torch.empty(2, 400)
    fast(dtype).sample(logits, t, u, tokens, logprobs)
    SLOW.sample(logits, t, u, theirs, their_logprobs)
    same = tokens == theirs
    assert (
        same.float().mean() >= 0.99
    )  # a uniform on the very edge of two tokens may fall either way
    assert torch.allclose(logprobs[same], their_logprobs[same], atol=2e-5)


@pytest.mark.parametrize(("out", "size"), [(48, 64), (7, 32), (100, 576), (960, 1536)])
@pytest.mark.parametrize("rows", [1, 5, 32, 203])
@torch.no_grad()
def test_packed_products(rows: int, out: int, size: int) -> None:
    weight, x, bias = (torch.randn(s).bfloat16() for s in ((out, size), (rows, size), (out,)))
    for kernels in (fast(torch.bfloat16), SLOW):
        product = kernels.prepacked_linear(weight, 32)
        if product is None:
            continue
        for b in (None, bias):
            ours, plain = product(x, b), torch.nn.functional.linear(x, weight, b)
            assert torch.allclose(ours, plain, atol=0.01, rtol=0.01)
            assert (ours == plain).float().mean() > 0.999  # the gears round alike
    assert fast(torch.float32).prepacked_linear(weight.float(), 32) is None


@pytest.mark.parametrize(("out", "size"), [(3080, 576), (960, 1536), (33, 50)])
@torch.no_grad()
def test_a_packed_product_does_not_depend_on_the_rows_beside(out: int, size: int) -> None:
    weight, x, bias = (torch.randn(s).bfloat16() for s in ((out, size), (203, size), (out,)))
    product = fast(torch.bfloat16).prepacked_linear(weight, 32)
    if product is None or not bits(torch.bfloat16):
        pytest.skip("this CPU has no bf16 dot products")
    whole = product(x, bias)
    for a, b in [(0, 1), (3, 20), (100, 132), (150, 203)]:
        assert torch.equal(product(x[a:b], bias), whole[a:b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_the_gates_gradient(act: Gate, dtype: torch.dtype) -> None:
    both, weights = torch.randn(7, 50).to(dtype), torch.randn(7, 25).to(dtype)
    grads = []
    for kernels in (fast(dtype), SLOW):
        x = both.clone().requires_grad_()
        (kernels.act_and_mul(x, act) * weights).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [8, 4])
def test_the_rotations_gradient(rotary: int, dtype: torch.dtype) -> None:
    angle = torch.randn(5, rotary // 2).repeat(1, 2)
    turn = angle.cos().to(dtype), angle.sin().to(dtype)
    qkv, weights = torch.randn(2, 5, 4 + 2 * 2, 8).to(dtype)
    results = []
    for kernels in (fast(dtype), SLOW):
        x = qkv.clone().requires_grad_()
        out = kernels.apply_rotary(x, turn, 2)
        (out * weights).sum().backward()
        results.append((out.detach(), x.grad))
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_the_norms_gradient(added: bool, offset: bool, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)  # the weight's gradient is summed over threads
    C = 48
    module = (Gemma2RMSNorm if offset else LlamaRMSNorm)(C, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(C).to(dtype)
    norm = Norm(module, 1e-5, offset=offset)
    x, delta, wx, wy = torch.randn(4, 9, C).to(dtype)
    results = []
    for kernels in (fast(dtype), SLOW):
        a, d = x.clone().requires_grad_(), delta.clone().requires_grad_()
        module.zero_grad()
        total, out = kernels.add_norm(a, d if added else None, norm)
        ((total * wx).sum() + (out * wy).sum()).backward()
        assert a.grad is not None
        results.append([total.detach(), out.detach(), a.grad, module.weight.grad])
        assert not added or torch.equal(a.grad, d.grad)
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * theirs.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "out", "size"), [(1, 5, 7), (17, 96, 33), (70, 40, 600)])
def test_fp32_products_do_not_depend_on_the_rows_beside(
    rows: int, out: int, size: int, bias: bool
) -> None:
    """The weight as it lies, and a weight that lies transposed (GPT-2's)."""
    kernels = kernels_for(torch.empty(0))
    x, weight = torch.randn(rows, size), torch.randn(out, size)
    added = torch.randn(out) if bias else None
    together = kernels.linear(x, weight, added)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None)
    assert (together - (exact if added is None else exact + added)).abs().max() < 1e-3
    if not bits():
        pytest.skip("the promise is of compiled kernels, which this machine lacks")
    assert torch.equal(together, kernels.linear(x, weight.t().contiguous().t(), added))
    for i in range(rows):
        assert torch.equal(together[i : i + 1], kernels.linear(x[i : i + 1], weight, added))


def test_fp32_products_of_what_does_not_fit_are_refused_and_a_broadcast_bias_is_right() -> None:
    kernels, x, weight = fast(torch.float32), torch.randn(3, 6), torch.randn(5, 6)
    for size, bias in ((7, torch.ones(5)), (6, torch.ones(4)), (6, torch.ones(5).bfloat16())):
        with pytest.raises(RuntimeError):
            kernels.linear(torch.randn(3, size), weight, bias)
    added = kernels.linear(x, weight, torch.ones(1).expand(5))
    assert torch.allclose(added, x @ weight.t() + 1, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "mish", "elu", "selu"])
def test_alone_an_activation_does_not_depend_on_the_rows_beside(name: str) -> None:
    kernels = fast(torch.float32)
    if not bits():
        pytest.skip("the promise is of compiled kernels, which this machine lacks")
    x, act = 3 * torch.randn(64, 7), getattr(torch.nn.functional, name)
    with kernels.batch_invariant():
        together, each = act(x), torch.cat([act(row) for row in x.split(1)])
        assert torch.bmm(x[:0, None], x[:0, :, None]).numel() == 0
    assert torch.equal(together, each)
