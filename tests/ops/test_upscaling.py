"""The end of an upscaling block and its gradients against the eager twin in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops.upscaling import upscaling, upscaling_eager

EPSILON = 1e-6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # of the largest value
SHAPES = [(2, 5, 7, 40), (1, 33, 3, 16), (1, 1, 1, 1), (1, 20, 2, 33), (2, 1, 9, 5), (0, 3, 3, 8)]


def random_case(seed, batch, height, width, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    maps = (2 * draw(batch, height, width, 4, channels)).to(dtype)
    return maps, draw(channels, 1, 3, 3), draw(channels), draw(channels)


def exact(arguments):
    return tuple(tensor.double() for tensor in arguments)


def assert_close(got, wanted, tolerance):
    assert got.shape == wanted.shape
    if wanted.numel():
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_equals_float64(shape, dtype, gelu, isa):
    arguments = random_case(0, *shape, dtype)
    # the variance of one channel is 0, and that of few may be tiny: it is not what is tested
    epsilon = 0.1 if shape[-1] < 8 else EPSILON
    got = upscaling(*arguments, epsilon, gelu)
    assert got.dtype == dtype and got.is_contiguous()
    assert_close(got, upscaling_eager(*exact(arguments), epsilon, gelu), TOLERANCE[dtype])


def gradients(function, arguments, upstream, epsilon, gelu=True):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments]
    return torch.autograd.grad(function(*leaves, epsilon, gelu), leaves, upstream)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_float64(shape, gelu, isa):
    arguments, epsilon = random_case(1, *shape), 0.1 if shape[-1] < 8 else EPSILON
    batch, height, width, channels = shape
    upstream = torch.randn(batch, 2 * height, 2 * width, channels, generator=torch.Generator().manual_seed(2))
    got = gradients(upscaling, arguments, upstream, epsilon, gelu)
    for ours, wanted in zip(got, gradients(upscaling_eager, exact(arguments), upstream.double(), epsilon, gelu),
                            strict=True):  # fmt: skip
        assert_close(ours, wanted, 4e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 3), height=st.integers(1, 40), width=st.integers(1, 9),
    channels=st.integers(8, 70), gelu=st.booleans(), threads=st.integers(1, 4),
)  # fmt: skip
def test_random_shapes_equal_float64(seed, batch, height, width, channels, gelu, threads):
    arguments = random_case(seed, batch, height, width, channels)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = upscaling(*arguments, 1e-3, gelu)
    finally:
        torch.set_num_threads(before)
    assert_close(got, upscaling_eager(*exact(arguments), 1e-3, gelu), 1e-4)


def test_an_empty_map_has_an_empty_result():
    arguments = tuple(x.requires_grad_() for x in random_case(0, 1, 0, 4, 8))
    result = upscaling(*arguments, EPSILON)
    assert result.shape == (1, 0, 8, 8)
    assert not any(by.any() for by in torch.autograd.grad(result.sum(), arguments))


def test_gelu_is_exact_far_from_zero_too(isa):
    """A convolution that takes the centre, and two channels, of which LayerNorm keeps the sign of the difference."""
    x = torch.linspace(-30, 30, 4 * 500)
    maps = torch.stack((x, -x), dim=-1).view(1, 1, 500, 4, 2)
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    arguments = maps, weight, torch.ones(2), torch.zeros(2)
    assert_close(upscaling(*arguments, 1e3), upscaling_eager(*exact(arguments), 1e3), 1e-5)


def test_results_and_gradients_do_not_depend_on_threads():
    arguments = random_case(3, 2, 40, 6, 24)
    upstream = torch.randn(2, 80, 12, 24)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((upscaling(*arguments, EPSILON),
                          *gradients(upscaling, arguments, upstream, EPSILON)))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_what_is_not_finite_stays_within_its_neighbours(isa):
    arguments = random_case(4, 1, 6, 6, 16)
    arguments[0][0, 3, 2, 1, 5] = float("nan")  # pixel (6, 5) of the result
    got = upscaling(*arguments, EPSILON).isnan()
    wanted = torch.zeros(1, 12, 12, 16, dtype=torch.bool)
    wanted[:, 5:8, 4:7] = True
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"maps": torch.zeros(1, 2, 2, 4, 8).double()}, TypeError, "maps: expected torch.float32 or torch.bfloat16"),
        ({"maps": torch.zeros(1, 2, 2, 3, 8)}, ValueError, r"maps: expected shape \[B, h, w, 4, C\], got"),
        ({"weight": torch.zeros(8, 3, 3)}, ValueError, r"weight: expected shape \(8, 1, 3, 3\), got \(8, 3, 3\)"),
        ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight: expected shape \(8,\), got \(7,\)"),
        ({"norm_bias": torch.zeros(8).half()}, TypeError, "norm_bias: expected torch.float32, got torch.float16"),
        ({"epsilon": -1.0}, ValueError, "epsilon: expected >= 0, got -1.0"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_what_does_not_fit_is_an_error(changes, error, message, raw):
    names = ("maps", "weight", "norm_weight", "norm_bias")
    arguments = {**dict(zip(names, random_case(0, 1, 2, 2, 8), strict=True)), "epsilon": EPSILON, "gelu": True}
    function = torch.ops.maskformer_fast.upscaling if raw else upscaling
    with pytest.raises(error, match=message):
        function(**(arguments | changes))


def test_a_gradient_in_bfloat16_is_refused():
    maps, *others = random_case(0, 1, 2, 2, 8, torch.bfloat16)
    result = upscaling(maps.requires_grad_(), *others, EPSILON)
    with pytest.raises(TypeError, match="maps: expected torch.float32, got torch.bfloat16"):
        result.sum().backward()


def test_the_operator_is_registered_as_torch_expects():
    arguments = random_case(5, 1, 3, 2, 8)
    leaves = tuple(tensor.requires_grad_() for tensor in arguments)
    torch.library.opcheck(torch.ops.maskformer_fast.upscaling.default, (*leaves, EPSILON, True))


def test_strided_arguments_are_read_as_they_are():
    maps, weight, norm_weight, norm_bias = random_case(6, 1, 4, 3, 8)
    moved = maps.transpose(1, 4).contiguous().transpose(1, 4)
    others = (weight.transpose(2, 3).contiguous().transpose(2, 3), norm_weight, norm_bias)
    assert torch.equal(upscaling(moved, *others, EPSILON), upscaling(maps, weight, norm_weight, norm_bias, EPSILON))
