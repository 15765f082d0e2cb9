"""Attention in windows against its eager twin in float64, and the twin against Swin's own layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.modeling.swin import SwinBlock, shifted_window_mask
from maskformer_fast.ops.window_attention import pack_window_bias, window_attention, window_attention_eager

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}  # of the largest value
SHAPES = [  # images, height and width; heads, channels of a head, window, shift
    ((1, 7, 7), 3, 32, 7, 0), ((2, 13, 20), 3, 32, 7, 3), ((1, 5, 3), 2, 16, 7, 3), ((2, 9, 9), 4, 25, 4, 2),
    ((1, 25, 14), 1, 64, 12, 6), ((1, 1, 1), 1, 1, 1, 0),
]  # fmt: skip


def random_case(seed, shape, heads, dim, window, dtype):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn((*shape, 3 * heads * dim), generator=generator).to(dtype)
    padding = torch.randn(3 * heads * dim, generator=generator).to(dtype)
    bias = pack_window_bias(torch.randn((heads, window**2, window**2), generator=generator))
    return qkv, padding, bias, window


def assert_close(got, arguments):
    qkv, padding, bias, *rest = arguments
    wanted = window_attention_eager(qkv.double(), padding.double(), bias.double(), *rest)
    assert got.dtype == qkv.dtype and got.shape == wanted.shape and got.is_contiguous()
    if wanted.numel():
        assert (got - wanted).abs().max() <= TOLERANCE[qkv.dtype] * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "heads", "dim", "window", "shift"), SHAPES)
def test_every_instruction_set_equals_float64(shape, heads, dim, window, shift, dtype, isa):
    arguments = (*random_case(0, shape, heads, dim, window, dtype), shift)
    assert_close(window_attention(*arguments), arguments)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), height=st.integers(1, 20), width=st.integers(1, 20),
    heads=st.integers(1, 4), dim=st.integers(1, 40), window=st.integers(1, 9), shift=st.integers(0, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), threads=st.integers(1, 4),
)  # fmt: skip
def test_random_shapes_equal_float64(seed, batch, height, width, heads, dim, window, shift, dtype, threads):
    arguments = (*random_case(seed, (batch, height, width), heads, dim, window, dtype), shift % window)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(window_attention(*arguments), arguments)
    finally:
        torch.set_num_threads(before)


def gradients(function, arguments, upstream):
    """Gradients by qkv, padding and bias."""
    *tensors, window, shift = arguments
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*tensors, window, shift), tensors, upstream)


def assert_gradients_close(arguments, seed):
    qkv, padding, bias, *rest = arguments
    upstream = torch.randn((*qkv.shape[:3], qkv.shape[3] // 3), generator=torch.Generator().manual_seed(seed))
    upstream = upstream.to(qkv.dtype)
    found = gradients(window_attention, arguments, upstream)
    doubles = (qkv.double(), padding.double(), bias.double(), *rest)
    for got, wanted, dtype in zip(
        found, gradients(window_attention_eager, doubles, upstream.double()), (qkv.dtype, qkv.dtype, torch.float32),
        strict=True,
    ):  # fmt: skip
        assert got.dtype == dtype and got.shape == wanted.shape
        if wanted.numel():
            assert (got - wanted).abs().max() <= 2 * TOLERANCE[qkv.dtype] * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "heads", "dim", "window", "shift"), SHAPES)
def test_gradients_of_every_instruction_set_equal_float64(shape, heads, dim, window, shift, dtype, isa):
    assert_gradients_close((*random_case(0, shape, heads, dim, window, dtype), shift), seed=1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), height=st.integers(1, 20), width=st.integers(1, 20),
    heads=st.integers(1, 4), dim=st.integers(1, 40), window=st.integers(1, 9), shift=st.integers(0, 8),
)  # fmt: skip
def test_gradients_of_random_shapes_equal_float64(seed, batch, height, width, heads, dim, window, shift):
    case = random_case(seed, (batch, height, width), heads, dim, window, torch.float32)
    assert_gradients_close((*case, shift % window), seed + 1)


def test_gradients_do_not_depend_on_the_number_of_threads():
    arguments = (*random_case(0, (2, 40, 33), 3, 32, 7, torch.float32), 3)
    upstream = torch.randn(2, 40, 33, 96)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(window_attention, arguments, upstream))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("shift", [0, 3])
def test_gradients_of_a_block_of_swin_are_those_of_windows_that_are_copied(shift):
    torch.manual_seed(0)
    block = SwinBlock(48, 3, 7, shift, 0.0)
    torch.nn.init.normal_(block.attn.qkv.bias), torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x, upstream = torch.randn(2, 17, 30, 48), torch.randn(2, 17, 30, 48)
    found = []
    for dtype in (torch.float32, torch.float64):  # only the former goes by the operator
        block.to(dtype)
        images = x.to(dtype).requires_grad_()
        result = block(images, shifted_window_mask(images, 7).to(dtype))
        found.append((result, *torch.autograd.grad(result, [images, *block.parameters()], upstream.to(dtype))))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("shift", [0, 3])
@torch.no_grad()
def test_it_is_what_the_blocks_of_swin_do(shift):
    torch.manual_seed(0)
    block = SwinBlock(48, 3, 7, shift, 0.0).double()
    torch.nn.init.normal_(block.attn.qkv.bias), torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 17, 30, 48, dtype=torch.float64)
    attention = block.attn
    bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
    got = window_attention_eager(attention.qkv(x), attention.qkv.bias, bias, 7, shift)
    wanted = block.attend(x, shifted_window_mask(x, 7).double())
    torch.testing.assert_close(attention.proj(got), wanted)


def test_large_scores_and_scores_that_are_not_finite(isa):
    qkv, padding, bias, window = random_case(1, (1, 8, 8), 2, 16, 4, torch.float32)
    large = qkv * 40
    assert_close(window_attention(large, padding, bias, window, 0), (large, padding, bias, window, 0))
    qkv[0, 1, 2, 32] = float("nan")  # a key of the first head, in the first window
    got = window_attention(qkv, padding, bias, window, 0)
    assert got[0, :4, :4, :16].isnan().all()
    assert not got[0, :4, :4, 16:].isnan().any() and not got[0, 4:].isnan().any() and not got[0, :, 4:].isnan().any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": torch.zeros(1, 8, 8, 96).double()}, TypeError, r"qkv: expected torch.float32 or torch.bfloat16, got"),
        ({"padding": torch.zeros(96).bfloat16()}, TypeError, r"padding: expected torch.float32, got torch.bfloat16"),
        ({"bias": torch.zeros(2, 16, 16).double()}, TypeError, r"bias: expected torch.float32, got torch.float64"),
        ({"qkv": torch.zeros(1, 8, 96, 8).mT}, ValueError, r"qkv: expected contiguous memory"),
        ({"qkv": torch.zeros(1, 8, 8, 95)}, ValueError, r"qkv: expected shape \[B, H, W, a multiple of 6\]"),
        ({"padding": torch.zeros(95)}, ValueError, r"padding: expected shape \[96\], got \(95,\)"),
        ({"bias": torch.zeros(2, 16, 15)}, ValueError, r"bias: expected shape \[heads, 16, 16\], got"),
        ({"window": 0}, ValueError, r"window: expected > 0, got 0"),
        ({"shift": 4}, ValueError, r"shift: expected 0..3, got 4"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_what_does_not_fit_is_an_error(changes, error, message, raw):
    qkv, padding, bias, window = random_case(0, (1, 8, 8), 2, 16, 4, torch.float32)
    arguments = {"qkv": qkv, "padding": padding, "bias": bias, "window": window, "shift": 0} | changes
    function = torch.ops.maskformer_fast.window_attention if raw else window_attention
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (torch.zeros(1, 8, 8, 32).double(), TypeError, r"gradient: expected torch.float32, got torch.float64"),
        (torch.zeros(1, 8, 8, 31), ValueError, r"gradient: expected shape \(1, 8, 8, 32\)"),
        (torch.zeros(1, 8, 32, 8).mT, ValueError, r"gradient: expected contiguous memory"),
    ],
)
def test_a_gradient_that_does_not_fit_is_an_error(gradient, error, message):
    with pytest.raises(error, match=message):
        torch.ops.maskformer_fast.window_attention_backward(
            gradient, *random_case(0, (1, 8, 8), 2, 16, 4, torch.float32), 2
        )


def test_it_is_registered_for_export_and_compilation():
    qkv, padding, bias, window = random_case(0, (1, 5, 9), 2, 8, 4, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (qkv, padding, bias)]
    torch.library.opcheck(torch.ops.maskformer_fast.window_attention.default, (*tensors, window, 2))
    torch.library.opcheck(
        torch.ops.maskformer_fast.window_attention_backward.default,
        (torch.randn(1, 5, 9, 16), *[tensor.detach() for tensor in tensors], window, 2),
        test_utils=("test_schema", "test_faketensor"),
    )
    with pytest.raises(ValueError, match=r"bias: expected shape \[heads, N, N\], got \(2, 3, 4\)"):
        pack_window_bias(torch.zeros(2, 3, 4))
