"""Results at the edges of what processors take: tiny images, nothing found, everything found, values at a threshold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import PanopticResult
from tests.drop_in.comparison import both, check_maps, check_results, twins
from tests.support.peaky import model_outputs

pytest.importorskip("transformers")
FAMILIES = ["MaskFormer", "Mask2Former", "OneFormer", "Eomt"]
TASKS = ["semantic", "panoptic", "instance"]


def check(pair: tuple[Any, Any], task: str, outputs: Any, **options: Any) -> int:
    """Compare a call of both processors; returns the number of segments."""
    for owner in pair:
        owner.class_info_file = ""
    theirs, ours = both(pair, task, outputs, **options)
    if task != "semantic":
        return check_results(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        check_maps(mine, other)
    return 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_tiny_images(family: str, task: str) -> None:
    pair = twins(family)
    outputs = model_outputs(True, images=4, queries=6, live=6, classes=3, size=(10, 12))
    check(pair, task, outputs, target_sizes=[(1, 1), (1, 7), (8, 1), (2, 2)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [-40.0, 40.0])
def test_masks_without_or_with_all_pixels(family: str, task: str, value: float) -> None:
    pair = twins(family)
    outputs = model_outputs(True, images=2, queries=6, live=3, classes=3, size=(10, 12))
    outputs.masks_queries_logits[0] = value
    found = check(pair, task, outputs, target_sizes=[(20, 30), (9, 40)])
    assert found > 0 or task == "semantic"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_one_image_of_a_batch_without_segments(family: str, task: str) -> None:
    pair = twins(family)
    outputs = model_outputs(True, images=3, queries=6, live=3, classes=3, size=(10, 12))
    outputs.class_queries_logits[1] = torch.tensor([0.0, 0.0, 0.0, 50.0])
    assert check(pair, task, outputs, target_sizes=[(20, 30), (9, 40), (64, 3)]) > 0


@pytest.mark.parametrize("family", ["MaskFormer", "OneFormer"])  # the others' own code refuses it, as of instances
@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_no_queries(family: str, task: str) -> None:
    outputs = SimpleNamespace(class_queries_logits=torch.randn(2, 0, 4), masks_queries_logits=torch.randn(2, 0, 8, 9))
    assert check(twins(family), task, outputs, target_sizes=[(9, 20), (4, 5)]) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_sizes_that_do_not_fit_are_refused(family: str, task: str) -> None:
    _, ours = twins(family)
    call = getattr(ours, f"post_process_{task}_segmentation")
    outputs = model_outputs(True, images=2, queries=6, live=3, classes=3, size=(10, 12))
    for sizes in ([(9, 20)] * 3, [(9, 20)]):
        with pytest.raises(ValueError, match=f"target_sizes: expected as many sizes as images, 2, got {len(sizes)}"):
            call(outputs, target_sizes=sizes)
    for size in ((0, 3), (5,), (5, 5, 5)):
        with pytest.raises(ValueError, match="target_sizes: expected heights and widths of at least 1, got"):
            call(outputs, target_sizes=[(9, 20), size])


def halves(scores: list[float]) -> Any:
    """Two queries that own the left and right half of the image, and one that owns all, with these probabilities."""
    probability = torch.tensor([[score, 1 - score] for score in scores]).double()
    masks = torch.full((1, 3, 8, 8), -60.0)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = masks[0, 2] = 60
    return SimpleNamespace(
        class_queries_logits=probability.log().float()[None], masks_queries_logits=masks, patch_offsets=None
    )


@pytest.mark.parametrize("family", ["MaskFormer", "OneFormer", "Eomt"])
@pytest.mark.parametrize("overlap", [0.0, 0.49, 0.5, 0.51, 1.0])
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_values_at_a_threshold(family: str, overlap: float, threshold: float) -> None:
    """The third query keeps half of its pixels exactly, and the second has a score at the threshold."""
    pair = twins(family)
    outputs = halves([0.875, 0.5 + (threshold == 0.75) * 0.25, 0.8125])
    size = {"size": {"shortest_edge": 8, "longest_edge": 8}} if family == "Eomt" else {}
    options = {"target_sizes": [(8, 8)], "overlap_mask_area_threshold": overlap, "threshold": threshold, **size}
    check(pair, "panoptic", outputs, **options)


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "OneFormer"])
@pytest.mark.parametrize("fuse", [[], [0, 1, 2], (2,), {99}])
def test_labels_to_fuse_of_any_kind(family: str, fuse: Any) -> None:
    pair = twins(family)
    outputs = model_outputs(True, images=2, queries=8, live=8, classes=3, size=(10, 12))
    options = {"target_sizes": [(20, 30), (31, 17)], "label_ids_to_fuse": fuse, "overlap_mask_area_threshold": 0.2}
    assert check(pair, "panoptic", outputs, **options) > 0


@pytest.mark.parametrize("family", ["OneFormer", "Eomt"])
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_run_lengths_of_maps_are_those_of_pycocotools(family: str, task: str) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    theirs, ours = twins(family)
    outputs = model_outputs(True, images=2, queries=12, live=12, classes=5, size=(20, 27))
    theirs.class_info_file = ours.class_info_file = ""
    options = {"target_sizes": [(40, 90), (61, 70)], "overlap_mask_area_threshold": 0.3}
    if family == "Eomt" and task == "instance":
        del options["overlap_mask_area_threshold"]
    for mine, other in zip(*both((ours, theirs), task, outputs, **options), strict=True):
        segments = [SegmentInfo(s["id"], s["label_id"], score=s["score"]) for s in mine["segments_info"]]
        annotations = PanopticResult(mine["segmentation"], segments).to_coco()
        assert len(annotations) == len(other["segments_info"])
        for annotation, info in zip(annotations, other["segments_info"], strict=True):
            mask = (mine["segmentation"] == info["id"]).numpy().astype("uint8", order="F")
            expected = tools.encode(mask)
            assert annotation["segmentation"]["counts"].encode() == expected["counts"]
            assert annotation["area"] == tools.area(expected)
