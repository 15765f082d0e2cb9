"""Results of the drop-in functions equal those of transformers' own image processors, quirks included."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskformer_fast.drop_in import eomt, equip, mask2former, maskformer, oneformer, unequip
from maskformer_fast.structures import unpack_masks
from tests.drop_in.comparison import both, check_maps, check_results, processor, twins, two_images
from tests.support.peaky import model_outputs

transformers = pytest.importorskip("transformers")
SIZES = [(65, 90), (200, 131)]


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "OneFormer"])
@pytest.mark.parametrize("peaky", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, [(20, 60), (9, 7)], None])
def test_semantic(family: str, peaky: bool, sizes: list[tuple[int, int]] | None) -> None:
    theirs, ours = twins(family)
    outputs = two_images(family, peaky)
    expected = theirs.post_process_semantic_segmentation(outputs, sizes)
    got = ours.post_process_semantic_segmentation(outputs, sizes)
    for mine, other in zip(got, expected, strict=True):
        check_maps(mine, other)
    scored = theirs.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    mine_scored = ours.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    for mine, other, label in zip(mine_scored, scored, got, strict=True):
        assert type(mine) is type(other) and list(mine) == list(other)
        torch.testing.assert_close(mine.segmentation_scores, other.segmentation_scores, atol=1e-5, rtol=1e-5)
        check_maps(mine.segmentation, label)
    with pytest.raises(ValueError, match="target_sizes: expected as many sizes as images"):
        ours.post_process_semantic_segmentation(outputs, [(4, 4)])
    with pytest.raises(ValueError, match="target sizes"):
        theirs.post_process_semantic_segmentation(outputs, [(4, 4)])


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "OneFormer"])
@pytest.mark.parametrize("fuse", [None, set(range(0, 40, 2)), {1, 3}])
@pytest.mark.parametrize("sizes", [SIZES, [(20, 60), (9, 7)], None])
def test_panoptic(family: str, fuse: set[int] | None, sizes: list[tuple[int, int]] | None) -> None:
    theirs, ours = twins(family)
    outputs = two_images(family, True, live=30, classes=7 if fuse == {1, 3} else 40)
    found = 0
    for extra in ({}, {"threshold": 0.3, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.2}):
        arguments = {"label_ids_to_fuse": fuse, "target_sizes": sizes, **extra}
        found += check_results(
            ours.post_process_panoptic_segmentation(outputs, **arguments),
            theirs.post_process_panoptic_segmentation(outputs, **arguments),
        )
    assert found > 5
    nothing = [p.post_process_panoptic_segmentation(outputs, threshold=1.0, target_sizes=sizes) for p in (ours, theirs)]
    assert check_results(*nothing) == 0 and nothing[0][0]["segmentation"].dtype == torch.float32


def test_two_segments_share_an_id_as_theirs_do() -> None:
    theirs, ours = twins("MaskFormer")
    for seed in range(20):
        outputs = model_outputs(True, live=30, classes=4, seed=seed)
        arguments = {"label_ids_to_fuse": {0}, "overlap_mask_area_threshold": 0.1}
        results = [p.post_process_panoptic_segmentation(outputs, **arguments) for p in (ours, theirs)]
        check_results(*results)
        infos = results[0][0]["segments_info"]
        if any(a["id"] == b["id"] and a["label_id"] != b["label_id"] for a in infos for b in infos):
            return
    pytest.fail("no case of the quirk was met")


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former"])
@pytest.mark.parametrize("sizes", [SIZES, [(9, 7), (20, 11)], None])
@pytest.mark.parametrize("threshold", [0.5, 0.01])
def test_instances(family: str, sizes: list[tuple[int, int]] | None, threshold: float) -> None:
    theirs, ours = twins(family)
    outputs = two_images(family, True, live=20)
    call = {"threshold": threshold, "target_sizes": sizes}
    assert check_results(
        ours.post_process_instance_segmentation(outputs, **call),
        theirs.post_process_instance_segmentation(outputs, **call),
    )
    for mine, other in zip(
        ours.post_process_instance_segmentation(outputs, **call, return_coco_annotation=True),
        theirs.post_process_instance_segmentation(outputs, **call, return_coco_annotation=True),
        strict=True,
    ):
        assert mine["segmentation"] == other["segmentation"]
        assert all(type(number) is int for runs in mine["segmentation"] for number in runs)
    maps = theirs.post_process_instance_segmentation(outputs, **call, return_binary_maps=True)
    check_results(ours.post_process_instance_segmentation(outputs, **call, return_binary_maps=True), maps)
    packed = (maskformer if family == "MaskFormer" else mask2former).instance_results(outputs, threshold, sizes)
    for result, other in zip(packed, maps, strict=True):
        check_packed(result, other["segmentation"])
    for p in (ours, theirs):
        with pytest.raises(ValueError, match="return_coco_annotation"):
            p.post_process_instance_segmentation(outputs, return_coco_annotation=True, return_binary_maps=True)


def check_packed(result: Any, maps: torch.Tensor) -> None:
    """Packed masks, boxes and COCO's run lengths belong to binary maps [N, H, W]."""
    masks = unpack_masks(result.masks, result.size[1])
    assert torch.equal(masks, maps == 1)
    for mask, box in zip(masks, result.boxes.tolist(), strict=True):
        y, x = mask.nonzero().unbind(1)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_no_instance_gives_an_empty_map_in_every_format() -> None:
    theirs, ours = twins("Mask2Former")
    outputs = model_outputs(True)
    for extra in ({}, {"return_binary_maps": True}, {"return_coco_annotation": True}):
        call = {"threshold": 1.1, "target_sizes": [(30, 40)], **extra}
        (mine,), (other,) = (p.post_process_instance_segmentation(outputs, **call) for p in (ours, theirs))
        assert mine["segments_info"] == other["segments_info"] == []
        same = torch.equal if isinstance(mine["segmentation"], torch.Tensor) else list.__eq__
        assert same(mine["segmentation"], other["segmentation"])
    assert mask2former.instance_results(outputs, 1.1, [(30, 40)])[0].masks.shape == (0, 30, 5)


@pytest.mark.parametrize("task_type", ["instance", "panoptic"])
@pytest.mark.parametrize("is_demo", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, None])
def test_oneformer_instances(
    task_type: str, is_demo: bool, sizes: list[tuple[int, int]] | None, tmp_path: Path
) -> None:
    theirs, ours = twins("OneFormer", tmp_path)
    outputs = model_outputs(True, images=2, live=20)
    if not is_demo and task_type == "instance":
        outputs.class_queries_logits[..., 0:40:2] -= 60  # without stuff, which their list of things does not have
    call = {"task_type": task_type, "is_demo": is_demo, "target_sizes": sizes}
    for extra in ({}, {"overlap_mask_area_threshold": 0.2, "mask_threshold": 1.5}):
        assert check_results(
            ours.post_process_instance_segmentation(outputs, **call, **extra),
            theirs.post_process_instance_segmentation(outputs, **call, **extra),
        )
    call["return_coco_annotation"] = True
    for mine, other in zip(*both((ours, theirs), "instance", outputs, **call), strict=True):
        assert len(mine["segmentation"]) == len(other["segmentation"])
        for runs, expected in zip(mine["segmentation"], other["segmentation"], strict=True):
            assert abs(len(runs) - len(expected)) <= 8  # ties
            assert isinstance(runs, list) and isinstance(runs[0], torch.Tensor)
    with pytest.raises(ValueError, match="metadata: expected the processor's"):
        oneformer.post_process_instance_segmentation(outputs, "panoptic")


EOMT_SIZES = [(65, 90), (200, 131), (70, 70)]


@pytest.mark.parametrize("size", [None, {"shortest_edge": 96, "longest_edge": 128}])
def test_eomt(size: dict[str, int] | None) -> None:
    theirs, ours = twins("Eomt")
    for p in (theirs, ours):
        p.size = type(p.size)(shortest_edge=120, longest_edge=120)
    outputs = model_outputs(True, images=3, live=20, size=(30, 30))
    call = {"target_sizes": EOMT_SIZES, "size": size}
    for mine, other in zip(*both((ours, theirs), "semantic", outputs, **call), strict=True):
        check_maps(mine, other)
    for stuff in (None, list(range(0, 40, 2))):
        for overlap in (0.8, 0.2):
            arguments = {**call, "stuff_classes": stuff, "overlap_mask_area_threshold": overlap, "threshold": 0.5}
            assert check_results(*both((ours, theirs), "panoptic", outputs, **arguments)) > 2
    assert check_results(*both((ours, theirs), "instance", outputs, **call, threshold=0.4)) > 5
    assert check_results(*both((ours, theirs), "instance", outputs, **call, threshold=1.1)) == 0
    assert check_results(*both((ours, theirs), "panoptic", outputs, **call, threshold=1.0)) == 0


def test_eomt_patches() -> None:
    theirs, ours = twins("Eomt")
    outputs = model_outputs(True, images=4, size=(30, 30))
    size = {"shortest_edge": 96, "longest_edge": None}
    targets = [(100, 170), (150, 110)]
    outputs.patch_offsets = []
    for image, target in enumerate(targets):
        long = eomt._resized_size(target, size)[int(target[0] <= target[1])]
        outputs.patch_offsets += [[image, 0, 96], [image, long - 96, long]]
    for scores in (False, True):
        for mine, other in zip(
            *(p.post_process_semantic_segmentation(outputs, targets, size, scores) for p in (ours, theirs)), strict=True
        ):
            if scores:
                torch.testing.assert_close(mine.segmentation_scores, other.segmentation_scores, atol=1e-5, rtol=1e-5)
            else:
                check_maps(mine, other)


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "OneFormer", "Eomt"])
def test_equipped_processors_are_saved_copied_and_taken_off_again(family: str, tmp_path: Path) -> None:
    plain = processor(family)
    before = plain.to_dict()
    fast = equip(plain)
    assert fast is plain and fast.to_dict() == before
    method = type(fast).post_process_semantic_segmentation
    again = equip(fast)
    assert type(again).__mro__[1] is type(processor(family))
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.post_process_semantic_segmentation.__module__.startswith("maskformer_fast")
    fast.save_pretrained(tmp_path)
    assert method.__module__.startswith("maskformer_fast.drop_in")
    assert type(unequip(fast)) is type(processor(family))
    assert unequip(fast) is fast
    outer = type("Processor", (), {})()
    outer.image_processor = fast
    equip(outer)
    assert fast.post_process_semantic_segmentation.__module__.startswith("maskformer_fast")


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "OneFormer", "Eomt"])
def test_signatures_begin_as_theirs(family: str) -> None:
    theirs, ours = twins(family)
    for task in ("semantic", "panoptic", "instance"):
        name = f"post_process_{task}_segmentation"
        expected, got = (list(inspect.signature(getattr(p, name)).parameters.values()) for p in (theirs, ours))
        assert [(p.name, p.kind, p.default) for p in got[: len(expected)]] == [
            (p.name, p.kind, p.default) for p in expected
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in got[len(expected) :])


def test_the_size_of_an_eomt_processor_counts_unless_another_is_given() -> None:
    theirs, ours = twins("Eomt")
    outputs, other = model_outputs(True, live=8, size=(12, 12)), {"shortest_edge": 70, "longest_edge": 80}
    for p in (theirs, ours):
        p.size = type(p.size)(shortest_edge=48, longest_edge=48)
    for arguments in (([(60, 50)],), ([(60, 50)], None, True), ([(60, 50)], other, True)):
        mine, expected = both((ours, theirs), "semantic", outputs, *arguments)
        if len(arguments) == 1:
            check_maps(mine[0], expected[0])
        else:
            scores = [found[0].segmentation_scores for found in (mine, expected)]
            torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


def test_wrong_processors_and_options_are_refused() -> None:
    with pytest.raises(TypeError, match="processor: expected one of Mask2FormerImageProcessor"):
        equip(object())
    with pytest.raises(TypeError, match="options: expected arguments of .*eomt, got exact"):
        equip(processor("Eomt"), exact="official")
    outputs = model_outputs(True)
    with pytest.raises(ValueError, match="exact: expected one of"):
        maskformer.post_process_semantic_segmentation(outputs, exact="ours")
    with pytest.raises(ValueError, match="input_sizes: expected None unless"):
        maskformer.post_process_panoptic_segmentation(outputs, input_sizes=[(3, 3)])
    outputs.masks_queries_logits = np.zeros(3)
    with pytest.raises(AttributeError):
        maskformer.post_process_semantic_segmentation(outputs)
