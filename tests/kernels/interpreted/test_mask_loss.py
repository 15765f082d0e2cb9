"""The kernels of the mask losses against their eager twins in double precision, on ragged sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.kernels.mask_loss import BACKWARD_PIXELS, CELLS, cells_of_program
from maskformer_fast.kernels.mask_loss import mask_sums_backward as backward
from maskformer_fast.kernels.mask_loss import mask_sums_forward as forward
from maskformer_fast.ops.mask_loss import (
    MaskPairs,
    MaskPairsBackward,
    _mask_sums_backward_cuda,
    _mask_sums_cuda,
    mask_sums_backward_eager,
    mask_sums_eager,
)


def random_case(cells: tuple[int, int], size: tuple[int, int], padding: bool, gamma: float, spread: float = 3.0):
    """Arguments of the operator: 4 pairs, of which one has no target and NaN logits, and 3 targets.

    Bits of the targets beyond the width are garbage.
    """
    rng = torch.Generator().manual_seed(sum(cells) + sum(size))
    logits = spread * torch.randn(4, *cells, generator=rng)
    logits[1] = math.nan
    masks = torch.randint(0, 256, (3, size[0], (size[1] + 7) // 8), generator=rng, dtype=torch.uint8)
    masks[2, : size[0] // 2] = 255  # a connected mask
    valid = torch.tensor([[size[0] + 5, size[1] - size[1] // 3], [size[0] // 2, size[1]], [size[0] - 1, size[1] - 1]])
    return logits, masks, torch.tensor([2, -1, 0, 1]), valid if padding else None, size[1], [0.3, 0.8, gamma]


def check(arguments) -> None:
    logits, *rest = arguments
    sums = forward(*arguments)
    assert sums.dtype == torch.float32
    exact = MaskPairs(logits.double(), *rest)
    expected = mask_sums_eager(exact)
    torch.testing.assert_close(sums.double(), expected, rtol=2e-5, atol=1e-13)
    upstream = torch.randn(len(logits), 4, generator=torch.Generator().manual_seed(5))
    upstream[rest[1] < 0] = math.nan
    result = backward(upstream, *arguments)
    expected = mask_sums_backward_eager(MaskPairsBackward(upstream.double(), exact))
    # A cell's gradient is a sum over the pixels around it, of terms of both signs: rounding grows with their number.
    height, width = rest[0].shape[-2] / logits.shape[1] + 2, rest[3] / logits.shape[2] + 2
    atol = 4e-7 * height * width
    for pair, row, row_of_cells in zip(result.flatten(0, 1), expected.flatten(0, 1), range(10**6), strict=False):
        torch.testing.assert_close(pair.double(), row, rtol=2e-5, atol=atol, msg=lambda m, r=row_of_cells: f"{r}: {m}")


GRID = [
    # map, output, gamma, padding
    ((5, 7), (20, 28), 2.0, True),  # scale 4, less than a tile
    ((18, 17), (72, 68), 2.0, False),  # two tiles of cells along both axes
    ((5, 34), (19, 133), 1.0, True),  # scales near 4; two blocks of pixels
    ((3, 16), (19, 121), 0.0, True),
    ((2, 1), (14, 150), 0.7, False),  # one cell along an axis; blocks of pixels with nobody's cells between them
    ((1, 2), (3, 200), 1.5, True),
    ((18, 9), (7, 30), 2.0, True),  # fewer rows of pixels than of cells: most lie between no two rows
    ((4, 35), (9, 11), 1.5, False),
    ((6, 19), (6, 19), 1.0, True),
    ((7, 5), (1, 1), 0.0, False),
]


@pytest.mark.parametrize("cells, size, gamma, padding", GRID)
def test_equals_eager_twin(cells, size, gamma: float, padding: bool) -> None:
    check(random_case(cells, size, padding, gamma))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 0.6])
@pytest.mark.parametrize("level", [-40.0, -9.0, 0.0, 9.0])
def test_sums_of_small_terms_keep_their_digits(level: float, gamma: float) -> None:
    """All pixels are confidently right or wrong; the gradient consists of far smaller terms."""
    logits, *rest = random_case((2, 3), (8, 12), True, gamma, spread=1e-3)
    check((logits + level, *rest))


def test_nan_and_infinity_stay_in_their_pair() -> None:
    logits, *rest = random_case((5, 9), (20, 36), False, 2.0)
    upstream = torch.ones(4, 4)
    clean = forward(logits, *rest), backward(upstream, logits, *rest)
    others = torch.tensor([0, 1, 3])
    for value in (math.nan, math.inf, -math.inf):
        dirty = logits.clone()
        dirty[2, 2, 7] = value
        sums, gradient = forward(dirty, *rest), backward(upstream, dirty, *rest)
        assert not sums[2, :3].isfinite().all() and sums[2, 3] == clean[0][2, 3]
        assert torch.equal(sums[others], clean[0][others]) and torch.equal(gradient[others], clean[1][others])
        if math.isnan(value):
            assert gradient[2, 1:4, 6:9].isnan().all()


def test_pixels_that_are_not_counted_do_not_pass_on_nan() -> None:
    logits, masks, rows, _, *rest = random_case((5, 9), (20, 36), False, 2.0)
    logits[:, 3:] = math.nan
    arguments = (logits, masks, rows, torch.tensor([[10, 36]] * 3), *rest)  # pixels above the centre of cell row 2
    sums = forward(*arguments)
    assert sums.isfinite().all() and (sums[2] != 0).all()
    gradient = backward(sums, *arguments)
    assert gradient.isfinite().all() and (gradient[2, :3] != 0).all() and (gradient[:, 3:] == 0).all()


def test_strides_are_followed() -> None:
    logits, masks, rows, valid, width, focal = random_case((5, 6), (21, 23), True, 2.0)
    expected = forward(logits, masks, rows, valid, width, focal)
    views = (
        logits.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([masks, masks], 2)[..., : masks.shape[2]],
        rows.repeat_interleave(2)[::2],
        valid.mT.contiguous().mT,
        width,
        focal,
    )
    assert torch.equal(forward(*views), expected)
    upstream = expected.mT.contiguous().mT
    assert torch.equal(backward(upstream, *views), backward(expected, logits, masks, rows, valid, width, focal))


@pytest.mark.parametrize("pairs, targets", [(0, 0), (0, 2), (3, 0)])
def test_nothing_to_do(pairs: int, targets: int) -> None:
    arguments = (
        torch.randn(pairs, 3, 4),
        torch.zeros(targets, 12, 2, dtype=torch.uint8),
        torch.full((pairs,), -1),
        torch.ones(targets, 2, dtype=torch.int64),
        16,
        [0.5, 0.5, 2.0],
    )
    assert torch.equal(forward(*arguments), torch.zeros(pairs, 4))
    assert torch.equal(backward(torch.ones(pairs, 4), *arguments), torch.zeros(pairs, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_calls_the_kernel(dtype: torch.dtype) -> None:
    """The CUDA implementation; double precision goes to the eager twin."""
    logits, *rest = random_case((3, 4), (11, 15), True, 2.0)
    logits = logits.to(dtype)
    pairs = MaskPairs(logits, *rest)
    arguments = MaskPairsBackward(torch.ones(4, 4, dtype=dtype), pairs)
    sums, gradient = _mask_sums_cuda(pairs), _mask_sums_backward_cuda(arguments)
    assert sums.dtype == gradient.dtype == dtype
    takes_eager_twin = dtype == torch.float64
    assert torch.equal(sums, mask_sums_eager(pairs) if takes_eager_twin else forward(*pairs))
    expected = mask_sums_backward_eager(arguments) if takes_eager_twin else backward(arguments.gradient, *pairs)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4, 3, 4, dtype=torch.float16), r"logits: expected \[P, h, w\] float32, got \[4, 3, 4\] f"),
        (1, torch.zeros(3, 11, 1, dtype=torch.uint8), r"masks: expected \[N, H, 2\] uint8, got \[3, 11, 1\] uint8"),
        (1, torch.zeros(3, 11, 2), "masks: expected"),
        (2, torch.zeros(3, dtype=torch.int64), r"rows: expected \[4\] int64, got \[3\] int64"),
        (2, torch.zeros(4, dtype=torch.int32), "rows: expected"),
        (3, torch.zeros(4, 2, dtype=torch.int64), r"valid_sizes: expected \[3, 2\] int64, got \[4, 2\] int64"),
        (0, torch.zeros(4, 1, 1).expand(4, 1 << 26, 4), "expected a product below 2\\^30, got 67108864 times 11"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: torch.Tensor, message: str) -> None:
    arguments = list(random_case((3, 4), (11, 15), True, 2.0))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        forward(*arguments)
    with pytest.raises(ValueError, match=message):
        backward(torch.zeros(4, 4), *arguments)
    with pytest.raises(ValueError, match=r"gradient: expected \[4, 4\] float32, got \[4, 3\] float32"):
        backward(torch.zeros(4, 3), *random_case((3, 4), (11, 15), True, 2.0))


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    cells = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    size = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 70)))
    check(random_case(cells, size, data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 1.0, 2.0, 2.5]))))


@pytest.mark.parametrize("scale, cells", [(4, 15), (8, 15), (25, 14), (1, 16)])
def test_blocks_of_pixels_are_filled(scale: int, cells: int) -> None:
    assert cells_of_program(128, 128 * scale) == cells <= CELLS
    worked_on = math.ceil((cells + 1) * scale / BACKWARD_PIXELS) * BACKWARD_PIXELS
    assert scale == 1 or cells * scale / worked_on > 0.85
