"""The semantic kernels against the definition in double precision, on ragged sizes."""

from __future__ import annotations

import math

import pytest
import torch

from maskformer_fast.kernels.semantic import semantic_from_embeddings, semantic_from_logits
from maskformer_fast.ops.semantic_inference import SemanticMap, semantic_inference_eager

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}


def naive_scores(masks: torch.Tensor, classes: torch.Tensor, extent, size) -> torch.Tensor:
    """[B, K, H, W] float64."""
    weights = []
    for source, part, target in zip(masks.shape[2:], extent, size, strict=True):
        place = ((torch.arange(target, dtype=torch.float64) + 0.5) * part / target - 0.5).clamp(0, source - 1)
        weights.append((1 - (place[:, None] - torch.arange(source)).abs()).clamp(min=0))
    up = torch.einsum("yh,bqhw,xw->bqyx", weights[0], masks.double(), weights[1])
    return torch.einsum("bqc,bqyx->bcyx", classes.double().softmax(-1)[..., :-1], up.sigmoid())


def check(result: SemanticMap, expected: torch.Tensor, tolerance: float) -> None:
    """Labels right where the lead exceeds the tolerance, values within as much."""
    ordered = expected.sort(1, descending=True).values
    best = ordered[:, 0]
    lead = best - ordered[:, 1] if expected.shape[1] > 1 else torch.full_like(best, math.inf)
    allowed = tolerance * best.clamp(min=1)
    clear = lead > 2 * allowed
    assert clear.any()
    assert torch.equal(result.labels[clear].long(), expected.argmax(1)[clear])
    assert ((best - result.scores).abs() <= allowed).all()
    assert torch.equal(result.margins.isinf(), lead.isinf())
    assert (((result.margins - lead).abs() <= 2 * allowed) | lead.isinf()).all()


def empty_map(batch: int, size: tuple[int, int], classes: int) -> SemanticMap:
    """What kernels must overwrite everywhere."""
    dtype = torch.uint8 if classes <= 255 else torch.int16
    labels = torch.full((batch, *size), 99, dtype=dtype)
    return SemanticMap(labels, torch.full(labels.shape, -7.0), torch.full(labels.shape, -7.0))


def random_case(seed: int, batch: int, queries: int, classes: int, size: tuple[int, int]):
    generator = torch.Generator().manual_seed(seed)
    masks = 4 * torch.randn(batch, queries, *size, generator=generator)
    return masks, 3 * torch.randn(batch, queries, classes + 1, generator=generator)


GRID = [
    # batch, queries, classes, map, extent, output
    (2, 100, 19, (5, 7), (5.0, 7.0), (20, 28)),  # scale 4: one round of taps
    (1, 7, 1, (6, 5), (6.0, 5.0), (12, 10)),
    (1, 129, 33, (4, 5), (3.3, 4.7), (13, 17)),  # a third group of queries
    (1, 256, 40, (3, 3), (3.0, 3.0), (9, 11)),
    (1, 20, 300, (5, 4), (4.9, 3.1), (11, 9)),  # labels of 16 bits
    (1, 5, 1100, (3, 4), (3.0, 4.0), (6, 5)),  # more classes than softmax takes at once
    (1, 9, 12, (30, 41), (28.7, 40.2), (9, 13)),  # downwards
    (1, 9, 12, (9, 17), (9.0, 17.0), (9, 17)),  # the same size
    (1, 3, 5, (1, 1), (0.4, 1.0), (3, 40)),
    (1, 4, 6, (3, 2), (3.0, 2.0), (75, 39)),  # scale 25
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("batch, queries, classes, size, extent, output", GRID)
def test_logits(dtype, batch, queries, classes, size, extent, output) -> None:
    masks, logits = random_case(queries, batch, queries, classes, size)
    masks = masks.to(dtype)
    result = empty_map(batch, output, classes)
    semantic_from_logits(masks, logits, extent, *result)
    check(result, naive_scores(masks, logits, extent, output), TOLERANCES[dtype])
    alone = empty_map(batch, output, classes).labels
    semantic_from_logits(masks, logits, extent, alone)
    disputed = alone != result.labels  # the last class, repeated, may win its own ties; nothing else may differ
    assert not disputed.any() or (result.margins[disputed] == 0).all()


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("depth, batch, queries, classes, size, extent, output", [
    (24, *GRID[0]), (65, *GRID[2]), (16, *GRID[6]), (1, *GRID[9]),
])  # fmt: skip
def test_embeddings(fused, dtype, depth, batch, queries, classes, size, extent, output) -> None:
    generator = torch.Generator().manual_seed(depth)
    _, logits = random_case(depth, batch, queries, classes, size)
    embeddings = torch.randn(batch, queries, depth, generator=generator).to(dtype)
    pixels = (4 / depth**0.5 * torch.randn(batch, depth, *size, generator=generator)).to(dtype)
    masks = torch.einsum("bqd,bdhw->bqhw", embeddings.double(), pixels.double())
    result = empty_map(batch, output, classes)
    semantic_from_embeddings(embeddings, pixels, logits, extent, *result, fused=fused)
    rounding = 0 if fused or dtype == torch.float32 else 4e-3  # mask logits of about 10 become halves
    check(result, naive_scores(masks, logits, extent, output), TOLERANCES[dtype] + rounding)


def test_strides_and_half_class_logits() -> None:
    masks, logits = random_case(1, 2, 11, 6, (5, 6))
    wide = torch.randn(2, 11, 8, 9)
    wide[..., 1:6, 2:8] = masks
    columns = logits.half().transpose(1, 2).contiguous().transpose(1, 2)
    expected = naive_scores(masks, columns, (5.0, 6.0), (17, 19))
    for view in (wide[..., 1:6, 2:8], masks.contiguous(memory_format=torch.channels_last), masks.mT.contiguous().mT):
        result = empty_map(2, (17, 19), 6)
        semantic_from_logits(view, columns, (5.0, 6.0), *result)
        check(result, expected, 1e-5)


def test_coordinates_of_a_long_axis_are_exact() -> None:
    """A steep ramp shows a shift by 1e-5 of a tap: float32 coordinates have an error of 1e-4 here."""
    masks = (60.0 * (torch.arange(1500) % 2 * 2.0 - 1.0)).expand(1, 1, 1, 1500).contiguous()
    logits = torch.tensor([[[5.0, 1.0, 0.0]]])
    extent, output = (1.0, 1498.7), (1, 2311)
    result = empty_map(1, output, 2)
    semantic_from_logits(masks, logits, extent, *result)
    check(result, naive_scores(masks, logits, extent, output), 1e-5)


@pytest.mark.parametrize("value, name", [(math.nan, "pixel"), (math.nan, "class"), (math.inf, "class")])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_is_label_0_and_nan_score(dtype, value, name) -> None:
    masks, logits = random_case(3, 1, 9, 7, (6, 10))
    masks = masks.to(dtype)
    clean = empty_map(1, (24, 40), 7)
    semantic_from_logits(masks, logits, (6.0, 10.0), *clean)
    (masks[0, 3] if name == "pixel" else logits[0, 3]).view(-1)[-1 if name == "class" else 34] = value
    result = empty_map(1, (24, 40), 7)
    semantic_from_logits(masks, logits, (6.0, 10.0), *result)
    bad = semantic_inference_eager(masks, logits, (6.0, 10.0), (24, 40), True, True).scores.isnan()
    assert bad.any() and torch.equal(bad, result.scores.isnan()) and torch.equal(bad, result.margins.isnan())
    assert (result.labels[bad] == 0).all() and torch.equal(result.labels[~bad], clean.labels[~bad])
    if name == "class":
        assert bad.all()


def test_infinite_masks() -> None:
    inf = math.inf
    masks = torch.tensor([[[[-inf, -inf, 2.0, 2.0]], [[1.0, 1.0, inf, -inf]]]])
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    for size in ((1, 4), (1, 9), (3, 8)):
        result = empty_map(1, size, 2)
        semantic_from_logits(masks, logits, (1.0, 4.0), *result)
        expected = semantic_inference_eager(masks, logits, (1.0, 4.0), size, True, True)
        assert torch.equal(result.labels, expected.labels)
        torch.testing.assert_close(result.scores, expected.scores)


def test_equal_scores_give_the_lowest_class() -> None:
    logits = torch.zeros(1, 3, 71)
    logits[..., 0] = -5.0
    result = empty_map(1, (8, 8), 70)
    semantic_from_logits(torch.randn(1, 3, 4, 4), logits, (4.0, 4.0), *result)
    assert (result.labels == 1).all() and (result.margins == 0).all()


@pytest.mark.parametrize("batch, queries", [(0, 5), (2, 0)])
def test_nothing_to_do(batch: int, queries: int) -> None:
    result = empty_map(batch, (9, 9), 6)
    semantic_from_logits(torch.zeros(batch, queries, 4, 4), torch.zeros(batch, queries, 7), (4.0, 4.0), *result)
    assert (result.labels == 0).all() and (result.scores == 0).all() and (result.margins == 0).all()


@pytest.mark.parametrize(
    "masks, labels, message",
    [
        (torch.zeros(1, 257, 2, 2), torch.zeros(1, 4, 4), "number of queries: expected at most 256, got 257"),
        (torch.zeros(1, 2, 2, 2).double(), torch.zeros(1, 4, 4), "dtype: expected one of .*, got torch.float64"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4).mT, "labels: expected contiguous"),
    ],
)
def test_bad_input_is_named(masks, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        semantic_from_logits(masks, torch.zeros(1, masks.shape[1], 4), (2.0, 2.0), labels.to(torch.uint8))
