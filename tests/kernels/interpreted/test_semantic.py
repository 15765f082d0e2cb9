"""The semantic kernels against the definition in float64, on ragged sizes."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.kernels import semantic
from maskformer_fast.kernels.resample import axis_tiles, narrow_maps, tap_place
from maskformer_fast.kernels.semantic import semantic_from_logits
from maskformer_fast.kernels.semantic_embeddings import semantic_from_embeddings
from maskformer_fast.ops.semantic import SemanticMap, _Arguments, _semantic_inference_cuda, semantic_inference_eager
from tests.support.oracles import assert_semantic_map, random_logits, semantic_scores

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def empty_map(batch: int, size: tuple[int, int], classes: int) -> SemanticMap:
    """Results that kernels must overwrite everywhere."""
    dtype = torch.uint8 if classes <= 255 else torch.int16
    labels = torch.full((batch, *size), 99, dtype=dtype)
    return SemanticMap(labels, torch.full(labels.shape, -7.0), torch.full(labels.shape, -7.0))


GRID = [
    # batch, queries, classes, map, extent, output
    (2, 40, 19, (5, 4), (5.0, 4.0), (20, 16)),  # scale 4: 15 taps
    (1, 7, 1, (6, 5), (6.0, 5.0), (12, 10)),
    (1, 100, 33, (4, 5), (3.3, 4.7), (13, 17)),  # groups of 64, 32 and 16 queries, two blocks of classes
    (1, 20, 300, (5, 4), (4.9, 3.1), (11, 9)),  # labels of 16 bits
    (1, 5, 1100, (3, 4), (3.0, 4.0), (6, 5)),  # more classes than softmax takes at once
    (1, 9, 12, (30, 41), (28.7, 40.2), (9, 13)),  # downwards: many rounds of taps
    (1, 9, 12, (9, 17), (9.0, 17.0), (9, 17)),  # the same size
    (1, 17, 2, (6, 8), (6.0, 8.0), (24, 30)),  # scale 3.75: 24 taps
    (1, 3, 5, (1, 1), (0.4, 1.0), (3, 40)),
    (1, 4, 6, (2, 2), (2.0, 2.0), (50, 38)),  # scale 25
    (1, 300, 40, (3, 3), (3.0, 3.0), (6, 11)),  # more queries than the quick kernel takes
    (1, 130, 151, (3, 3), (3.0, 2.9), (5, 7)),
]


@pytest.fixture(params=[80, 90], ids=["lean", "resident"])
def target(request, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compute capability whose form of the kernel is interpreted."""
    monkeypatch.setattr(semantic, "_target", lambda device: request.param)
    monkeypatch.setattr(semantic, "MULTIPROCESSORS", 1)  # programs walk over several tiles
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("batch, queries, classes, size, extent, output", GRID)
def test_labels_from_logits_equal_definition(target, dtype, batch, queries, classes, size, extent, output) -> None:
    masks, logits = random_logits(queries, batch, queries, classes, size)
    masks = masks.to(dtype)
    result = empty_map(batch, output, classes)
    semantic_from_logits(masks, logits, extent, *result)
    assert_semantic_map(result, semantic_scores(masks, logits, extent, output), TOLERANCES[dtype])


@pytest.mark.parametrize("classes, dtype", [(150, torch.float16), (847, torch.bfloat16), (1000, torch.float32)])
def test_usual_numbers_of_classes(target, classes: int, dtype: torch.dtype) -> None:
    masks, logits = random_logits(classes, 1, 20, classes, (4, 8))
    masks = masks.to(dtype).contiguous(memory_format=torch.channels_last)
    result = empty_map(1, (12, 29), classes)
    semantic_from_logits(masks, logits, (3.0, 7.27), *result)  # scale 3.99: 18 taps
    assert_semantic_map(result, semantic_scores(masks, logits, (3.0, 7.27), (12, 29)), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_large_and_close_logits(dtype) -> None:
    """Masks that change from 0 to 1 between two taps, and scores that differ little."""
    masks, logits = random_logits(8, 1, 12, 40, (4, 5))
    masks = (20 * masks).to(dtype)
    result = empty_map(1, (16, 20), 40)
    semantic_from_logits(masks, 1e-3 * logits, (4.0, 5.0), *result)
    expected = semantic_scores(masks, 1e-3 * logits, (4.0, 5.0), (16, 20))
    torch.testing.assert_close(result.scores, expected.amax(1).float(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    chosen = expected.gather(1, result.labels.long()[:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() <= 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_results_do_not_depend_on_which_are_wanted(dtype) -> None:
    masks, logits = random_logits(4, 1, 9, 45, (4, 5))
    expected = empty_map(1, (15, 17), 45)
    semantic_from_logits(masks.to(dtype), logits, (4.0, 5.0), *expected)
    for scores, margins in ((False, False), (True, False), (False, True)):
        labels, score, margin = empty_map(1, (15, 17), 45)
        semantic_from_logits(
            masks.to(dtype), logits, (4.0, 5.0), labels, score if scores else None, margin if margins else None
        )
        # The size of the blocks of classes depends on what is wanted, and the last bits of BLAS's sums on that size.
        decisive = expected.margins > 1e-5
        assert decisive.float().mean() > 0.99 and torch.equal(labels[decisive], expected.labels[decisive])
        for values, full, wanted in ((score, expected.scores, scores), (margin, expected.margins, margins)):
            if wanted:
                torch.testing.assert_close(values, full, rtol=1e-6, atol=2e-6)
            else:
                assert (values == -7).all()


@pytest.mark.parametrize("fused, dtype", [(True, torch.float32), (True, torch.float16), (False, torch.float16)])
@pytest.mark.parametrize("depth, batch, queries, classes, size, extent, output", [
    (24, *GRID[0]), (65, 1, 70, 9, (3, 4), (2.6, 4.0), (9, 15)), (7, *GRID[6]), (1, *GRID[8]),
])  # fmt: skip
def test_labels_from_embeddings_equal_definition(
    fused, dtype, depth, batch, queries, classes, size, extent, output
) -> None:
    generator = torch.Generator().manual_seed(depth)
    _, logits = random_logits(depth, batch, queries, classes, size)
    embeddings = torch.randn(batch, queries, depth, generator=generator).to(dtype)
    pixels = (4 / depth**0.5 * torch.randn(batch, depth, *size, generator=generator)).to(dtype)
    masks = torch.einsum("bqd,bdhw->bqhw", embeddings.double(), pixels.double())
    result = empty_map(batch, output, classes)
    semantic_from_embeddings(embeddings, pixels, logits, extent, *result, fused=fused)
    rounding = 0 if fused or dtype == torch.float32 else 4e-3  # mask logits of about 10 become halves
    assert_semantic_map(result, semantic_scores(masks, logits, extent, output), TOLERANCES[dtype] + rounding)


def test_strides_and_half_class_logits() -> None:
    masks, logits = random_logits(1, 2, 11, 6, (5, 6))
    wide = torch.randn(2, 11, 8, 9)
    wide[..., 1:6, 2:8] = masks
    columns = logits.half().transpose(1, 2).contiguous().transpose(1, 2)
    expected = semantic_scores(masks, columns, (5.0, 6.0), (10, 14))
    for view in (wide[..., 1:6, 2:8], masks.contiguous(memory_format=torch.channels_last), masks.mT.contiguous().mT):
        result = empty_map(2, (10, 14), 6)
        semantic_from_logits(view, columns, (5.0, 6.0), *result)
        assert_semantic_map(result, expected, 1e-5)


def test_maps_of_wide_strides_are_copied() -> None:
    wide = torch.empty(1 << 33, device="meta").as_strided((1, 2, 4, 5), (0, 1, 1 << 30, 2))
    assert narrow_maps(wide).stride() == (40, 20, 5, 1)
    assert narrow_maps(wide[:, :, :1]).stride() == (0, 1, 1 << 30, 2)
    with pytest.raises(ValueError, match="maps: expected fewer than 2.31 elements each, got 65536 x 32768"):
        narrow_maps(torch.empty(1, 1, 1 << 16, 1 << 15, device="meta"))


@triton.jit
def _place_kernel(low, share, scale, rest, size, first, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tap, weight = tap_place(first + index, scale, rest, size)
    tl.store(low + index, tap)
    tl.store(share + index, weight)


@pytest.mark.parametrize("source, extent, output", [(1500, 1498.7, 2311), (4000, 4000.0, 16000), (3000, 2999.3, 331)])
def test_coordinates_of_a_long_axis_are_exact(source: int, extent: float, output: int) -> None:
    """Coordinates in float32 would be off by up to 2e-4 of a tap."""
    axis = axis_tiles(source, extent, output, 16)
    low, share = torch.zeros(64, dtype=torch.int32), torch.zeros(64)
    _place_kernel[(1,)](low, share, axis.scale, axis.rest, source, output - 64, BLOCK=64)
    expected = (torch.arange(output - 64, output, dtype=torch.float64) + 0.5) * extent / output - 0.5
    torch.testing.assert_close(low + share.double(), expected.clamp(max=source - 1), atol=1e-7, rtol=0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_tile_reads_no_tap_beyond_those_it_multiplies(data: st.DataObject) -> None:
    source, output = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 300))
    extent, tile = source * data.draw(st.sampled_from([1.0, 0.93, 0.2])), data.draw(st.sampled_from([8, 16]))
    axis = axis_tiles(source, extent, output, tile)
    assert axis.tiles * tile >= output + axis.offset > (axis.tiles - 1) * tile
    for top in range(-axis.offset, output, tile):
        reads = [
            min(max((y + 0.5) * extent / output - 0.5, 0.0), source - 1.0)
            for y in range(max(top, 0), min(top + tile, output))
        ]
        assert math.ceil(reads[-1]) - math.floor(reads[0]) < axis.taps
    if source == extent and output == 4 * source:
        assert axis.taps <= tile // 4 + 1


@pytest.mark.parametrize("value, name", [(math.nan, "pixel"), (math.nan, "class"), (math.inf, "class")])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_is_label_0_and_nan_score(dtype, value, name) -> None:
    masks, logits = random_logits(3, 1, 9, 7, (6, 7))
    masks = masks.to(dtype)
    clean = empty_map(1, (24, 28), 7)
    semantic_from_logits(masks, logits, (6.0, 7.0), *clean)
    (masks[0, 3] if name == "pixel" else logits[0, 3]).view(-1)[-1 if name == "class" else 24] = value
    result = empty_map(1, (24, 28), 7)
    semantic_from_logits(masks, logits, (6.0, 7.0), *result)
    bad = semantic_inference_eager(masks, logits, (6.0, 7.0), (24, 28), True, True).scores.isnan()
    assert bad.any() and torch.equal(bad, result.scores.isnan()) and torch.equal(bad, result.margins.isnan())
    assert (result.labels[bad] == 0).all() and torch.equal(result.labels[~bad], clean.labels[~bad])
    if name == "class":
        assert bad.all()


@pytest.mark.parametrize("queries, dtype", [(5, torch.float64), (5, torch.float32), (257, torch.float16)])
def test_operator_calls_the_kernel(queries: int, dtype: torch.dtype) -> None:
    """The CUDA implementation."""
    masks, logits = (t.to(dtype) for t in random_logits(6, 1, queries, 8, (3, 4)))
    for scores, margins in ((True, True), (False, False), (False, True)):
        result = _semantic_inference_cuda(_Arguments(masks, logits, (2.5, 4.0), (7, 9), scores, margins))
        assert [tuple(t.shape) for t in result[1:]] == [(1, 7, 9) if wanted else (0,) for wanted in (scores, margins)]
        if scores:
            tolerance = TOLERANCES.get(dtype, 1e-5)
            assert_semantic_map(SemanticMap(*result), semantic_scores(masks, logits, (2.5, 4.0), (7, 9)), tolerance)


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
        (torch.zeros(1, 2, 2, 2).double(), torch.zeros(1, 4, 4), "dtype: expected one of .*, got torch.float64"),
        (torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4).mT, "labels: expected contiguous"),
    ],
)
def test_bad_input_is_named(masks, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        semantic_from_logits(masks, torch.zeros(1, masks.shape[1], 4), (2.0, 2.0), labels.to(torch.uint8))
