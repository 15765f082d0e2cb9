"""Semantic inference against its definition in float64 and against F.interpolate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from maskformer_fast.ops import resample as resample_module
from maskformer_fast.ops import semantic as semantic_module
from maskformer_fast.ops.resample import resample
from maskformer_fast.ops.semantic import (
    pixel_semantic_inference,
    pixel_semantic_scores,
    semantic_inference,
    semantic_inference_eager,
    semantic_scores,
)
from tests.support.oracles import random_logits, resampled
from tests.support.oracles import semantic_scores as oracle


def assert_labels(labels: torch.Tensor, scores: torch.Tensor, margin: float = 1e-5) -> None:
    """Each label's true score is the largest but for rounding."""
    assert (scores.gather(1, labels.long()[:, None])[:, 0] >= scores.amax(1) - margin).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_definition_on_ragged_sizes(data: st.DataObject) -> None:
    side = st.integers(1, 13)
    h, w, height, width = data.draw(side), data.draw(side), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    extent = (h * data.draw(st.floats(0.05, 1.0)), w * data.draw(st.floats(0.05, 1.0)))
    masks, classes = random_logits(
        data.draw(st.integers(0, 99)), 1, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12)), (h, w)
    )
    expected = oracle(masks, classes, extent, (height, width))
    scores = semantic_scores(masks, classes, extent, (height, width))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-7, atol=2e-5)
    labels, best, _ = semantic_inference(masks, classes, extent, (height, width), with_scores=True)
    assert labels.shape == (1, height, width) and labels.dtype == torch.uint8
    assert_labels(labels, expected)
    torch.testing.assert_close(best.double(), expected.amax(1), rtol=1e-7, atol=2e-5)


@pytest.mark.parametrize("padded, valid", [((64, 96), (64, 96)), ((64, 96), (51, 83)), ((60, 92), (33, 92))])
def test_resampling_to_the_network_size_is_interpolate_cropped(padded: tuple[int, int], valid: tuple[int, int]) -> None:
    maps = 5 * torch.randn(7, 16, 24, generator=torch.Generator().manual_seed(0))
    extent = (valid[0] * 16 / padded[0], valid[1] * 24 / padded[1])
    expected = F.interpolate(maps[None], size=padded, mode="bilinear", align_corners=False)[0]
    expected = expected[:, : valid[0], : valid[1]]
    torch.testing.assert_close(resample(maps, extent, valid), expected, atol=5e-5, rtol=0)  # logits up to 20


@pytest.mark.parametrize("extent", [(4.0, 4.0), (6.5, 6.9)])
def test_window_as_large_as_the_maps_is_still_resampled(extent: tuple[float, float]) -> None:
    maps = torch.randn(2, 7, 7)
    expected = resampled(maps, extent, (7, 7))
    torch.testing.assert_close(resample(maps, extent, (7, 7)).double(), expected, rtol=1e-7, atol=1e-5)


def test_resampling_to_the_same_size_changes_no_bit() -> None:
    maps = 1e3 * torch.randn(3, 17, 23)
    assert torch.equal(resample(maps, (17, 23), (17, 23)), maps)


@pytest.mark.parametrize(
    "classes, dtype", [(1, torch.uint8), (255, torch.uint8), (256, torch.int16), (300, torch.int16)]
)
def test_number_of_classes_sets_the_dtype(classes: int, dtype: torch.dtype) -> None:
    masks, logits = random_logits(1, 1, 40, classes, (6, 5))
    labels, scores, _ = semantic_inference(masks, logits, (6, 5), (11, 9))
    assert labels.dtype == dtype and scores is None
    assert_labels(labels, oracle(masks, logits, (6, 5), (11, 9)))


def test_labels_above_127_keep_their_value() -> None:
    logits = torch.full((1, 1, 256), -9.0)
    logits[0, 0, 254] = 9.0
    labels, _, _ = semantic_inference(torch.ones(1, 1, 2, 2), logits, (2, 2), (3, 3))
    assert (labels == 254).all()


def test_one_query_labels_every_pixel_with_its_class() -> None:
    masks, logits = random_logits(2, 1, 1, 6, (4, 4))
    labels, _, _ = semantic_inference(masks, logits, (4, 4), (9, 7))
    assert (labels == logits[0, 0, :-1].argmax()).all()


def test_batch_equals_images_alone() -> None:
    masks = torch.randn(3, 8, 6, 7, generator=torch.Generator().manual_seed(3))
    logits = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(4))
    labels, scores, _ = semantic_inference(masks, logits, (5.5, 6.25), (19, 21), with_scores=True)
    for image in range(3):
        one = slice(image, image + 1)
        alone = semantic_inference(masks[one], logits[one], (5.5, 6.25), (19, 21), with_scores=True)
        assert torch.equal(labels[one], alone[0]) and torch.equal(scores[one], alone[1])


def test_tiles_and_class_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, logits = random_logits(5, 1, 12, 23, (9, 8))
    arguments = (masks, logits, (8.2, 7.9), (31, 29))
    _, scores, _ = semantic_inference_eager(*arguments, with_scores=True)
    pixel_labels, _ = pixel_semantic_inference(masks, *arguments[2:])
    monkeypatch.setattr(resample_module, "CPU_TILE_BYTES", 1)
    monkeypatch.setattr(semantic_module, "CLASS_CHUNK", 5)
    tiled_labels, tiled_scores, _ = semantic_inference_eager(*arguments, with_scores=True)
    torch.testing.assert_close(tiled_scores, scores, atol=1e-6, rtol=1e-6)
    assert_labels(tiled_labels, oracle(*arguments))
    torch.testing.assert_close(semantic_scores(*arguments).amax(1), scores, atol=1e-6, rtol=1e-6)
    assert torch.equal(pixel_semantic_inference(masks, *arguments[2:])[0], pixel_labels)


def test_equal_scores_give_the_lowest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_module, "CLASS_CHUNK", 2)
    logits = torch.zeros(1, 3, 8)
    logits[..., 0] = -5.0
    for infer in (semantic_inference, semantic_inference_eager):
        assert (infer(torch.randn(1, 3, 4, 4), logits, (4, 4), (8, 8)).labels == 1).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_nothing_of_full_size_per_query_or_class_is_made() -> None:
    masks, logits = random_logits(6, 1, 50, 40, (32, 32))
    with LargestTensor() as largest:
        semantic_inference_eager(masks, logits, (32, 32), (256, 320), with_scores=True)
    assert largest.elements <= max(256 * 320, resample_module.CPU_TILE_BYTES // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    masks, logits = (t.to(dtype) for t in random_logits(7, 1, 10, 9, (8, 8)))
    expected = semantic_scores(masks.float(), logits.float(), (8, 8), (21, 21))
    assert torch.equal(semantic_scores(masks, logits, (8, 8), (21, 21)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(semantic_scores(masks, logits, (8, 8), (21, 21)), expected)
        _, best, _ = semantic_inference(masks, logits, (8, 8), (21, 21), with_scores=True)
    torch.testing.assert_close(best, expected.amax(1), atol=1e-6, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30), st.integers(1, 60))
def test_pixel_models_equal_definition(h: int, w: int, height: int, width: int, classes: int) -> None:
    logits = 3 * torch.randn(1, classes, h, w, generator=torch.Generator().manual_seed(h + 10 * w))
    extent = (0.8 * h, 0.9 * w)
    expected_logits = resampled(logits, extent, (height, width))
    expected = expected_logits.softmax(1)
    labels, best = pixel_semantic_inference(logits, extent, (height, width), with_scores=True)
    assert_labels(labels, expected_logits)
    torch.testing.assert_close(best.double(), expected.amax(1), rtol=1e-7, atol=1e-5)
    scores = pixel_semantic_scores(logits, extent, (height, width))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-7, atol=1e-5)
    assert_labels(pixel_semantic_inference(logits, extent, (height, width))[0], expected_logits)


@pytest.mark.parametrize(
    "masks, classes, extent, size, name",
    [
        ((4, 5, 5), (1, 4, 3), (5, 5), (9, 9), "mask_logits"),
        ((1, 4, 5, 5), (1, 3, 3), (5, 5), (9, 9), "class_logits"),
        ((1, 4, 5, 5), (1, 4, 1), (5, 5), (9, 9), "class_logits"),
        ((1, 4, 5, 5), (1, 4, 3), (5.1, 5), (9, 9), "extent"),
        ((1, 4, 5, 5), (1, 4, 3), (5, 0), (9, 9), "extent"),
        ((1, 4, 5, 5), (1, 4, 3), (5, 5), (9, 0), "output_size"),
        ((1, 1, 1, 1), (1, 1, 32769), (1, 1), (1, 1), "number of classes"),
    ],
)
def test_bad_input_is_named(masks, classes, extent, size, name) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got "):
        semantic_inference(torch.zeros(masks), torch.zeros(classes), extent, size)
