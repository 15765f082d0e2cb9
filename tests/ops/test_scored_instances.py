"""Instances of heads with scores, against what their own post-processing computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.ops.scored_instances import instances_from_scores
from maskformer_fast.structures import unpack_masks

SIZES = [(60, 83), (45, 40)]


def head(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 12, 5, generator=generator).sigmoid()
    masks = F.avg_pool2d(torch.randn(2, 12, 20, 24, generator=generator), 3, 1, 1) * 4
    return scores, masks, 50 * torch.rand(2, 12, 4, generator=generator)


@pytest.mark.parametrize("mask_score", [False, True])
@pytest.mark.parametrize("bias", [0.0, -0.7, torch.tensor(0.4)])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 2.0])
def test_instances_equal_the_dense_formula(mask_score: bool, bias: float | torch.Tensor, threshold: float) -> None:
    scores, mask_logits, boxes = head(1)
    found = instances_from_scores(
        scores, mask_logits, SIZES, 30, threshold=threshold, mask_bias=bias, mask_score=mask_score, boxes=boxes
    )
    for image, (result, size) in enumerate(zip(found, SIZES, strict=True)):
        values, index = scores[image].flatten().topk(30)
        query = index // 5
        logits = F.interpolate(mask_logits[image : image + 1] + bias, size, mode="bilinear", align_corners=False)[0]
        masks = logits[query] > 0
        if mask_score:
            values = values * (logits[query].sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        order = values.argsort(descending=True, stable=True)
        order = order[values[order] >= threshold]
        assert result.labels.tolist() == (index % 5)[order].tolist()
        torch.testing.assert_close(result.scores, values[order], atol=1e-5, rtol=1e-5)
        assert (unpack_masks(result.masks, size[1]) != masks[order]).sum() <= 1e-3 * masks[order].numel()
        assert torch.equal(result.boxes, boxes[image, query[order]])
        assert len(result.to_coco()) == len(order)


def test_boxes_are_those_of_the_masks_where_none_are_given() -> None:
    scores, mask_logits, _ = head(2)
    mask_logits[:, 0] = -1
    scores[:, 0] = 1.0
    for result, size in zip(instances_from_scores(scores, mask_logits, SIZES, 8), SIZES, strict=True):
        for mask, box in zip(unpack_masks(result.masks, size[1]), result.boxes.tolist(), strict=True):
            y, x = mask.nonzero().unbind(1)
            assert box == ([x.min().item(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4)
        assert result.boxes[:5].eq(0).all()
    assert len(instances_from_scores(scores, mask_logits, SIZES, 1000)[0].labels) == 60
    assert len(instances_from_scores(scores, mask_logits, SIZES, 9, mask_score=True, threshold=1e-6)[0].labels) == 4


def test_of_equal_scores_the_first_query_and_class_comes_first() -> None:
    scores, mask_logits, _ = head(3)
    scores = (4 * scores).round() / 4  # as of half precision: many are equal
    for image, result in enumerate(instances_from_scores(scores, mask_logits, SIZES, 25)):
        pairs = sorted(
            ((-float(scores[image, query, label]), query, label) for query in range(12) for label in range(5)),
        )[:25]
        assert result.labels.tolist() == [label for _, _, label in pairs]
        assert result.scores.tolist() == [-score for score, _, _ in pairs]


def test_probabilities_are_masks_above_a_half_with_a_bias() -> None:
    scores, mask_logits, _ = head(4)
    found = instances_from_scores(scores, mask_logits.sigmoid(), SIZES, 12, mask_bias=-0.5)
    for image, (result, size) in enumerate(zip(found, SIZES, strict=True)):
        query = scores[image].flatten().topk(12).indices // 5
        probabilities = F.interpolate(mask_logits[image, query].sigmoid()[None], size, mode="bilinear")[0]
        assert (unpack_masks(result.masks, size[1]) != (probabilities > 0.5)).sum() <= 1e-3 * probabilities.numel()


def test_errors_name_the_argument() -> None:
    scores, masks, boxes = head(0)
    for arguments, message in (
        ((scores[0], masks, SIZES, 3), r"scores: expected \[B, Q, C\]"),
        ((scores, masks[:1], SIZES, 3), r"mask_logits: expected \[2, 12\]"),
        ((scores, masks, SIZES[:1], 3), "output_sizes: expected 2 sizes"),
        ((scores, masks, SIZES, 0), "top_k: expected > 0"),
        ((scores, masks, [(0, 3)] * 2, 3), "output_size: expected positive"),
    ):
        with pytest.raises(ValueError, match=message):
            instances_from_scores(*arguments)
    with pytest.raises(ValueError, match=r"boxes: expected \[2, 12, 4\]"):
        instances_from_scores(scores, masks, SIZES, 3, boxes=boxes[:, :3])
