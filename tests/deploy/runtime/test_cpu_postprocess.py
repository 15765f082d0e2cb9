"""Post-processing on the CPU against `maskformer_fast.inference.postprocess` on the same logits."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import pytest
import torch

from maskformer_fast.core.metadata import VOID
from maskformer_fast.core.results import unpack_mask_array
from maskformer_fast.deploy.bundle.manifest import Postprocess
from maskformer_fast.deploy.runtime.cpu_postprocess import CpuPostprocessor, ImageLogits, label_dtype
from maskformer_fast.inference import postprocess
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops import semantic_inference
from maskformer_fast.structures import Predictions

INPUT = (40, 56)


def random_logits(
    seed: int, queries: int = 9, classes: int = 5, valid: tuple[int, int] = INPUT, size: tuple[int, int] = (31, 45)
) -> ImageLogits:
    rng = np.random.default_rng(seed)
    class_logits = 3 * rng.standard_normal((queries, classes + 1), dtype=np.float32)
    coarse = rng.standard_normal((queries, 3, 4), dtype=np.float32)
    mask_logits = 4 * np.kron(coarse, np.ones((4, 4), np.float32))[:, :10, :14]
    mask_logits += 0.3 * rng.standard_normal(mask_logits.shape, dtype=np.float32)
    return ImageLogits(class_logits, mask_logits, (valid[0] / 4, valid[1] / 4), size)


def predictions_of(logits: ImageLogits) -> Predictions:
    """Predictions of one-hot embeddings, whose mask logits are the given ones."""
    queries = len(logits.class_logits)
    valid = torch.tensor([[round(4 * cells) for cells in logits.extent]])
    return Predictions(
        torch.from_numpy(logits.class_logits)[None, None],
        torch.eye(queries)[None, None],
        torch.from_numpy(logits.mask_logits)[None],
        valid,
        INPUT,
    )


def things_of(classes: int) -> list[bool]:
    return [index % 2 == 0 for index in range(classes)]


def postprocessor(
    classes: int = 5, is_thing: list[bool] | None = None, threads: int = 1, **changes: Any
) -> CpuPostprocessor:
    values: dict[str, Any] = {
        "object_mask_threshold": 0.4, "overlap_threshold": 0.5, "top_k": 8, "panoptic_rule": "maskformer",
    }
    return CpuPostprocessor(Postprocess(**{**values, **changes}), is_thing or things_of(classes), threads)


def assert_instances(got: Any, expected: Any) -> None:
    """Compare instances; those whose scores are equal but for rounding may come in another order."""
    assert got.labels.dtype == np.int64 and got.scores.dtype == np.float32 and got.boxes.dtype == np.float32
    assert got.size == expected.size and got.masks.shape == tuple(expected.masks.shape)
    np.testing.assert_allclose(got.scores, expected.scores.numpy(), atol=1e-5, rtol=0)
    assert (np.diff(got.scores) <= 0).all()

    def rows(result: Any) -> list[tuple[Any, ...]]:
        arrays = [np.asarray(value) for value in (result.labels, result.boxes, result.masks)]
        return sorted((int(a), tuple(b.tolist()), c.tobytes()) for a, b, c in zip(*arrays, strict=True))

    assert rows(got) == rows(expected)


CASES = [
    (0, 9, 5, INPUT, (31, 45)),
    (1, 1, 1, INPUT, INPUT),
    (2, 20, 255, (33, 41), (17, 90)),
    (3, 12, 256, (1, 7), (3, 9)),
    (4, 100, 847, (40, 50), (64, 33)),
    (5, 7, 3, (5, 5), (1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_semantic_labels_equal_pytorchs(case: Any) -> None:
    logits = random_logits(*case)
    expected = postprocess.semantic(predictions_of(logits), [logits.size])[0].labels.numpy()
    got = postprocessor(case[2])(logits, "semantic").labels
    assert got.dtype == expected.dtype == label_dtype(case[2])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rule", get_args(PanopticRule))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_panoptic_segments_equal_pytorchs(case: Any, rule: PanopticRule) -> None:
    logits = random_logits(*case)
    logits = logits._replace(class_logits=2 * logits.class_logits)
    threshold, overlap = 0.1 if case[2] > 100 else 0.4, 0.3
    expected = postprocess.panoptic(
        predictions_of(logits), [logits.size], things_of(case[2]), threshold, overlap, rule=rule
    )[0]
    got = postprocessor(case[2], object_mask_threshold=threshold, overlap_threshold=overlap, panoptic_rule=rule)(
        logits, "panoptic"
    )
    np.testing.assert_array_equal(got.id_map, expected.id_map.numpy())
    assert got.id_map.dtype == np.int32 and len(got.segments) == len(expected.segments)
    for one, other in zip(got.segments, expected.segments, strict=True):
        assert (one.id, one.category, one.is_thing, one.area) == (other.id, other.category, other.is_thing, other.area)
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("top_k", [1, 8, 10_000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instances_equal_pytorchs(case: Any, top_k: int) -> None:
    logits = random_logits(*case)
    expected = postprocess.instances(predictions_of(logits), [logits.size], things_of(case[2]), top_k)[0]
    assert_instances(postprocessor(case[2], top_k=top_k)(logits, "instance"), expected)


def test_the_cases_have_instances_and_segments() -> None:
    results = [postprocessor(case[2])(random_logits(*case), "instance") for case in CASES]
    assert sum(len(result.labels) for result in results) > 20
    logits = random_logits(0)._replace(class_logits=2 * random_logits(0).class_logits)
    assert len(postprocessor(overlap_threshold=0.3)(logits, "panoptic").segments) >= 2


def test_nan_among_class_logits_takes_a_query_out_of_segments_and_instances() -> None:
    logits = random_logits(6)
    logits.class_logits[2, 1] = np.nan
    logits.class_logits[3, :] = -np.inf
    logits.class_logits[4, 0] = np.inf
    predictions, things = predictions_of(logits), things_of(5)
    expected = postprocess.panoptic(predictions, [logits.size], things, 0.4, 0.5)[0]
    got = postprocessor()(logits, "panoptic")
    np.testing.assert_array_equal(got.id_map, expected.id_map.numpy())
    assert_instances(
        postprocessor(top_k=100)(logits, "instance"), postprocess.instances(predictions, [logits.size], things, 100)[0]
    )
    assert not postprocessor()(logits, "semantic").labels.any()  # NaN reaches every pixel, whose label is then 0


def test_nan_and_infinity_among_mask_logits_give_finite_scores() -> None:
    logits = random_logits(7)
    logits.mask_logits[1, 3:5, 2:9] = np.nan
    logits.mask_logits[2, :4], logits.mask_logits[3, 5:] = np.inf, -np.inf
    expected = semantic_inference(
        torch.from_numpy(logits.mask_logits)[None],
        torch.from_numpy(logits.class_logits)[None],
        logits.extent,
        logits.size,
    )
    np.testing.assert_array_equal(postprocessor()(logits, "semantic").labels, expected.labels[0].numpy())
    for segment in postprocessor(object_mask_threshold=0.0)(logits, "panoptic").segments:
        assert np.isfinite(segment.score)
    assert np.isfinite(postprocessor()(logits, "instance").scores).all()


def test_results_without_segments_or_instances_are_empty() -> None:
    logits = random_logits(8)
    nothing = logits._replace(mask_logits=np.full_like(logits.mask_logits, -9.0))
    panoptic = postprocessor(object_mask_threshold=1.0)(logits, "panoptic")
    assert panoptic.segments == [] and (panoptic.id_map == VOID).all() and panoptic.id_map.shape == logits.size
    for result in (postprocessor()(nothing, "instance"), postprocessor(is_thing=[False] * 5)(logits, "instance")):
        assert len(result.labels) == len(result.scores) == 0 and result.masks.shape == (0, 31, 6)
        assert result.boxes.shape == (0, 4) and unpack_mask_array(result.masks, 45).shape == (0, 31, 45)
    assert postprocessor()(nothing, "panoptic").segments == []


def test_stuff_of_one_class_is_one_segment() -> None:
    logits = random_logits(9, queries=4, classes=2)
    logits.class_logits[:] = [-9.0, 9.0, -9.0]  # every query is of class 1
    logits.mask_logits[:] = -5.0
    logits.mask_logits[0, :, :4], logits.mask_logits[1, :, 4:7], logits.mask_logits[2, :, 7:] = 5.0, 5.0, 5.0
    stuff = postprocessor(is_thing=[True, False])(logits, "panoptic").segments
    things = postprocessor(is_thing=[True, True])(logits, "panoptic").segments
    assert len(stuff) == 1 and len(things) == 3
    assert stuff[0].area == sum(segment.area for segment in things) == 31 * 45 and not stuff[0].is_thing


def test_boxes_enclose_the_masks() -> None:
    result = postprocessor(top_k=30)(random_logits(10), "instance")
    masks = unpack_mask_array(result.masks, 45)
    assert masks.dtype == np.bool_ and len(masks) > 3
    for mask, box in zip(masks, result.boxes.tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    logits = random_logits(11, size=(200, 150))
    for task in ("semantic", "panoptic", "instance"):
        one, four = (asdict(postprocessor(threads=threads)(logits, task)) for threads in (1, 4))
        for name, value in one.items():
            np.testing.assert_array_equal(value, four[name])


def test_logits_of_contradicting_shapes_are_refused() -> None:
    logits = random_logits(12)
    with pytest.raises(ValueError, match=r"class_logits: expected \[Q, 7\], got \(9, 6\)"):
        postprocessor(classes=6)(logits, "semantic")
    with pytest.raises(ValueError, match="mask_logits"):
        postprocessor()(logits._replace(mask_logits=logits.mask_logits[:3]), "panoptic")
