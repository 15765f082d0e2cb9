"""Results in the official order, against dense formulas written out here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.drop_in import equip, mask2former, maskformer, oneformer
from maskformer_fast.structures import unpack_masks
from tests.support.peaky import model_outputs

INPUT = (128, 172)
VALID = [(128, 160), (101, 172)]
SIZES = [(200, 250), (64, 90)]
TIES = 2e-3


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def official_logits(outputs: Any, image: int, size: tuple[int, int]) -> torch.Tensor:
    """Logits resized to the padded input, cropped to the image and resized to the output -> [Q, H, W]."""
    height, width = VALID[image]
    return resize(resize(outputs.masks_queries_logits[image], INPUT)[:, :height, :width], size)


@pytest.mark.parametrize("module", [maskformer, mask2former, oneformer])
def test_semantic(module: ModuleType) -> None:
    outputs = model_outputs(True, images=2)
    found = module.post_process_semantic_segmentation(outputs, SIZES, exact="official", input_sizes=VALID)
    for image, (labels, size) in enumerate(zip(found, SIZES, strict=True)):
        masks = resize(outputs.masks_queries_logits[image], INPUT).sigmoid()
        classes = outputs.class_queries_logits[image].softmax(-1)[:, :-1]
        scores = torch.einsum("qk,qhw->khw", classes, masks)[:, : VALID[image][0], : VALID[image][1]]
        assert (labels != resize(scores, size).argmax(0)).sum() <= TIES * labels.numel()
    (first, _) = module.post_process_semantic_segmentation(outputs, exact="official", input_sizes=VALID)
    assert first.shape == VALID[0]
    (first, _) = module.post_process_semantic_segmentation(outputs, exact="official")
    assert first.shape == INPUT


@pytest.mark.parametrize("module", [maskformer, mask2former, oneformer])
def test_panoptic(module: ModuleType) -> None:
    outputs = model_outputs(True, images=2, live=30, classes=7)
    fuse = {0, 2, 4, 6}
    found = module.post_process_panoptic_segmentation(
        outputs, threshold=0.6, overlap_mask_area_threshold=0.3, label_ids_to_fuse=fuse, target_sizes=SIZES,
        exact="official", input_sizes=VALID,
    )  # fmt: skip
    merged = 0
    for image, (result, size) in enumerate(zip(found, SIZES, strict=True)):
        scores, labels = outputs.class_queries_logits[image].softmax(-1).max(-1)
        kept = ((labels < 7) & (scores > 0.6)).nonzero()[:, 0].tolist()
        masks = official_logits(outputs, image, size).sigmoid()[kept]
        winner = (masks * scores[kept][:, None, None]).argmax(0)
        expected, infos, first = torch.zeros(size, dtype=torch.int32), [], {}
        for k, query in enumerate(kept):
            mine, own = winner == k, masks[k] >= 0.5
            segment = mine if module is maskformer else mine & own
            if not (segment.any() and own.any() and mine.sum() / own.sum() >= 0.3):
                continue
            label = int(labels[query])
            if label in fuse and label in first:
                expected[segment] = first[label]
                merged += 1
                continue
            infos.append((len(infos) + 1, label, label in fuse, round(float(scores[query]), 6)))
            first[label] = len(infos)
            expected[segment] = len(infos)
        got = [tuple(info.values()) for info in result["segments_info"]]
        assert [info[:3] for info in got] == [info[:3] for info in infos]
        assert [info[3] for info in got] == pytest.approx([info[3] for info in infos], abs=2e-6)
        assert result["segmentation"].dtype == torch.int32
        assert (result["segmentation"] != expected).sum() <= TIES * expected.numel()
    assert merged > 0
    call = {"threshold": 1.0, "target_sizes": SIZES, "exact": "official"}
    assert all(result["segments_info"] == [] for result in module.post_process_panoptic_segmentation(outputs, **call))


@pytest.mark.parametrize("module", [maskformer, mask2former])
def test_instances(module: ModuleType) -> None:
    outputs = model_outputs(True, images=2, live=20)
    options = {"threshold": 0.4, "target_sizes": SIZES, "exact": "official", "input_sizes": VALID}
    packed = module.instance_results(outputs, **options)
    binary = module.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
    painted = module.post_process_instance_segmentation(outputs, **options)
    runs = module.post_process_instance_segmentation(outputs, **options, return_coco_annotation=True)
    for image, (result, size) in enumerate(zip(packed, SIZES, strict=True)):
        probabilities = outputs.class_queries_logits[image].softmax(-1)[:, :-1]
        values, index = probabilities.flatten().topk(50, sorted=False)
        logits = official_logits(outputs, image, size)[index // 40]
        masks = logits > 0
        scores = values * (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        kept = (scores >= 0.4) & masks.any(2).any(1)
        assert result.labels.tolist() == (index % 40)[kept].tolist() and kept.sum() > 3
        torch.testing.assert_close(result.scores, scores[kept], atol=1e-5, rtol=1e-5)
        assert (unpack_masks(result.masks, size[1]) != masks[kept]).sum() <= 1e-4 * masks[kept].numel()
        expected = torch.full(size, -1.0)
        for number, mask in enumerate(unpack_masks(result.masks, size[1])):
            expected[mask] = number
        assert torch.equal(painted[image]["segmentation"], expected)
        assert torch.equal(binary[image]["segmentation"], unpack_masks(result.masks, size[1]).float())
        assert sum(sum(part[1::2]) for part in runs[image]["segmentation"]) == size[0] * size[1]


def test_the_order_can_be_set_once() -> None:
    transformers = pytest.importorskip("transformers.models.mask2former.image_processing_pil_mask2former")
    processor = equip(transformers.Mask2FormerImageProcessorPil(), exact="official")
    outputs = model_outputs(True)
    (labels,) = processor.post_process_semantic_segmentation(outputs, [(60, 80)])
    (expected,) = mask2former.post_process_semantic_segmentation(outputs, [(60, 80)], exact="official")
    assert torch.equal(labels, expected)
