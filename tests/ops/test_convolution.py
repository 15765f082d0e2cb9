"""3x3 convolution by Winograd's algorithm against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops import convolution
from maskformer_fast.ops.convolution import conv3x3, conv3x3_winograd, pack_winograd_weights, suits_winograd

extension = load_extension()
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 6e-3}  # of the largest value


def random_case(seed, shape, channels, dtype):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(channels, shape[1], 3, 3, generator=generator) / (9 * shape[1]) ** 0.5
    return images, weight, torch.randn(channels, generator=generator)


def expected(images, weight, bias, relu):
    result = F.conv2d(images.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    return result.relu() if relu else result


def assert_close(got, wanted, dtype):
    assert got.dtype == dtype and got.shape == wanted.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((1, 16, 1, 1), 1), ((2, 32, 4, 4), 16), ((1, 48, 5, 3), 100), ((3, 16, 2, 37), 65), ((1, 256, 32, 40), 256)],
)
def test_every_instruction_set_equals_float64(shape, channels, dtype, isa):
    images, weight, bias = random_case(0, shape, channels, dtype)
    packed = pack_winograd_weights(weight)
    for offset, relu in ((None, False), (bias, True)):
        got = conv3x3_winograd(images, packed, offset, channels, relu)
        assert_close(got, expected(images, weight, offset, relu), dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), blocks=st.integers(1, 3), height=st.integers(1, 30),
    width=st.integers(1, 30), channels=st.integers(1, 80), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    relu=st.booleans(), last=st.booleans(), threads=st.integers(1, 4),
)  # fmt: skip
def test_random_shapes_equal_float64(seed, batch, blocks, height, width, channels, dtype, relu, last, threads):
    images, weight, bias = random_case(seed, (batch, 16 * blocks, height, width), channels, dtype)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = conv3x3_winograd(images, pack_winograd_weights(weight), bias, channels, relu)
    finally:
        torch.set_num_threads(before)
    if batch == 0:
        assert got.shape == (0, channels, height, width)
    else:
        assert_close(got, expected(images, weight, bias, relu), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_read_where_they_lie(dtype):
    images, weight, bias = random_case(6, (4, 32, 22, 19), 20, dtype)
    last = images.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([images, images], dim=1).contiguous(memory_format=torch.channels_last)
    packed = pack_winograd_weights(weight)
    for view in (last[1:, :, 3:, 2:9], last[::2, :, ::3, 1::2], last.flip(-1), last.mT, wide[:, 16:48],
                 images[:1].expand(3, -1, -1, -1), last[..., 4:5], last[:1, :, 5:6], last[:, :, :1, :1]):  # fmt: skip
        assert_close(conv3x3_winograd(view, packed, bias, 20), expected(view, weight, bias, False), dtype)


def test_threads_do_not_change_a_bit():
    images, weight, bias = random_case(1, (2, 64, 37, 50), 100, torch.float32)
    packed = pack_winograd_weights(weight)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(conv3x3_winograd(images, packed, bias, 100))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_values_that_are_not_finite_stay_near_their_tile():
    images, weight, _ = random_case(2, (1, 16, 24, 24), 16, torch.float32)
    images[0, 3, 10, 10] = float("nan")
    got = conv3x3_winograd(images, pack_winograd_weights(weight), None, 16, relu=True)
    broken = got.isnan().any(1)[0]
    assert broken[9:12, 9:12].all()  # what the kernel reaches; ReLU keeps NaN
    assert not broken[:4].any() and not broken[16:].any() and not broken[:, :4].any() and not broken[:, 16:].any()


def test_it_passes_opcheck():
    images, weight, bias = random_case(3, (1, 16, 6, 7), 20, torch.float32)
    arguments = (images, pack_winograd_weights(weight), bias, 20, True)
    torch.library.opcheck(torch.ops.maskformer_fast.conv3x3_winograd.default, arguments)


def test_packing_ignores_autocast_and_gradients_rule_it_out():
    images, weight, bias = random_case(4, (1, 16, 8, 8), 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pack_winograd_weights(weight), pack_winograd_weights(weight))
        assert pack_winograd_weights(weight).dtype == torch.float32
    assert suits_winograd(images, weight, bias)
    assert not suits_winograd(images, weight.clone().requires_grad_(), bias)
    assert not suits_winograd(images, weight, bias.clone().requires_grad_())
    assert not suits_winograd(images.double(), weight, bias)
    assert not suits_winograd(images[:, :8], weight[:, :8], bias)
    assert not suits_winograd(images, weight[..., :1, :1], bias)


def test_bad_arguments_are_named():
    images, weight, bias = random_case(5, (1, 16, 8, 8), 20, torch.float32)
    packed = pack_winograd_weights(weight)
    with pytest.raises(TypeError, match=r"images: expected torch.float32 or torch.bfloat16, got torch.float64"):
        conv3x3_winograd(images.double(), packed, bias, 20)
    with pytest.raises(ValueError, match=r"packed: expected shape \(36, 3, 16, 16\), got \(36, 2, 16, 16\)"):
        conv3x3_winograd(images, packed, None, 40)
    with pytest.raises(ValueError, match=r"bias: expected shape \[20\], got \(16,\)"):
        conv3x3_winograd(images, packed, bias[:16], 20)
    with pytest.raises(TypeError, match=r"packed: expected a contiguous torch.float32, got torch.bfloat16"):
        conv3x3_winograd(images, packed.bfloat16(), bias, 20)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, C, H, W\], got \(16, 8, 8\)"):
        conv3x3_winograd(images[0], packed, bias, 20)
    with pytest.raises(ValueError, match=r"weight: expected a multiple of 16 input channels, got 8"):
        pack_winograd_weights(weight[:, :8])
    with pytest.raises(ValueError, match=r"weight: expected a multiple of 16 input channels, got 0"):
        pack_winograd_weights(weight[:, :0])
    with pytest.raises(ValueError, match=r"weight: expected at least one output channel, got 0"):
        pack_winograd_weights(weight[:0])
    with pytest.raises(ValueError, match=r"channels: expected >= 1, got -3"):
        conv3x3_winograd(images, packed, None, -3)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, C, 3, 3\], got \(20, 16, 1, 3\)"):
        pack_winograd_weights(weight[..., :1, :])


def gradients(convolve, tensors, slopes):
    """Result, and gradients of the tensors that are not None."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    result = convolve(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return [result.detach(), *torch.autograd.grad(result, given, slopes.to(result.dtype))]


def assert_gradients_close(tensors, slopes):
    exact = [None if tensor is None else tensor.double() for tensor in tensors]
    wanted = gradients(lambda images, weight, bias: F.conv2d(images, weight, bias, padding=1), exact, slopes)
    found = gradients(conv3x3, tensors, slopes)
    for got, reference in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32 and got.shape == reference.shape
        assert (got - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("most_tiles", [5, 1024])
@pytest.mark.parametrize(
    ("shape", "channels"), [((1, 16, 1, 1), 16), ((2, 32, 9, 4), 48), ((3, 16, 2, 37), 64), ((1, 112, 13, 8), 32)]
)
def test_gradients_equal_float64(shape, channels, most_tiles, isa, monkeypatch):
    monkeypatch.setattr(convolution, "_MOST_TILES", most_tiles)
    images, weight, bias = random_case(3, shape, channels, torch.float32)
    slopes = torch.randn(shape[0], channels, *shape[2:], generator=torch.Generator().manual_seed(4))
    for offset in (None, bias):
        assert_gradients_close((images, weight, offset), slopes)


def test_gradients_of_tensors_of_any_layout_equal_float64():
    images, weight, bias = random_case(5, (2, 32, 11, 6), 16, torch.float32)
    slopes = torch.randn(2, 16, 6, 11, generator=torch.Generator().manual_seed(6)).mT
    last = images.contiguous(memory_format=torch.channels_last)
    for view in (images, last, last.flip(-1), images[:1].expand(2, -1, -1, -1)):
        for kernels in (weight, weight.mT, weight.contiguous(memory_format=torch.channels_last)):
            assert_gradients_close((view, kernels, bias), slopes)
    assert_gradients_close((images, weight, None), slopes[:1, :1, :1, :1].expand_as(slopes))


def test_only_gradients_that_are_needed_are_computed():
    images, weight, bias = random_case(7, (1, 16, 5, 5), 16, torch.float32)
    conv3x3(images, weight.requires_grad_(), bias).sum().backward()
    assert images.grad is None and bias.grad is None and weight.grad is not None
    assert conv3x3(images[:0], weight, None).shape == (0, 16, 5, 5)


def test_training_follows_the_rules_of_operators():
    images, weight, bias = (tensor.requires_grad_() for tensor in random_case(8, (2, 32, 5, 3), 16, torch.float32))
    torch.library.opcheck(torch.ops.maskformer_fast.conv3x3, (images, weight, bias))
    maps = (torch.randn(2, 16, 5, 3), images.detach())
    torch.library.opcheck(torch.ops.maskformer_fast.conv3x3_weight_gradient, maps)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 16, 4, 4), (16, 16, 1, 1), None), r"weight: expected shape \[N, C, 3, 3\]"),
        (((1, 16, 4, 4), (20, 16, 3, 3), None), "weight: expected a multiple of 16 output channels"),
        (((1, 8, 4, 4), (16, 8, 3, 3), None), "weight: expected a multiple of 16 input channels"),
        (((1, 32, 4, 4), (16, 16, 3, 3), None), r"images: expected shape \[B, 16, H, W\]"),
        (((1, 16, 4, 4), (16, 16, 3, 3), 4), r"bias: expected shape \[16\]"),
    ],
)
def test_training_refuses_other_shapes(shapes, message):
    images, weight, bias = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        conv3x3(images, weight, bias)


def test_training_refuses_other_types_and_gradients_of_other_maps():
    with pytest.raises(TypeError, match="images: expected torch.float32"):
        conv3x3(torch.zeros(1, 16, 4, 4).bfloat16(), torch.zeros(16, 16, 3, 3), None)
    operator = torch.ops.maskformer_fast.conv3x3_weight_gradient
    with pytest.raises(ValueError, match="gradient: expected the size of images"):
        operator(torch.zeros(1, 16, 4, 5), torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="images: expected shape"):
        operator(torch.zeros(1, 16, 4, 4), torch.zeros(1, 8, 4, 4))
    with pytest.raises(TypeError, match="gradient: expected torch.float32"):
        operator(torch.zeros(1, 16, 4, 4).double(), torch.zeros(1, 16, 4, 4))
