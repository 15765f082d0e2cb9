"""The matching cost kernels against the eager twin in double precision, on ragged shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskformer_fast.kernels import matching_cost as kernels
from maskformer_fast.ops.matching_cost import _Arguments, _matching_cost_cuda, _matching_cost_torch

FOCAL = (0.25, 0.75, 2.0)
BCE = (1.0, 1.0, 0.0)
WEIGHTS = (1.5, 7.0, 2.5)


def random_case(
    counts: list[int], queries: int, depth: int, size: tuple[int, int], input_size: tuple[int, int], layers: int = 2,
    classes: int = 5, slots: int | None = None, exclude: bool = True, dtype: torch.dtype = torch.float32,
    weights: tuple[float, float, float] = WEIGHTS, focal: tuple[float, float, float] = FOCAL,
) -> _Arguments:  # fmt: skip
    """Logits of about 3; image b is shorter than the padded input by b rows and 2b columns, with targets there too."""
    rng = torch.Generator().manual_seed(queries * depth)
    batch, slots, (height, width) = len(counts), max(counts) if slots is None else slots, input_size
    valid = torch.tensor([[height - b, width - 2 * b] for b in range(batch)]).clamp(min=0)
    return _Arguments(
        torch.randn(layers, batch, queries, classes + 1, generator=rng),
        torch.randn(layers, batch, queries, depth, generator=rng).to(dtype),
        (3 / depth**0.5 * torch.randn(batch, depth, *size, generator=rng)).to(dtype),
        torch.randint(classes, (batch, slots), generator=rng),
        torch.tensor(counts),
        torch.randint(256, (batch, slots, height, (width + 7) // 8), generator=rng, dtype=torch.uint8),
        valid if exclude else None,
        input_size,
        weights,
        focal,
    )


def from_logits(case: _Arguments) -> _Arguments:
    logits = torch.einsum("lbqd,bdhw->lbqhw", case.embeddings.double(), case.pixels.double())
    return case._replace(embeddings=logits.to(case.embeddings.dtype), pixels=None)


def oracle(case: _Arguments) -> Tensor:
    floats = (case.class_logits, case.embeddings, case.pixels)
    return _matching_cost_torch(_Arguments(*(None if t is None else t.double() for t in floats), *case[3:]))


def run(case: _Arguments, keep: bool = True) -> Tensor:
    """Run the kernels on memory that they must overwrite everywhere; `keep` as on GPUs with much shared memory."""
    shape = (*case.class_logits.shape[:3], case.labels.shape[1])
    cost = torch.full(shape, -77.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_keeps", lambda device: keep)
        kernels.matching_cost_forward(*case, cost)
    return cost


def check(case: _Arguments, keep: bool = True) -> Tensor:
    cost, expected = run(case, keep), oracle(case)
    tolerance = 2e-6 * max(1.0, float(expected.abs().amax())) if expected.numel() else 0
    torch.testing.assert_close(cost.double(), expected, rtol=0, atol=tolerance)
    return cost


# Blocks hold 64 rows (layers times queries), 32 pixels, 31 targets, 32 or 64 channels: below, at and beyond each.
GRID = {
    "ragged": ([3, 0, 2], 5, 24, (6, 7), (24, 28), {}),
    "two rows of blocks": ([2], 70, 32, (8, 8), (32, 32), {}),
    "blocks of targets": ([33, 2, 70], 4, 9, (5, 6), (19, 23), {"layers": 1}),
    "31 and 62": ([31, 62], 3, 64, (4, 4), (16, 16), {"layers": 1}),
    "fewer targets than slots": ([1, 2], 7, 5, (3, 9), (11, 35), {"slots": 40}),
    "many classes": ([4], 6, 65, (9, 8), (36, 32), {"classes": 150, "layers": 3}),
    "one of each": ([1], 1, 1, (1, 1), (3, 5), {"layers": 1, "classes": 1}),
    "larger than the input": ([3], 2, 3, (11, 13), (7, 9), {}),
    "none": ([0, 0], 4, 8, (4, 5), (16, 20), {"slots": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GRID)
def test_equals_double_precision(name: str, dtype: torch.dtype) -> None:
    *shape, rest = GRID[name]
    check(random_case(*shape, dtype=dtype, **rest))
    check(random_case(*shape, exclude=False, dtype=dtype, **rest), keep=False)
    check(from_logits(random_case(*shape, dtype=dtype, **rest)))


@pytest.mark.parametrize("focal", [BCE, (0.3, 0.7, 0.0), (0.6, 0.4, 1.0), (0.25, 0.75, 0.6), (1.0, 0.0, 2.0)])
def test_every_exponent(focal: tuple[float, float, float]) -> None:
    check(random_case([4, 3], 6, 17, (7, 6), (25, 24), focal=focal))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    def draw(most: int, least: int = 1) -> int:
        return data.draw(st.integers(least, most))

    counts = [draw(6, 0) for _ in range(draw(3))]
    size, input_size = (draw(12), draw(12)), (draw(60), draw(60))
    case = random_case(
        counts, draw(40), draw(40), size, input_size, draw(2), exclude=data.draw(st.booleans()),
        focal=data.draw(st.sampled_from([FOCAL, BCE])),
    )  # fmt: skip
    steepness = data.draw(st.floats(0.1, 30))
    check(case._replace(embeddings=case.embeddings * steepness))


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_any_number_of_chunks(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    case = random_case([3, 33], 3, 4, (17, 15), (51, 60))
    assert kernels._chunking(2, 2, 6, 255).chunks == {1: 1, 5: 2, 1000: 8}[programs]
    check(case)


@pytest.mark.parametrize("size, pixels", [(128, 16384), (7, 33), (1, 1)])
def test_chunks_cover_the_pixels_once(size: int, pixels: int) -> None:
    for images in (1, 16, 5000):
        chunking = kernels._chunking(images, 2, size, pixels)
        length = chunking.chunk_tiles * kernels.PIXELS
        assert (chunking.chunks - 1) * length < pixels <= chunking.chunks * length


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 130), st.integers(1, 700))
def test_samples_the_pixels_interpolate_would(out: int, size: int) -> None:
    rng = torch.Generator().manual_seed(out)
    row = torch.randint(256, (1, 1, 1, (size + 7) // 8), dtype=torch.uint8, generator=rng)
    logits = torch.linspace(-2, 2, out).expand(1, 1, 1, 1, out)
    floats = (torch.zeros(1, 1, 1, 2), logits, None)
    targets = (torch.tensor([[0]]), torch.tensor([1]), row, torch.tensor([[1, size]]))
    check(_Arguments(*floats, *targets, (1, size), WEIGHTS, FOCAL))


def test_any_strides() -> None:
    case = random_case([5, 2], 9, 6, (6, 9), (21, 33))
    cost = check(case)
    strided = case._replace(
        class_logits=case.class_logits.mT.contiguous().mT,
        embeddings=case.embeddings.transpose(0, 3).contiguous().transpose(0, 3),
        pixels=case.pixels.contiguous(memory_format=torch.channels_last),
        labels=case.labels.mT.contiguous().mT,
        counts=torch.stack([case.counts, -case.counts], 1)[:, 0],
        masks=case.masks.transpose(1, 3).contiguous().transpose(1, 3),
        valid_sizes=case.valid_sizes.mT.contiguous().mT,
    )
    assert torch.equal(run(strided), cost)
    wide = torch.randn(2, 2, 9, 7, 12)
    views = (wide[..., :6, 2:11], wide.mT[..., 1:7, :7], wide.permute(2, 1, 0, 3, 4)[:2, :, :2, :6, :9])
    for view in views:
        sliced = case._replace(class_logits=case.class_logits[:, :, : view.shape[2]], embeddings=view, pixels=None)
        if view.shape[3:] == (6, 9):
            check(sliced)
        check(sliced._replace(valid_sizes=None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field, focal",
    [("class_logits", FOCAL), ("embeddings", FOCAL), ("pixels", BCE), ("logits", BCE), ("logits", (0.6, 0.4, 1.5))],
)
def test_broken_predictions_break_their_own_query(field: str, value: float, focal: tuple[float, float, float]) -> None:
    case = random_case([2, 0, 3], 9, 6, (5, 6), (20, 24), focal=focal)
    if field == "logits":
        case = from_logits(case)
    clean = run(case)
    broken = torch.zeros(2, 3, 9, dtype=torch.bool)
    if field == "pixels":
        case.pixels[2, 1, 0, 1] = value
        broken[:, 2] = True
    else:
        source = case.class_logits if field == "class_logits" else case.embeddings
        source[(1, 2, 7) + (-1,) * (source.ndim - 3)] = value  # the last pixel is not counted
        if value != -math.inf or field != "class_logits":  # a class logit of -inf is a probability of 0
            broken[1, 2, 7] = True
    cost = run(case)
    assert not cost[broken].isfinite().any() and cost[~broken].isfinite().all()
    assert torch.equal(cost[~broken], clean[~broken]) or field == "class_logits"
    assert torch.equal(oracle(case).isfinite(), cost.isfinite())


@pytest.mark.parametrize("focal", [FOCAL, BCE])
def test_steep_logits(focal: tuple[float, float, float]) -> None:
    """Beyond what a float16 holds, and where probabilities are all but 0 and 1."""
    case = from_logits(random_case([3, 4], 5, 8, (8, 9), (32, 36), focal=focal))
    for steepness in (1e-20, 20.0, 1e5, 1e20, 1e30):
        check(case._replace(embeddings=case.embeddings * steepness))


@pytest.mark.parametrize("focal", [FOCAL, BCE, (0.25, 0.75, 1.5)])
@pytest.mark.parametrize("level", [-200.0, -100.0, -30.0, -3.0, 3.0, 100.0])
def test_equal_logits(focal: tuple[float, float, float], level: float) -> None:
    """Errors of single pixels do not average out."""
    case = from_logits(random_case([3], 5, 8, (8, 9), (32, 36), focal=focal))
    check(case._replace(embeddings=level + 1e-3 * case.embeddings))


def test_an_image_of_padding_only() -> None:
    case = random_case([2, 2], 3, 4, (4, 4), (16, 16), weights=(0.0, 1.0, 1.0))
    case.valid_sizes[1] = 0
    assert (check(case)[:, 1] == 0).all()


def test_labels_and_counts_out_of_range() -> None:
    case = random_case([2, 2], 3, 4, (4, 4), (16, 16))
    expected = run(case)
    case.labels[0, 1], case.labels[1, 0] = 6, -1
    cost = run(case)
    wrong = torch.tensor([[False, True], [True, False]])[None, :, None].expand_as(cost)
    assert cost[wrong].isnan().all() and torch.equal(cost[~wrong], expected[~wrong])
    costs = run(case._replace(counts=torch.tensor([9, -1])))
    assert costs[:, 0].isnan().equal(wrong[:, 0]) and (costs[:, 1] == 0).all()


@pytest.mark.parametrize(
    "layers, counts, queries, slots", [(0, [2], 5, None), (2, [0], 5, None), (2, [2, 1], 0, None), (1, [], 3, 2)]
)
def test_no_layers_targets_queries_or_images_give_empty_costs(
    layers: int, counts: list[int], queries: int, slots: int | None
) -> None:
    case = random_case(counts or [1], queries, 4, (4, 4), (16, 16), layers, slots=slots)
    if not counts:
        case = _Arguments(case[0][:, :0], case[1][:, :0], *(t[:0] for t in case[2:7]), *case[7:])
    assert run(case).numel() == 0


def test_operator_takes_half_embeddings_and_doubles() -> None:
    case = random_case([2, 3], 4, 12, (5, 6), (20, 24), dtype=torch.float16)
    cost = _matching_cost_cuda(case)
    assert cost.dtype == torch.float32 and torch.equal(cost, run(case))
    double = case._replace(**{name: getattr(case, name).double() for name in ("class_logits", "embeddings", "pixels")})
    assert torch.equal(_matching_cost_cuda(double), oracle(case))


def test_bad_input_is_named() -> None:
    case = random_case([2], 3, 4, (4, 4), (16, 16))
    cost = torch.empty(2, 1, 3, 2)
    with pytest.raises(ValueError, match=r"pixels: expected .*float32, got torch\.float16"):
        kernels.matching_cost_forward(*case._replace(pixels=case.pixels.half()), cost)
    with pytest.raises(ValueError, match=r"embeddings: expected one of .*got torch\.float64"):
        kernels.matching_cost_forward(*case._replace(embeddings=case.embeddings.double()), cost)
    with pytest.raises(ValueError, match=r"cost: expected contiguous memory"):
        kernels.matching_cost_forward(*case, torch.empty(2, 1, 2, 3).mT)
