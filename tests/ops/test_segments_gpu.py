"""Panoptic and instance inference and run lengths on CUDA against formulas in float64 and the CPU's operators.

Scenes are drawn until none of their pixels is so close to a tie that rounding may change it: results must be equal.
"""

from __future__ import annotations

import math
from itertools import count, pairwise
from typing import get_args

import pytest
import torch

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops import encode_instances, instance_inference, instance_rle, panoptic_inference
from maskformer_fast.ops.rle import encode_packed_masks
from maskformer_fast.ops.segments import (
    PanopticSegments,
    panoptic_inference_eager,
)
from maskformer_fast.structures import unpack_masks
from tests.support.oracles import resampled
from tests.support.segments_oracle import assert_instances, assert_panoptic, large_scene

pytestmark = pytest.mark.gpu
RULES = get_args(PanopticRule)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MARGIN = 3e-6  # of scores, probabilities and logits
GRID = [
    # batch, queries, map, extent, output
    (2, 12, (24, 32), (24.0, 32.0), (96, 128)),
    (1, 30, (20, 24), (18.3, 23.1), (77, 93)),
    (1, 200, (9, 9), (9.0, 9.0), (33, 37)),
    (1, 7, (1, 1), (0.4, 1.0), (3, 40)),
    (1, 20, (90, 130), (88.7, 130.0), (30, 41)),
    (3, 5, (16, 70), (16.0, 70.0), (16, 70)),
    (2, 3, (3, 4), (3.0, 4.0), (1, 1)),
    (1, 4, (8, 6), (8.0, 6.0), (300, 260)),
]


def ties(arguments) -> torch.Tensor:
    """[B, H, W] pixels whose winner or owner rounding may turn."""
    logits, scores, categories, _, extent, size, _, rule = arguments
    masks = resampled(logits, extent, size).sigmoid()
    values = scores.double()[..., None, None] * masks
    absent = (categories < 0)[..., None, None]
    top = torch.cat([values.masked_fill(absent, -1.0), -torch.ones_like(values[:, :1])], 1).topk(2, 1).values
    owned = ((values if rule == "huggingface" else masks) - 0.5).abs().masked_fill(absent, 1.0).amin(1)
    return (top[:, 0] - top[:, 1] < MARGIN) | (owned < MARGIN)


def random_scene(seed: int, case, dtype: torch.dtype, rule: str, clear: bool = True):
    batch, queries, maps, extent, size = case
    for attempt in count(seed):
        generator = torch.Generator().manual_seed(attempt)
        # blobs, so that segments are large and many tiles settled
        logits = torch.nn.functional.interpolate(
            9 * torch.randn(batch, queries, 4, 4, generator=generator) - 3, maps, mode="bilinear"
        )
        logits = (logits + torch.randn(logits.shape, generator=generator)).to(dtype)
        scores = 0.5 + 0.5 * torch.rand(batch, queries, generator=generator)
        categories = torch.randint(-1, 4, (batch, queries), generator=generator)
        arguments = (logits, scores, categories, torch.tensor([True, False] * 2), extent, size, 0.4, rule)
        if not clear or not ties(arguments).any():
            return arguments


def on_device(arguments):
    return tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in arguments)


def assert_same(actual, expected) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", GRID)
def test_panoptic(case, rule, dtype) -> None:
    clear = case[1] * case[4][0] * case[4][1] < 50000  # in larger scenes some pixel is always close to a tie
    arguments = random_scene(0, case, dtype, rule, clear)
    expected = panoptic_inference(*arguments)  # on the CPU, itself held to float64
    actual = panoptic_inference(*on_device(arguments))
    again = panoptic_inference(*on_device(arguments))
    assert_same(actual, again)
    if clear:
        assert_same(actual, expected)
        return
    unclear = ties(arguments)
    assert unclear.float().mean() < 0.02
    assert ((actual.areas.cpu() - expected.areas).abs().sum(1) <= 2 * unclear.sum((1, 2))).all()
    if torch.equal(actual.ids.cpu(), expected.ids):
        assert torch.equal(actual.id_map.cpu()[~unclear], expected.id_map[~unclear])


@pytest.mark.parametrize("rule", RULES)
def test_eager_twin_and_strides(rule) -> None:
    arguments = on_device(random_scene(3, GRID[5], torch.float32, rule))
    logits, scores, categories, *rest = arguments
    expected = panoptic_inference_eager(*arguments)
    for view in (logits, logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
        assert_same(panoptic_inference(view, scores.T.contiguous().T, categories, *rest), expected)


def test_more_queries_than_the_kernel_takes() -> None:
    arguments = random_scene(1, (1, 300, (6, 6), (6.0, 6.0), (9, 11)), torch.float32, "maskformer")
    assert_same(panoptic_inference(*on_device(arguments)), panoptic_inference(*arguments))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_nothing_to_do(shape) -> None:
    logits = torch.zeros(shape, device="cuda")
    categories = torch.zeros(shape[:2], dtype=torch.int64, device="cuda")
    actual = panoptic_inference(
        logits, logits[..., 0, 0], categories, torch.tensor([True], device="cuda"), (4, 4), (9, 9), 0.8
    )
    assert actual.id_map.shape == (shape[0], 9, 9) and (actual.id_map == VOID).all()
    assert instance_inference(logits, (4, 4), (9, 9)).masks.shape == (*shape[:2], 9, 2)
    assert instance_rle(logits, (4, 4), (9, 9), 5).starts.tolist() == [0]


@pytest.mark.parametrize("rule", RULES)
def test_not_finite_is_as_on_the_cpu(rule) -> None:
    logits = torch.full((1, 5, 2, 4), -3.0)
    for query, value in enumerate((math.nan, -math.inf, math.inf, 2.0, 4.0)):
        logits[0, query, :, query % 4] = value
    scores = torch.tensor([[0.9, 0.8, 0.7, math.nan, -2.0]])
    arguments = (logits, scores, torch.arange(5)[None], torch.ones(5).bool(), (2.0, 4.0), (5, 19), 0.0, rule)
    assert_same(panoptic_inference(*on_device(arguments)), panoptic_inference(*arguments))
    window = arguments[4:6]
    assert_same(instance_inference(logits.cuda(), *window)[:3], instance_inference(logits, *window)[:3])


def test_ratio_equal_to_the_threshold() -> None:
    logits = torch.full((1, 2, 1, 10), -9.0)
    logits[0, 0, 0, :10], logits[0, 1, 0, :2] = 2.0, 8.0  # the first keeps 8 of 10 pixels
    rest = (torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([True, True]), (1, 10), (1, 10))
    for threshold, rule in ((0.8, "maskformer"), (0.8, "huggingface"), (math.nextafter(0.8, 1), "maskformer")):
        arguments = (logits, *rest, threshold, rule)
        assert_same(panoptic_inference(*on_device(arguments)), panoptic_inference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID)
def test_instances_and_run_lengths(case, dtype) -> None:
    logits, *_, extent, size, _, _ = random_scene(0, case, dtype, "maskformer", clear=False)
    logits[0, 0] = -1.0
    up = resampled(logits, extent, size)
    actual = instance_inference(logits.cuda(), extent, size)
    masks = unpack_masks(actual.masks.cpu(), size[1])
    clear = up.abs() > 1e-5
    assert torch.equal(masks[clear], (up > 0)[clear]) and clear.float().mean() > 0.99
    areas = masks.sum((2, 3))
    assert torch.equal(actual.areas.cpu(), areas)
    scores = (up.sigmoid() * masks).sum((2, 3)) / (areas + 1e-6)
    torch.testing.assert_close(actual.scores.cpu(), scores.float(), atol=1e-6, rtol=0)
    for mask, box in zip(masks.flatten(0, 1), actual.boxes.flatten(0, 1).tolist(), strict=True):
        y, x = mask.nonzero().unbind(1)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    assert_same(instance_inference(logits.cuda(), extent, size), actual)

    # the same masks, bit for bit, though no kernel shares them
    packed = actual.masks.cpu().flatten(0, 1).numpy()
    expected = [rle["counts"] for rle in encode_packed_masks(packed, size[1])]
    total = sum(map(len, expected))
    for capacity in (total, total + 100):
        data, starts = instance_rle(logits.cuda(), extent, size, capacity)
        places = starts.tolist()
        assert [data[a:b].cpu().numpy().tobytes() for a, b in pairwise(places)] == expected
        assert (data[total:] == 0).all()
    assert total <= instance_rle(logits.cuda(), extent, size, total // 2).starts[-1].item() <= 7 * total
    grown = encode_instances(logits.cuda(), extent, size)
    assert [rle["counts"] for image in grown for rle in image] == expected


def test_opcheck_compile_and_graph() -> None:
    arguments = on_device(random_scene(1, GRID[1], torch.float32, "mask2former"))
    logits, *_, extent, size, _, _ = arguments
    window = ([*extent], [*size])
    operators = torch.ops.maskformer_fast
    torch.library.opcheck(operators.panoptic_inference.default, (*arguments[:4], *window, 0.4, "mask2former"))
    torch.library.opcheck(operators.instance_inference.default, (logits, *window))
    torch.library.opcheck(operators.instance_rle.default, (logits, *window, 5000))

    def infer(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        panoptic = PanopticSegments(*panoptic_inference(logits * 2, *arguments[1:]))
        return (*panoptic, *instance_inference(logits * 2, extent, size), *instance_rle(logits, extent, size, 90000))

    assert_same(torch.compile(infer, fullgraph=True)(logits), infer(logits))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = infer(logits)
    logits.copy_(logits.flip(1))
    graph.replay()
    assert_same(replayed, infer(logits))


@pytest.mark.parametrize("rule", RULES)
def test_large_scene_equals_float64(rule: PanopticRule) -> None:
    scene = large_scene(rule)
    segments = panoptic_inference(*on_device(scene))
    assert segments.id_map.is_cuda
    assert_panoptic(PanopticSegments(*(tensor.cpu() for tensor in segments)), scene)
    instances = instance_inference(scene.logits.cuda(), scene.extent, scene.size)
    assert_instances(type(instances)(*(tensor.cpu() for tensor in instances)), scene)
