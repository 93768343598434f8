"""Kernels against the dense reference; those for GPUs by their signatures and by stand-ins, as no test has a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention import kernels
from attention.dense import dense_attention
from attention.kernel_parts import expanded, grouped, padded, tiles
from attention.kernels import Kernel, agrees, candidates, kernel_for
from attention.kernels_cuda import CudnnKernel, EfficientKernel, FlashKernel
from attention.kernels_flash_attn import FlashAttnKernel
from attention.kernels_host import CpuKernel, MathKernel
from attention.merge import Partial
from tasp_coll import ArgumentError

CPU = torch.device("cpu")
HOST: tuple[Kernel, ...] = (CpuKernel(), MathKernel())
# Of the largest element. Half precision: rounding of the inputs of the second product, and of the result.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HEAD_DIMS = (1, 8, 32, 64, 80, 128, 256)
SHAPES = ((1, 1, False), (5, 7, False), (70, 33, False), (1, 40, False), (33, 33, True), (1, 1, True))
Tensors = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    kernels._choose.cache_clear()
    yield
    kernels._choose.cache_clear()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(rows: int, keys: int, dim: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> Tensors:
    """query, key, value and the gradient of the result."""
    shapes = ((heads, rows), (kv_heads, keys), (kv_heads, keys), (heads, rows))
    return tuple(random(2, *shape, dim, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


def dense(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, causal: bool, scale: float) -> Tensors:
    """Result, lse and gradients, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    wider = [leaves[0], *(expanded(x, query.shape[1]) for x in leaves[1:])]
    scores = wider[0] @ wider[1].mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    out = scores.softmax(-1) @ wider[2]
    return out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, leaves, grad.double())


def round_trip(kernel: Kernel, inputs: Tensors, causal: bool, scale: float) -> Tensors:
    query, key, value, grad = inputs
    out, lse = kernel.forward(query, key, value, causal=causal, scale=scale)
    return out, lse, *kernel.backward(grad, query, key, value, out, lse, causal=causal, scale=scale)


def assert_near(found: Tensors, wanted: Tensors, tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        error = (a.detach().double() - b.detach().double()).abs().max()
        assert float(error) <= tolerance * max(float(b.detach().abs().max()), 1)


# --- on the host


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_result_lse_and_gradients_are_those_of_the_reference(kernel: Kernel, dtype: torch.dtype, dim: int) -> None:
    for rows, keys, causal in SHAPES:
        inputs = tensors(rows, keys, dim, dtype)
        found = round_trip(kernel, inputs, causal, dim**-0.5)
        assert found[0].dtype == dtype
        assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(found, dense(*inputs, causal, dim**-0.5), TOLERANCES[dtype])


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (8, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_heads_that_share_keys(kernel: Kernel, heads: int, kv_heads: int) -> None:
    for causal in (False, True):
        inputs = tensors(9, 9, 8, torch.float64, heads, kv_heads)
        assert_near(round_trip(kernel, inputs, causal, 0.3), dense(*inputs, causal, 0.3), 1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_that_share_keys_are_expanded_for_an_older_torch(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.8 its kernel on the CPU does not know of them, and does not say so."""
    aten = torch.ops.aten
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
    calls = [getattr(aten, name) for name in names]

    def strict(call: Any, *inputs: Any, **how: Any) -> Any:
        assert all(x.shape[1] == 4 for x in inputs[:4] if isinstance(x, Tensor))
        return call(*inputs, **how)

    monkeypatch.setattr("attention.kernels_host._SHARES_HEADS", False)
    for name, call in zip(names, calls, strict=True):
        monkeypatch.setattr(aten, name, partial(strict, call))
    for dtype in (torch.float64, torch.bfloat16):
        inputs = tensors(9, 9, 8, dtype, 4, kv_heads)
        assert_near(round_trip(CpuKernel(), inputs, True, 0.3), dense(*inputs, True, 0.3), TOLERANCES[dtype])


@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_any_strides(kernel: Kernel) -> None:
    """Views into (B, S, H, D), keys as they travel, every other token, and a gradient that a sum has expanded."""
    query = random(2, 40, 4, 16, seed=0).transpose(1, 2)[:, :, 3:33:2]
    wire = random(30, 2, 2, 2, 16, seed=1)
    key, value = (wire[::2, side].permute(1, 2, 0, 3) for side in (0, 1))
    for grad in (torch.ones(()).double().expand(2, 4, 15, 16), random(2, 15, 16, 4, seed=2).permute(0, 3, 1, 2)):
        for causal in (False, True):
            inputs = query, key, value, grad
            assert_near(round_trip(kernel, inputs, causal, 0.3), dense(*inputs, causal, 0.3), 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_kernel_piece_by_piece(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.kernels_host._SCORES", 500)
    inputs = tensors(23, 23, 8, torch.float64)
    assert_near(round_trip(MathKernel(), inputs, causal, 0.3), dense(*inputs, causal, 0.3), 1e-12)


@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_inputs_stay_as_they_are(kernel: Kernel) -> None:
    for dtype in TOLERANCES:
        inputs = tensors(9, 9, 8, dtype)
        before = [x.clone() for x in inputs]
        round_trip(kernel, inputs, True, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


class _Blocks(torch.autograd.Function):
    """Two blocks of keys merged, and the backward of each with the whole attention's result and lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        into = Partial(query)
        for keys, causal in _Blocks.parts(query):
            into.add(
                slice(0, query.shape[2]),
                *kernel.forward(query, key[:, :, keys], value[:, :, keys], causal=causal, scale=0.4),
            )
        out, lse = into.finish()
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        found = [torch.zeros_like(x) for x in (query, key, value)]
        for keys, causal in _Blocks.parts(query):
            part = ctx.kernel.backward(
                grad, query, key[:, :, keys], value[:, :, keys], out, lse, causal=causal, scale=0.4
            )
            found[0] += part[0]
            found[1][:, :, keys] += part[1]
            found[2][:, :, keys] += part[2]
        return *found, None

    @staticmethod
    def parts(query: Tensor) -> tuple[tuple[slice, bool], ...]:
        """A causal square, and all that lies behind it."""
        return (slice(0, query.shape[2]), True), (slice(query.shape[2], None), False)


@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_gradcheck_through_blocks_and_their_merging(kernel: Kernel) -> None:
    query, key, value, _ = (x.requires_grad_() for x in tensors(4, 9, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: _Blocks.apply(*x, kernel), (query, key, value))


@pytest.mark.parametrize("kernel", HOST, ids=lambda kernel: kernel.name)
def test_blocks_in_float32_are_as_exact_as_the_whole(kernel: Kernel) -> None:
    query, key, value, grad = tensors(64, 200, 32, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    out = _Blocks.apply(*leaves, kernel)
    out.backward(grad)
    seen = torch.ones(64, 200, dtype=torch.bool)
    seen[:, :64] = seen[:, :64].tril()
    doubles = [x.double().requires_grad_() for x in (query, key, value)]
    scores = doubles[0] @ expanded(doubles[1], 4).mT * 0.4
    wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ expanded(doubles[2], 4)
    wanted.backward(grad.double())
    assert_near((out, *(x.grad for x in leaves)), (wanted, *(x.grad for x in doubles)), 2e-6)  # type: ignore[arg-type]


def test_the_whole_block_is_the_dense_reference() -> None:
    query, key, value, _ = tensors(17, 17, 8, torch.float64)
    out, _ = kernel_for(query).forward(query, key, value, causal=True, scale=8**-0.5)
    assert_near((out,), (dense_attention(query, key, value, is_causal=True),), 1e-12)


# --- what is refused

ALL: tuple[Kernel, ...] = (
    *HOST,
    FlashKernel(),
    CudnnKernel(),
    EfficientKernel(),
    FlashAttnKernel("flash_attn", print, print),
)


@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("rows, keys, causal", [(0, 3, False), (3, 0, False), (0, 0, True), (3, 4, True), (4, 3, True)])
def test_empty_and_uneven_causal_blocks_are_refused(kernel: Kernel, rows: int, keys: int, causal: bool) -> None:
    """The first would end the process, the second mean different things on different devices."""
    query, key, value, grad = tensors(rows, keys, 8, torch.float64)
    with pytest.raises(ValueError, match="block must"):
        kernel.forward(query, key, value, causal=causal, scale=1.0)
    with pytest.raises(ArgumentError, match="block must"):
        kernel.backward(grad, query, key, value, grad, grad[..., 0], causal=causal, scale=1.0)


@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
def test_shapes_that_do_not_fit_are_refused(kernel: Kernel) -> None:
    query, key, value, _ = tensors(4, 5, 8, torch.float64)
    for bad in ((key, value[..., :4]), (key[..., :4], value[..., :4]), (key[:1], value[:1]), (key[:, :, 1:], value)):
        with pytest.raises(ArgumentError, match="key and value must"):
            kernel.forward(query, *bad, causal=False, scale=1.0)
    with pytest.raises(ArgumentError, match="divides query's 3, got 2"):
        kernel.forward(query[:, :3], key, value, causal=False, scale=1.0)


# --- the choice


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_on_the_host_it_is_torch_s_kernel(dtype: torch.dtype) -> None:
    assert kernel_for(torch.zeros(1, 1, 1, 8, dtype=dtype)).name == "cpu"


def test_other_devices_have_the_plain_one() -> None:
    assert kernel_for(torch.zeros(1, 1, 1, 8, device="meta")).name == "math"


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_without_a_kernel(dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=r"query must be of float64, .*, got torch\."):
        kernel_for(torch.zeros(1, 1, 1, 8, dtype=dtype))


def test_the_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_KERNEL", "math")
    assert kernel_for(torch.zeros(1, 1, 1, 8)).name == "math"
    monkeypatch.setenv("TASP_COLL_KERNEL", "flash")
    with pytest.raises(ArgumentError, match=r"TASP_COLL_KERNEL must be one of cpu, math for .*, got 'flash'"):
        kernel_for(torch.zeros(1, 1, 1, 8))


def test_what_may_run_on_a_gpu() -> None:
    def names(dtype: torch.dtype, dim: int) -> list[str]:
        return [
            kernel.name for kernel in candidates(torch.device("cuda"), dtype, dim) if "flash_attn" not in kernel.name
        ]

    assert names(torch.bfloat16, 128) == ["flash", "cudnn", "efficient", "math"]
    assert names(torch.float16, 512) == ["efficient", "math"]
    assert names(torch.float32, 64) == ["efficient", "math"]
    assert names(torch.float64, 64) == ["math"]


class _Spoilt(CpuKernel):
    """A kernel with one property other than ours."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def forward(self, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
        if self.fault == "raises":
            raise RuntimeError("no kernel image is available")
        out, lse = super().forward(*args, **how)
        if self.fault == "base":
            lse = lse / torch.log(torch.tensor(2.0))
        return out, lse[..., None] if self.fault == "layout" else lse

    def backward(self, *args: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        dquery, dkey, dvalue = super().backward(*args, **how)
        return dquery * torch.nan if self.fault == "nan" else dquery, dkey, dvalue


@pytest.mark.parametrize("fault", ["raises", "base", "layout", "nan", ""])
def test_a_kernel_that_differs_is_not_taken(fault: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert agrees(_Spoilt(fault), MathKernel(), CPU, dtype, 32) == (not fault)


def test_of_those_that_agree_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"wrong": 1.0, "slow": 3.0, "quick": 2.0}
    monkeypatch.setattr(kernels, "_seconds", lambda kernel, *_: seconds[kernel.name])
    found: list[Any] = [_Spoilt("base"), CpuKernel(), CpuKernel(), MathKernel()]
    for kernel, name in zip(found, seconds, strict=False):
        kernel.name = name
    assert kernels._fastest(found, CPU, torch.float32, 32).name == "quick"
    assert kernels._fastest([found[0], found[-1]], CPU, torch.float32, 32).name == "math"


# --- GPU kernels without a GPU


def schema(name: str) -> list[tuple[str, str]]:
    found = getattr(torch.ops.aten, name).default._schema
    return [(argument.name, str(argument.type)) for argument in found.arguments]


QKV = [("query", "Tensor"), ("key", "Tensor"), ("value", "Tensor")]
SCALE = [("scale", "Optional[float]")]


def test_signatures_are_those_that_the_adapters_were_written_for() -> None:
    dropout, causal = ("dropout_p", "float"), ("is_causal", "bool")
    debug, bias = ("return_debug_mask", "bool"), ("attn_bias", "Optional[Tensor]")
    log = ("compute_log_sumexp", "bool")
    packed = [("cum_seq_q", "Tensor"), ("cum_seq_k", "Tensor"), ("max_q", "int"), ("max_k", "int")]
    philox = [("philox_seed", "Tensor"), ("philox_offset", "Tensor")]
    ran = [("out", "Tensor"), ("logsumexp", "Tensor")]
    grad = [("grad_out", "Tensor"), *QKV]
    assert schema("_scaled_dot_product_flash_attention") == [*QKV, dropout, causal, debug, *SCALE]
    assert schema("_scaled_dot_product_flash_attention_backward") == [
        *(*grad, *ran, *packed, dropout, causal, *philox, *SCALE)
    ]
    assert schema("_scaled_dot_product_cudnn_attention") == [*QKV, bias, log, dropout, causal, debug, *SCALE]
    assert schema("_scaled_dot_product_cudnn_attention_backward") == [
        *(*grad, *ran, *philox, ("attn_bias", "Tensor"), *packed, dropout, causal, *SCALE)
    ]
    assert schema("_scaled_dot_product_efficient_attention") == [*QKV, bias, log, dropout, causal, *SCALE]
    assert schema("_scaled_dot_product_efficient_attention_backward") == [
        ("grad_out_", "Tensor"),
        *(*QKV, ("attn_bias", "Tensor"), *ran, *philox, dropout),
        ("grad_input_mask", "List[bool]"),
        causal,
        *SCALE,
    ]


@pytest.mark.parametrize("dim", [1, 64, 80, 100])
@pytest.mark.parametrize("kernel", [FlashKernel(), CudnnKernel(), EfficientKernel()], ids=lambda kernel: kernel.name)
def test_shapes_on_tensors_without_memory(kernel: Kernel, dim: int) -> None:
    """torch works out the shapes and dtypes of its CUDA kernels on the meta device, and refuses what cannot be."""
    for rows, keys, causal in ((5, 7, False), (40, 40, True)):
        query, key, value, grad = (x.to("meta") for x in tensors(rows, keys, dim, torch.bfloat16))
        out, lse = kernel.forward(query, key, value, causal=causal, scale=0.3)
        assert (out.shape, out.dtype) == (query.shape, torch.bfloat16)
        assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
        found = kernel.backward(grad, query, key, value, out, lse, causal=causal, scale=0.3)
        assert [x.shape for x in found] == [query.shape, key.shape, value.shape]


def plain_aten(padding: int = 0, column: bool = False) -> Any:
    """Stand-ins for torch's CUDA kernels with their order of arguments and results, on the host."""
    plain = MathKernel()

    def lse_out(lse: Tensor) -> Tensor:
        if padding:
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % padding), value=torch.inf)
        return lse[..., None] if column else lse

    def lse_in(lse: Tensor, rows: int) -> Tensor:
        assert lse.is_contiguous()
        assert lse.shape[-1] == 1 if column else lse.shape[-1] % (padding or 1) == 0
        return (lse[..., 0] if column else lse)[..., :rows]

    def strict(*inputs: Tensor) -> None:
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in inputs)

    def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float) -> Any:
        strict(q, k, v)
        assert (dropout, debug) == (0, False)
        return *plain.forward(q, k, v, causal=causal, scale=scale), *[None] * 7

    def flash_backward(*x: Any, scale: float) -> Any:
        grad, q, k, v, out, lse, seq_q, seq_k, max_q, max_k, dropout, causal, seed, offset = x
        strict(grad, q, k, v, out)
        assert (seq_q, seq_k, max_q, max_k, dropout) == (None, None, q.shape[2], k.shape[2], 0)
        assert {seed.dtype, offset.dtype} == {torch.uint64}
        return plain.backward(grad, q, k, v, out, lse_in(lse, q.shape[2]), causal=causal, scale=scale)

    def cudnn(*x: Any, scale: float) -> Any:
        q, k, v, bias, logs, dropout, causal, debug = x
        strict(q, k, v)
        assert (bias, logs, dropout, debug) == (None, True, 0, False)
        assert q.shape[1] == k.shape[1]
        assert min(q.shape[2], k.shape[2]) > 1
        out, lse = plain.forward(q, k, v, causal=causal, scale=scale)
        return out, lse_out(lse), *[None] * 7

    def cudnn_backward(*x: Any, scale: float) -> Any:
        grad, q, k, v, out, lse, seed, offset, bias, seq_q, seq_k, max_q, max_k, dropout, causal = x
        strict(grad, q, k, v, out)
        assert (bias, seq_q, seq_k, max_q, max_k, dropout) == (None, None, None, q.shape[2], k.shape[2], 0)
        assert {seed.shape, offset.shape} == {()}
        return plain.backward(grad, q, k, v, out, lse_in(lse, q.shape[2]), causal=causal, scale=scale)

    def efficient(*x: Any, scale: float) -> Any:
        q, k, v, bias, logs, dropout, causal = x
        strict(q, k, v)
        assert (bias, logs, dropout) == (None, True, 0)
        assert q.shape[1] == k.shape[1]
        out, lse = plain.forward(q, k, v, causal=causal, scale=scale)
        return out, lse_out(lse), None, None

    def efficient_backward(*x: Any, scale: float) -> Any:
        grad, q, k, v, bias, out, lse, _, _, dropout, mask, causal = x
        strict(grad, q, k, v, out)
        assert (bias, dropout, mask) == (None, 0, [True, True, True, False])
        assert (lse[..., q.shape[2] :] == torch.inf).all()
        return *plain.backward(grad, q, k, v, out, lse_in(lse, q.shape[2]), causal=causal, scale=scale), None

    return SimpleNamespace(
        _scaled_dot_product_flash_attention=flash,
        _scaled_dot_product_flash_attention_backward=flash_backward,
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
        _scaled_dot_product_efficient_attention=efficient,
        _scaled_dot_product_efficient_attention_backward=efficient_backward,
    )


@pytest.mark.parametrize(
    "kernel, kinds",
    [(FlashKernel(), {}), (CudnnKernel(), {"column": True}), (EfficientKernel(), {"padding": 32})],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("dim", [1, 64, 100])
def test_padding_heads_and_layouts_are_settled(
    kernel: Kernel, kinds: dict[str, Any], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attention.kernels_cuda._aten", plain_aten(**kinds))
    for rows, keys, causal in SHAPES:
        inputs = tensors(rows, keys, dim, torch.float32)
        assert_near(round_trip(kernel, inputs, causal, 0.1), dense(*inputs, causal, 0.1), 5e-6)


# --- the package flash-attn


def flash_attn(version: str) -> Any:
    """Forward and backward as its versions declare them: (B, S, H, D), arguments by name.

    3 and 4 as in hopper/flash_attn_interface.py and flash_attn/cute/interface.py of Dao-AILab/flash-attention.
    Arguments with a default that do not matter here are left out. Gradients are written where it is told, if it is.
    """
    plain = MathKernel()

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        assert q.shape[-1] % 8 == 0
        turned = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = plain.forward(*turned, causal=causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(given: dict[str, Any]) -> Any:
        assert given["deterministic"] is True
        lse = given["lse"] if "lse" in given else given["softmax_lse"]
        assert lse.is_contiguous()
        turned = (given[name].transpose(1, 2) for name in ("dout", "q", "k", "v", "out"))
        causal = given["causal"] if "causal" in given else given["is_causal"]
        found = plain.backward(*turned, lse, causal=causal, scale=given["softmax_scale"])
        if "dq" not in given:
            return tuple(x.transpose(1, 2) for x in found)
        for name, x in zip(("dq", "dk", "dv"), found, strict=True):
            assert given[name].is_contiguous()
            given[name].copy_(x.transpose(1, 2))
        return lse

    def old_forward(q: Any, k: Any, v: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size: Any, alibi_slopes: Any, return_softmax: Any) -> Any:  # fmt: skip # noqa: E501
        assert (dropout_p, window_size, alibi_slopes, return_softmax) == (0, (-1, -1), None, False)
        out, lse = forward(q, k, v, softmax_scale, causal)
        return out, q, k, v, out, lse, None, None

    def old_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size: Any, alibi_slopes: Any, deterministic: Any, rng_state: Any = None) -> Any:  # fmt: skip # noqa: E501
        return backward(locals())

    def new_forward(q: Any, k: Any, v: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size_left: Any, window_size_right: Any, softcap: Any, alibi_slopes: Any, return_softmax: Any) -> Any:  # fmt: skip # noqa: E501
        assert (window_size_left, window_size_right, softcap) == (-1, -1, 0)
        return *forward(q, k, v, softmax_scale, causal), None, None

    def new_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, dropout_p: Any, softmax_scale: Any, causal: Any, window_size_left: Any, window_size_right: Any, softcap: Any, alibi_slopes: Any, deterministic: Any, rng_state: Any = None) -> Any:  # fmt: skip # noqa: E501
        return backward(locals())

    class Operator:
        """A torch custom op: callable with anything, the function is behind `_init_fn`."""

        def __init__(self, function: Any) -> None:
            self._init_fn = function

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._init_fn(*args, **kwargs)

    def forward_3(q: Any, k: Any, v: Any, k_new: Any = None, v_new: Any = None, qv: Any = None, out_: Any = None, softmax_scale: Any = None, causal: Any = False, window_size_left: Any = -1, window_size_right: Any = -1, attention_chunk: Any = 0, softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, sm_margin: Any = 0) -> Any:  # fmt: skip # noqa: E501
        return *forward(q, k, v, softmax_scale, causal), torch.tensor([]), torch.tensor([])

    def backward_3(dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, dq: Any = None, dk: Any = None, dv: Any = None, softmax_scale: Any = None, is_causal: Any = False, window_size_left: Any = -1, window_size_right: Any = -1, softcap: Any = 0.0, deterministic: Any = False, sm_margin: Any = 0) -> Any:  # fmt: skip # noqa: E501
        return backward(locals())

    def forward_4(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False, softcap: Any = None, window_size_left: Any = None, window_size_right: Any = None, num_splits: Any = 1, pack_gqa: Any = None, return_lse: Any = False, out: Any = None, lse: Any = None) -> Any:  # fmt: skip # noqa: E501
        assert (softcap, window_size_left, window_size_right, out, lse, return_lse) == (*(None,) * 5, True)
        return forward(q, k, v, softmax_scale, causal)

    def backward_4(q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: Any = None, causal: Any = False, softcap: Any = 0.0, window_size_left: Any = None, window_size_right: Any = None, deterministic: Any = False) -> Any:  # fmt: skip # noqa: E501
        assert (softcap, window_size_left, window_size_right) == (0, None, None)
        return backward(locals())

    return {
        "2.0": (old_forward, old_backward),
        "2.7": (new_forward, new_backward),
        "2.7 as operators": (Operator(new_forward), new_backward),
        "3": (Operator(forward_3), Operator(backward_3)),
        "4": (forward_4, backward_4),
    }[version]


@pytest.mark.parametrize("version", ["2.0", "2.7", "2.7 as operators", "3", "4"])
@pytest.mark.parametrize("dim", [1, 64, 100])
def test_versions_of_flash_attn(version: str, dim: int) -> None:
    kernel = FlashAttnKernel("flash_attn", *flash_attn(version))
    for rows, keys, causal in SHAPES:
        inputs = tensors(rows, keys, dim, torch.float32)
        assert_near(round_trip(kernel, inputs, causal, 0.1), dense(*inputs, causal, 0.1), 5e-6)


def test_flash_attn_is_a_candidate_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def modules(*, broken: bool = False) -> None:
        for module, version in (("flash_attn.flash_attn_interface", "2.7"), ("flash_attn_interface", "3")):
            names = dict(zip(("_flash_attn_forward", "_flash_attn_backward"), flash_attn(version), strict=True))
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{} if broken else names))  # type: ignore[arg-type]
        names = dict(zip(("_flash_attn_fwd", "_flash_attn_bwd"), flash_attn("4"), strict=True))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", SimpleNamespace(**{} if broken else names))  # type: ignore[arg-type]

    def found() -> list[str]:
        return [kernel.name for kernel in candidates(torch.device("cuda"), torch.float16, 64)]

    for package in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[]))  # type: ignore[arg-type]
    modules()
    assert found()[:4] == ["flash_attn_4", "flash_attn_3", "flash_attn", "flash"]
    modules(broken=True)
    assert found()[0] == "flash"


# --- parts


def test_padding_leaves_what_is_aligned_alone() -> None:
    x = torch.arange(2 * 3 * 4 * 16.0).view(2, 3, 4, 16)
    assert padded(x) is x
    assert padded(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    for odd in (x[..., :7], x[..., 1:9], x.reshape(-1)[5 : 5 + 64].view(1, 2, 2, 16), x.transpose(2, 3)[..., :8, :]):
        found = padded(odd)
        assert torch.equal(found[..., : odd.shape[-1]], odd)
        assert (found[..., odd.shape[-1] :] == 0).all()
        assert found.shape[-1] % 8 == found.storage_offset() % 8 == 0
        assert found.is_contiguous()


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (8, 2), (6, 6), (12, 4), (7, 1)])
def test_tiles_are_even_and_share_keys(heads: int, kv_heads: int) -> None:
    query = torch.zeros(2, heads, 5, 3)
    each = 2 * 5 * 3 * 4
    for most in (None, 0, *(each * count for count in range(1, heads + 1))):
        found = list(tiles(query, kv_heads, most))
        assert [head for told, _ in found for head in range(told.start, told.stop)] == list(range(heads))
        shared = heads // kv_heads
        for told, keys in found:
            assert [keys.start, keys.stop] == [told.start // shared, (told.stop - 1) // shared + 1]
            assert most is None or (told.stop - told.start) * each <= max(most, each)
            assert shared == 1 or len(found) == 1 or keys.stop - keys.start == 1


def test_grouping_is_the_gradient_of_expanding() -> None:
    x = random(2, 3, 4, 5, seed=0).requires_grad_()
    grad = random(2, 6, 4, 5, seed=1)
    expanded(x, 6).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(grouped(grad, 3), x.grad)


def test_importing_kernels_loads_nothing_but_torch() -> None:
    source = "import attention.kernels, sys; assert not {'mpi4py', 'matplotlib', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
