"""Kernels of panoptic and instance inference and of run lengths against formulas in float64, on ragged sizes.

Scenes are drawn until none of their pixels is so close to a tie that rounding may change it: results must be equal.
"""

from __future__ import annotations

import math
import sys
from itertools import count, pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.kernels.rle import LAUNCH, RUN_BLOCK, _bytes_kernel
from maskformer_fast.kernels.segments_instances import instance_masks
from maskformer_fast.kernels.segments_panoptic import panoptic_segments
from maskformer_fast.ops.rle import EncodedMasks, _instance_rle_cuda, encode_instances, instance_rle
from maskformer_fast.ops.rle import _Arguments as _RleArguments
from maskformer_fast.ops.segments import (
    InstanceMasks,
    PanopticSegments,
    _instance_inference_cuda,
    _InstanceArguments,
    _panoptic_inference_cuda,
    _PanopticArguments,
    instance_inference,
    panoptic_inference,
)
from maskformer_fast.structures import unpack_masks
from tests.support.oracles import resampled

RULES = get_args(PanopticRule)
MARGIN = 1e-5  # of scores and probabilities
GRID = [
    # map, extent, output
    ((5, 4), (5.0, 4.0), (20, 16)),  # scale 4: most tiles are settled by their taps
    ((4, 5), (3.3, 4.7), (13, 21)),
    ((2, 3), (2.0, 3.0), (3, 133)),  # a second tile of packed columns, and 5 columns in the last byte
    ((20, 31), (18.7, 30.2), (9, 13)),  # downwards: tiles have more taps than pixels
    ((9, 10), (9.0, 10.0), (9, 10)),  # the same size
    ((1, 1), (0.4, 1.0), (3, 12)),
    ((3, 4), (3.0, 4.0), (1, 1)),
]
LONG = [
    ((20, 3), (19.3, 2.6), (77, 10)),  # more rows than one program of instances walks
    ((2, 70), (2.0, 69.4), (5, 275)),  # more columns than one program writes
    ((9, 4), (9.0, 3.7), (64, 13)),  # run lengths: words with no bit to spare
]


def clear_logits(seed: int, batch: int, queries: int, grid, dtype=torch.float32, shift: float = 1.0) -> torch.Tensor:
    """Draw logits of which no resampled value is close to 0."""
    for attempt in count(seed):
        generator = torch.Generator().manual_seed(attempt)
        logits = (3 * torch.randn(batch, queries, *grid[0], generator=generator) - shift).to(dtype)
        if (resampled(logits, *grid[1:]).abs() > MARGIN).all():
            return logits


def expected_panoptic(logits, scores, categories, is_thing, extent, size, threshold, rule):
    """Results in float64, one query after the other -> results, distance of the closest pixel to a tie."""
    masks = resampled(logits, extent, size).sigmoid()
    id_map = torch.full((len(logits), *size), VOID)
    ids, areas, closest = torch.full(scores.shape, VOID), torch.zeros(scores.shape, dtype=torch.int64), 1.0
    for image, present in enumerate((categories >= 0).tolist()):
        present = [query for query, here in enumerate(present) if here]
        if not present:
            continue
        values = scores[image, present].double()[:, None, None] * masks[image, present]
        claims = values if rule == "huggingface" else masks[image, present]
        winner = values.argmax(0)
        top = torch.cat([values, -torch.ones(1, *size)]).topk(2, 0).values
        closest = min(closest, (top[0] - top[1]).min().item(), (claims - 0.5).abs().min().item())
        stuff, segments = {}, 0
        for slot, query in enumerate(present):
            won, owned = winner == slot, claims[slot] >= 0.5
            segment = won & owned if rule == "mask2former" else won
            areas[image, query] = segment.sum()
            if not segment.any() or not owned.any():
                continue
            ratio = won.sum().item() / owned.sum().item()
            if not (ratio > threshold if rule == "huggingface" else ratio >= threshold):
                continue
            category = categories[image, query].item()
            number = None if is_thing[category] else stuff.get(category)
            if number is None:
                segments += 1
                number = stuff[category] = segments
            ids[image, query] = number
            id_map[image, segment] = number
    return PanopticSegments(id_map.int(), ids.int(), areas), closest


def clear_scene(
    seed: int, batch: int, queries: int, grid, dtype, rule: str, threshold: float = 0.4, patch: tuple[int, int] = (1, 1)
):
    """Draw arguments of `panoptic_inference` without ties, logits alike in patches -> arguments, results."""
    for attempt in count(seed):
        generator = torch.Generator().manual_seed(attempt)
        patches = [-(-size // side) for size, side in zip(grid[0], patch, strict=True)]
        logits = 3 * torch.randn(batch, queries, *patches, generator=generator) - 1
        for axis, side in enumerate(patch):
            logits = logits.repeat_interleave(side, 2 + axis)
        logits = logits[:, :, : grid[0][0], : grid[0][1]].to(dtype)
        scores = 0.5 + 0.5 * torch.rand(batch, queries, generator=generator)
        categories = torch.randint(-1, 4, (batch, queries), generator=generator)
        arguments = (logits, scores, categories, torch.tensor([True, False] * 2), *grid[1:], threshold, rule)
        expected, closest = expected_panoptic(*arguments)
        if closest > MARGIN:
            return arguments, expected


def panoptic(*arguments) -> PanopticSegments:
    """`panoptic_inference` by its CUDA implementation."""
    return PanopticSegments(*_panoptic_inference_cuda(_PanopticArguments(*arguments)))


def instances(*arguments) -> InstanceMasks:
    """`instance_inference` by its CUDA implementation."""
    return InstanceMasks(*_instance_inference_cuda(_InstanceArguments(*arguments)))


def rle(*arguments) -> EncodedMasks:
    """`instance_rle` by its CUDA implementation."""
    return EncodedMasks(*_instance_rle_cuda(_RleArguments(*arguments)))


def assert_same(actual, expected) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    "grid, rule", [*((grid, rule) for grid in GRID[:4] for rule in RULES), *((grid, RULES[0]) for grid in GRID[4:])]
)
def test_panoptic(grid, rule) -> None:
    dtype = torch.float16 if rule == "mask2former" else torch.float32
    arguments, expected = clear_scene(0, 1, 3, grid, dtype, rule)
    assert_same(panoptic(*arguments), expected)


@pytest.mark.parametrize("rule", RULES)
def test_tiles_settled_by_their_taps(rule) -> None:
    grid = ((15, 24), (14.3, 23.6), (57, 94))
    arguments, expected = clear_scene(0, 1, 5, grid, torch.bfloat16, rule, 0.0, patch=(6, 11))
    assert_same(panoptic(*arguments), expected)


def test_more_than_32_tiles_side_by_side() -> None:
    arguments, expected = clear_scene(0, 1, 2, ((1, 50), (1.0, 49.7), (2, 1060)), torch.float32, "maskformer")
    assert_same(panoptic(*arguments), expected)


def test_many_queries_and_images() -> None:
    arguments, expected = clear_scene(5, 2, 40, ((3, 3), (2.9, 3.0), (6, 9)), torch.float32, "maskformer", 0.0)
    assert len(expected.ids[expected.ids != VOID].unique()) > 5
    assert_same(panoptic(*arguments), expected)


def test_any_strides_and_float64() -> None:
    arguments, expected = clear_scene(2, 2, 2, ((3, 5), (2.3, 4.7), (7, 9)), torch.float32, "mask2former")
    logits, scores, categories, *rest = arguments
    for view in (logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT, logits.double()):
        assert_same(panoptic(view, scores.T.contiguous().T, categories.T.contiguous().T, *rest), expected)


def test_ratio_equal_to_the_threshold_keeps_the_segment() -> None:
    """8 / 10 rounded to float32 is not the threshold 0.8, which is a float64."""
    logits = torch.full((1, 2, 1, 10), -9.0)
    logits[0, 0, 0, :10], logits[0, 1, 0, :2] = 2.0, 8.0  # the first keeps 8 of 10 pixels
    arguments = (logits, torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([True, True]), (1, 10), (1, 10))
    assert panoptic(*arguments, 0.8, "maskformer").ids.tolist() == [[1, 2]]
    assert panoptic(*arguments, 0.8, "huggingface").ids.tolist() == [[VOID, 1]]  # must be above
    actual = panoptic(*arguments, math.nextafter(0.8, 1), "maskformer")
    assert actual.ids.tolist() == [[VOID, 1]] and actual.id_map[0, 0].tolist() == [1, 1] + [VOID] * 8


@pytest.mark.parametrize(
    "rule, threshold, expected",
    [
        # the first query wins 6 pixels: 4 of the 5 that it owns, and the last 2, which nobody owns; the second 4 of 4
        ("maskformer", 1.0, [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]),
        ("mask2former", 1.0, [1, 1, 1, 1, 2, 2, 2, 2, VOID, VOID]),
        # 0.6 x sigmoid reaches 0.5 on 2 pixels, so 6 / 2; and 4 / 4 is not above 1
        ("huggingface", 1.0, [1, 1, 1, 1, VOID, VOID, VOID, VOID, 1, 1]),
        ("huggingface", 0.99, [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]),
        ("maskformer", 1.25, [VOID] * 10),
    ],
)
def test_rules_by_hand(rule: str, threshold: float, expected: list[int]) -> None:
    logits = torch.tensor([[4.0, 4.0, 0.5, 0.5, 0.5, -9, -9, -9, -1, -1], [-9.0] * 4 + [5.0] * 4 + [-9.0] * 2])
    actual = panoptic(
        logits[None, :, None], torch.tensor([[0.6, 0.9]]), torch.tensor([[0, 1]]), torch.tensor([True, True]),
        (1, 10), (1, 10), threshold, rule,
    )  # fmt: skip
    assert actual.id_map[0, 0].tolist() == expected
    for number in set(expected) - {VOID}:
        assert actual.areas[actual.ids == number].tolist() == [expected.count(number)]


def test_stuff_merges_into_the_first_segment_and_things_do_not() -> None:
    logits = torch.full((1, 6, 1, 6), -9.0)
    logits[0, range(6), 0, range(6)] = 9.0
    categories, is_thing = torch.tensor([[1, 0, 2, 1, 0, 7]]), torch.tensor([True, False, False])
    actual = panoptic(logits, torch.ones(1, 6), categories, is_thing, (1, 6), (1, 6), 0.5, "maskformer")
    # the last class has no flag: a thing
    assert actual.id_map.tolist() == [[[1, 2, 3, 1, 4, 5]]] and actual.ids.tolist() == [[1, 2, 3, 1, 4, 5]]


def test_of_equal_queries_the_first_wins() -> None:
    logits = 3 * torch.randn(1, 1, 3, 4).expand(1, 4, 3, 4)
    actual = panoptic(
        logits, torch.tensor([[0.4, 0.9, 0.9, 0.9]]), torch.tensor([[0, VOID, 1, 2]]), torch.ones(3).bool(),
        (3, 4), (12, 16), 0.0, "maskformer",
    )  # fmt: skip
    assert actual.areas.tolist() == [[0, 0, 12 * 16, 0]] and (actual.id_map == 1).all()


@pytest.mark.parametrize("batch, queries", [(2, 0), (1, 3), (0, 3)])
def test_no_query_kept_is_all_void(batch: int, queries: int) -> None:
    actual = panoptic(
        torch.randn(batch, queries, 4, 5), torch.rand(batch, queries), torch.full((batch, queries), VOID),
        torch.tensor([True]), (4, 5), (9, 7), 0.8, "mask2former",
    )  # fmt: skip
    assert actual.id_map.shape == (batch, 9, 7) and (actual.id_map == VOID).all() and (actual.ids == VOID).all()
    assert actual.areas.shape == (batch, queries) and (actual.areas == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_values_that_are_not_finite_equal_the_cpus(rule: str) -> None:
    logits = torch.full((1, 5, 2, 4), -3.0)
    for query, value in enumerate((math.nan, -math.inf, math.inf, 2.0, 4.0)):
        logits[0, query, :, query % 4] = value
    scores = torch.tensor([[0.9, 0.8, 0.7, math.nan, -2.0]])
    rest = (torch.arange(5)[None], torch.ones(5).bool(), (2.0, 4.0), (5, 19), 0.0, rule)
    assert_same(panoptic(logits, scores, *rest), panoptic_inference(logits, scores, *rest))
    scores[0, :3] = 0.0  # all of them: the first wins everywhere
    assert_same(panoptic(logits, scores, *rest), panoptic_inference(logits, scores, *rest))


def test_more_queries_go_to_the_eager_twin() -> None:
    arguments, expected = clear_scene(1, 1, 257, GRID[-1], torch.float32, "maskformer")
    assert_same(panoptic(*arguments), expected)
    with pytest.raises(ValueError, match="number of queries: expected at most 256, got 257"):
        panoptic_segments(*arguments[:4], arguments[4], 0.5, "maskformer", *expected)


@pytest.mark.parametrize(
    "grid, dtype",
    [
        *((grid, torch.float32) for grid in [*GRID, *LONG]),
        (GRID[1], torch.float16),
        (GRID[1], torch.bfloat16),
    ],
)
def test_instances(grid, dtype) -> None:
    logits = clear_logits(0, 2, 2, grid, dtype)
    logits[1, 1] = -1.0
    expected, (height, width) = resampled(logits, *grid[1:]), grid[2]
    actual = InstanceMasks(
        torch.full((2, 2, height, (width + 7) // 8), 99, dtype=torch.uint8), torch.full((2, 2), 99),
        torch.full((2, 2, 4), 99.0), torch.full((2, 2), 99.0),
    )  # fmt: skip
    instance_masks(logits, *grid[1:], *actual)
    masks = expected > 0
    packed = np.packbits(masks.numpy(), -1, bitorder="little")
    np.testing.assert_array_equal(actual.masks.numpy(), packed)
    assert torch.equal(actual.areas, masks.sum((2, 3)))
    scores = (expected.sigmoid() * masks).sum((2, 3)) / (masks.sum((2, 3)) + 1e-6)
    torch.testing.assert_close(actual.scores, scores.float(), atol=1e-6, rtol=0)
    for mask, box in zip(masks.flatten(0, 1), actual.boxes.flatten(0, 1).tolist(), strict=True):
        y, x = mask.nonzero().unbind(1)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])


def test_instances_of_values_that_are_not_finite() -> None:
    logits = torch.tensor([[[[math.nan, 1.0, math.inf, -math.inf, 2.0, 1e38]], [[math.nan] * 6]]])
    for view in (logits, logits.double(), logits.mT.contiguous().mT):
        actual = instances(view, (1, 6), (3, 29))
        assert_same(actual[:3], instance_inference(logits, (1, 6), (3, 29))[:3])
        torch.testing.assert_close(actual.scores, instance_inference(logits, (1, 6), (3, 29)).scores)


def test_no_instances() -> None:
    for shape in ((0, 3, 2, 2), (2, 0, 2, 2)):
        actual = instances(torch.zeros(shape), (2, 2), (5, 9))
        assert [tuple(t.shape) for t in actual] == [(*shape[:2], 5, 2), shape[:2], (*shape[:2], 4), shape[:2]]
        data, starts = rle(torch.zeros(shape), (2, 2), (5, 9), 7)
        assert starts.tolist() == [0] and data.tolist() == [0] * 7


def coco_counts(masks: torch.Tensor) -> list[bytes]:
    """[N, H, W] bool"""
    tools = pytest.importorskip("pycocotools.mask")
    return [rle["counts"] for rle in tools.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0), np.uint8))]


def counts_of(data: torch.Tensor, starts: torch.Tensor) -> list[bytes]:
    assert starts[-1] <= len(data) and (data[starts[-1] :] == 0).all()
    return [data[start:end].numpy().tobytes() for start, end in pairwise(starts.tolist())]


@pytest.mark.parametrize(
    "grid, dtype",
    [*((grid, torch.float32) for grid in [*GRID, *LONG]), (((3, 2), (3.0, 2.0), (37, 37)), torch.float16)],
)
def test_run_lengths_equal_pycocotools(grid, dtype) -> None:
    logits = clear_logits(3, 1, 4, grid, dtype)
    logits[0, 2], logits[0, 3] = -1.0, 1.0  # nothing, and all
    expected = coco_counts(resampled(logits, *grid[1:])[0] > 0)
    assert counts_of(*rle(logits, *grid[1:], 3000)) == expected


def test_runs_from_column_to_column() -> None:
    """At the foot of a column, at the head of the next, and over both; a first and a last pixel; a chessboard."""
    masks = torch.zeros(5, 9, 34, dtype=torch.bool)
    masks[0, -1, 3], masks[0, 0, 9] = True, True
    masks[1, -2:, 4], masks[1, :3, 5] = True, True
    masks[2, 0, 0], masks[2, -1, -1] = True, True
    masks[3] = (torch.arange(9)[:, None] + torch.arange(34)) % 2 == 0
    masks[4, :, 31:33] = True  # from one block of columns to the next
    logits = torch.where(masks, 1.0, -1.0)[None]
    actual = rle(logits, (9, 34), (9, 34), 2000)
    assert counts_of(*actual) == coco_counts(masks)


def test_tall_masks_settled_by_their_taps() -> None:
    logits = torch.tensor([[[[-1.0, 2.0], [-2.0, 5.0], [4.0, 3.0]]]])
    expected = coco_counts(resampled(logits, (3, 2), (300, 2))[0] > 0)
    assert counts_of(*rle(logits, (3, 2), (300, 2), 30)) == expected


def test_huge_and_tiny_taps_agree_between_tiles() -> None:
    """Interpolated between them, a pixel's sign depends on rounding: places must come in order all the same."""
    generator = torch.Generator().manual_seed(0)
    logits = 10.0 ** torch.randint(-30, 30, (1, 3, 12, 9), generator=generator)
    logits[0, 1] *= torch.rand(12, 9, generator=generator).sub(0.1).sign()
    logits[0, 2, :, 3] = math.nan
    actual = instances(logits, (12, 9), (34, 26))
    masks = unpack_masks(actual.masks[0], 26)
    assert counts_of(*rle(logits, (12, 9), (34, 26), 5000)) == coco_counts(masks)


def test_too_small_a_buffer_gives_a_sufficient_capacity() -> None:
    grid = ((3, 4), (3.0, 4.0), (9, 11))
    logits = clear_logits(7, 1, 2, grid)
    expected = counts_of(*instance_rle(logits, *grid[1:], 1000))
    size = sum(map(len, expected))
    for capacity in (0, size // 2, size - 1):
        needed = rle(logits, *grid[1:], capacity)[1][-1].item()
        assert capacity < needed <= 7 * size
    for capacity in (size, needed):
        assert counts_of(*rle(logits, *grid[1:], capacity)) == expected


def test_buffer_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ((3, 4), (3.0, 4.0), (9, 11))
    logits = clear_logits(7, 1, 2, grid)
    expected = encode_instances(logits, *grid[1:])
    module = sys.modules["maskformer_fast.ops.rle"]
    monkeypatch.setattr(module, "instance_rle", rle)
    for columns in (0, 4):
        monkeypatch.setattr(module, "BYTES_PER_COLUMN", columns)
        assert encode_instances(logits, *grid[1:]) == expected


def test_numbers_of_all_lengths_are_written_as_by_pycocotools() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    side = 46000  # nearly 2^31 pixels
    ends = [2**power + shift for power in range(2, 31) for shift in (-1, 0, 1)]
    masks = [[5, side**2], [0, 1, side**2], [side**2], [*ends[3::2], side**2], [*range(1, RUN_BLOCK + 2), side**2]]
    masks += [[10, 20, 20 + 2**30, 30 + 2**30, 31 + 2**30, 32 + 2**30, side**2 - 1, side**2]]
    expected = [
        tools.frPyObjects({"size": [side, side], "counts": np.diff([0, *mask]).tolist()}, side, side)["counts"]
        for mask in masks
    ]
    places = torch.tensor([place for mask in masks for place in mask], dtype=torch.int32)
    changes = torch.tensor([len(mask) - 1 for mask in masks]).cumsum(0)  # of masks of one column
    data, ends = torch.zeros(sum(map(len, expected)), dtype=torch.uint8), torch.zeros(len(masks), dtype=torch.int64)
    for write in (False, True):
        _bytes_kernel[(len(masks),)](ends, data, places, changes, 1, len(data), WRITE=write, BLOCK=RUN_BLOCK, **LAUNCH)
        ends = ends if write else ends.cumsum(0)
    assert counts_of(data, torch.tensor([0, *ends.tolist()])) == expected


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got torch.int32"):
        rle(torch.zeros(1, 1, 2, 2, dtype=torch.int32), (2, 2), (4, 4), 9)
    with pytest.raises(ValueError, match="output_size: expected fewer than 2\\^31 pixels"):
        rle(torch.zeros(1, 1, 2, 2), (2, 2), (46341, 46341), 9)
